"""Configurations of the Hopper grouped mm and which one serves which sizes. Imports no DSL."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

MAX_TILE_TOKENS = 160


# (tile_tokens, warpgroups): widths. Each costs a loop of its own, and registers that no other tile
# has left: one more and ptxas waits for every product.
_WIDTHS = {
    (16, 4): (8, 16),
    (32, 4): (16, 24, 32),
    (48, 4): (32, 48),
    (64, 4): (48, 64),
    (96, 3): (48, 64, 96),
    (112, 2): (64, 96, 112),
    (128, 2): (64, 96, 128),
    (144, 2): (64, 96, 128, 144),
    (160, 2): (64, 96, 128, 160),
}
# Registers a thread of the producer's warpgroup and of the others, by how many these are: what a
# multiprocessor has, in units of 8, after all started with as many.
_REGISTERS = {2: (40, 232), 3: (32, 160), 4: (32, 112)}
_FEW_TOKENS = 16
"""Tiles up to that size do without: the kernels before and after find room beside this one."""


@dataclass(frozen=True)
class GroupedMmConfig:
    """Static configuration of the kernel.

    tile_tokens: token columns of a tile: 8, or a multiple of 16 up to 128.
    warpgroups: consumer warpgroups; each owns a block of 64 weight rows of a tile.
    split_k: instead, a tile has 64 weight rows and the warpgroups take its columns in turn, 128
        each; the sums are added in a fixed order. For tiles too few to fill the GPU.
    stages: depth of the shared-memory pipeline; a stage is 128 columns, or 128 a warpgroup.
    blocks_per_sm: persistent CTAs on each multiprocessor.
    cluster: CTAs that share the rows of x: each loads its part and multicasts it to all.
    early_weights: load the first weights before the kernel ahead is complete. ``offs`` must have
        been complete when that kernel started.
    out_fp32: write fp32 rather than bf16.
    row_scale, bias: whether the epilogue has them.
    activation, limit: fused activation; a gated one needs weights prepacked ``gated``.
    """

    tile_tokens: int
    warpgroups: int
    stages: int
    blocks_per_sm: int = 1
    cluster: int = 1
    split_k: bool = False
    early_weights: bool = False
    out_fp32: bool = False
    row_scale: bool = False
    bias: bool = False
    activation: str = "none"
    gated: bool = False
    limit: float | None = None

    def __post_init__(self) -> None:
        tokens = self.tile_tokens
        if tokens != 8 and (tokens % 16 or not 0 < tokens <= MAX_TILE_TOKENS):
            raise ValueError(
                f"tile_tokens: must be 8 or a multiple of 16 up to {MAX_TILE_TOKENS}, got {tokens}"
            )
        if self.warpgroups not in range(1, 8):
            raise ValueError(f"warpgroups: must be 1 to 7, got {self.warpgroups}")
        # A part of x keeps whole groups of the eight rows that a swizzle pattern spans.
        if self.cluster not in (1, 2) or tokens % (8 * self.cluster):
            raise ValueError(f"cluster: must be 1 or 2, and 1 for 8 tokens, got {self.cluster}")
        if self.split_k and (self.cluster > 1 or self.warpgroups == 1):
            raise ValueError("split_k: needs several warpgroups and no cluster")

    @property
    def widths(self) -> tuple[int, ...]:
        """Tokens that a product may span: a tile with fewer takes the first that holds them."""
        return _WIDTHS.get((self.tile_tokens, self.warpgroups), (self.tile_tokens,))

    @property
    def registers(self) -> tuple[int, int] | None:
        """A thread's in the producer's warpgroup, which has then four warps, and in the others.

        None: all have as many as fit.
        """
        if self.tile_tokens <= _FEW_TOKENS or self.blocks_per_sm > 1:
            return None
        return _REGISTERS.get(self.warpgroups)

    @property
    def row_blocks(self) -> int:
        """Blocks of 64 weight rows in a tile of one CTA."""
        return 1 if self.split_k else self.warpgroups

    def grid(
        self, num_rows: int, num_experts: int, row_blocks: int, num_multiprocessors: int
    ) -> int:
        """CTAs to launch: as many as fit, in whole clusters, but not more than there can be tiles.

        A touched expert has at most one token tile that is not full.
        """
        tokens, blocks = self.tile_tokens, self.row_blocks * self.cluster
        token_tiles = (num_rows + min(num_experts, num_rows) * (tokens - 1)) // tokens
        clusters = token_tiles * -(-row_blocks // blocks)
        return (
            min(clusters, num_multiprocessors * self.blocks_per_sm // self.cluster) * self.cluster
        )


# Mean rows of a touched expert up to which a tile is the best. Routing scatters around the mean
# (by its square root, if random), and an expert with more rows than a tile pays its weights twice.
_LADDER = (
    (4, dict(tile_tokens=8, warpgroups=4, stages=8)),
    (10, dict(tile_tokens=16, warpgroups=4, stages=8)),
    (23, dict(tile_tokens=32, warpgroups=4, stages=6)),
    (36, dict(tile_tokens=48, warpgroups=4, stages=6)),
    (50, dict(tile_tokens=64, warpgroups=4, stages=5)),
    (76, dict(tile_tokens=96, warpgroups=3, stages=4)),
)
# Beyond those the tensor cores bound it, and the tile is the best whose padding costs least.
_LARGE_TILES = (
    dict(tile_tokens=112, warpgroups=2, stages=4, cluster=2),
    dict(tile_tokens=128, warpgroups=2, stages=4, cluster=2),
    dict(tile_tokens=144, warpgroups=2, stages=3, cluster=2),
    dict(tile_tokens=160, warpgroups=2, stages=3, cluster=2),
)
# Microseconds of 64 experts of 2048 x 2048 with as many rows each, on an H200.
_TIME_OF_WIDTH = {64: 77, 96: 86, 112: 93, 128: 102, 144: 113, 160: 122}
# And for each row of a tile that is loaded and not multiplied.
_TIME_OF_PADDING = 0.17
# Quartiles of the normal distribution, in the middle of each quarter.
_SCATTER = (-1.15, -0.32, 0.32, 1.15)

# Tiles of 64 rows up to which splitting K beats tiles of 256 rows: they leave multiprocessors idle,
# at the end if not at once. Measured on an H200.
_MULTIPROCESSORS = 132
_MOST_SPLIT_TILES = {8: 1600, 16: 528}
_SPLIT_COLUMN_BLOCKS = 8
# With fewer columns than that, smaller tiles: about one wave of them, or a few.
_FEW_TILES = 528
_FEW_SHORT = dict(warpgroups=1, stages=6, blocks_per_sm=2)
_SHORT = dict(warpgroups=3, stages=6, blocks_per_sm=2)
# A multiprocessor's share of the memory's bandwidth can grow by so much when others are idle.
_SPARE_BANDWIDTH = 1.1
_TOUCHED_SHARES = (0.92, 0.96, 1.0, 1.04, 1.08)


def _expected_time(config: GroupedMmConfig, rows: int) -> float:
    """Of an expert with ``rows`` on average, in units of ``_TIME_OF_WIDTH``."""
    total, tokens = 0.0, config.tile_tokens
    for deviation in _SCATTER:
        actual = round(rows + deviation * rows**0.5)
        full, rest = divmod(actual, tokens)
        total += full * _TIME_OF_WIDTH[tokens]
        if rest:
            width = next(width for width in config.widths if rest <= width)
            total += _TIME_OF_WIDTH[width] + (tokens - width) * _TIME_OF_PADDING
    return total / len(_SCATTER)


@lru_cache(maxsize=4096)
def _choose_tile(rows_per_expert: int) -> GroupedMmConfig:
    for limit, tile in _LADDER:
        if rows_per_expert <= limit:
            return GroupedMmConfig(**tile)
    large = [GroupedMmConfig(**tile) for tile in _LARGE_TILES]
    return min(large, key=lambda config: _expected_time(config, rows_per_expert))


def _split(tile_tokens: int, tiles: int) -> dict[str, Any]:
    """How to split K over the warpgroups of a CTA, for so many tiles of 64 rows."""
    if tile_tokens == 8 and _MULTIPROCESSORS < tiles <= 2 * _MULTIPROCESSORS:
        # All of them at once.
        return dict(split_k=True, warpgroups=2, stages=6, blocks_per_sm=2)
    if tile_tokens == 8 and tiles > 4 * _MULTIPROCESSORS:
        # One CTA multiplies while the other starts or ends a tile.
        return dict(split_k=True, warpgroups=3, stages=4, blocks_per_sm=2)
    return dict(split_k=True, stages=6 if tile_tokens == 8 else 4)


def _streaming_time(
    config: GroupedMmConfig, slots: int, num_experts: int, row_blocks: int
) -> float:
    """Of reading the touched experts' weights, in blocks a multiprocessor at full bandwidth.

    The tiles that are left for the last wave of CTAs do not need all multiprocessors, and these few
    do not reach the full bandwidth. How many experts random routing touches varies; this is a mean.
    """
    expected = num_experts * (1 - (1 - 1 / num_experts) ** slots)
    total = 0.0
    for share in _TOUCHED_SHARES:
        tiles = round(expected * share * -(-row_blocks // config.row_blocks))
        waves, left = divmod(tiles, config.blocks_per_sm * _MULTIPROCESSORS)
        busiest = -(-left // _MULTIPROCESSORS)
        last = max(left / _MULTIPROCESSORS, busiest / _SPARE_BANDWIDTH)
        total += (waves * config.blocks_per_sm + last) * config.row_blocks
    return total / len(_TOUCHED_SHARES)


@lru_cache(maxsize=4096)
def choose_config(
    num_rows: int, num_experts: int, row_blocks: int, column_blocks: int, **epilogue: Any
) -> GroupedMmConfig:
    """Configuration for static sizes: the tile that fits the rows of an evenly loaded expert."""
    touched = max(1, min(num_experts, num_rows))
    config = replace(_choose_tile(-(-num_rows // touched)), **epilogue)
    tiles = touched * row_blocks
    if tiles <= _MOST_SPLIT_TILES.get(config.tile_tokens, 0):
        if column_blocks >= _SPLIT_COLUMN_BLOCKS:
            return replace(config, **_split(config.tile_tokens, tiles))
        if config.tile_tokens == 8:
            return replace(config, **(_FEW_SHORT if tiles <= _FEW_TILES else _SHORT))
    if config.tile_tokens == 8:
        smaller = replace(config, **_SHORT)
        shape = (num_rows, num_experts, row_blocks)
        # Where both fill the multiprocessors, tiles of 192 rows are somewhat slower.
        if 1.01 * _streaming_time(smaller, *shape) < _streaming_time(config, *shape):
            return smaller
    if config.tile_tokens > 128 and config.out_fp32 and config.row_scale:
        # Their addresses leave no registers for more tokens.
        return replace(config, tile_tokens=128, stages=4)
    return config


def tokens_of_every_config(
    max_tokens: int, top_k: int, num_experts: int, sizes: Iterable[tuple[int, int]]
) -> list[int]:
    """Numbers of tokens, at most ``max_tokens``, that together meet every configuration there is.

    Configurations come and go as rows fill tiles and tiles fill multiprocessors, so looking where
    the choice changes between two numbers is not enough.

    sizes: (row_blocks, column_blocks) of the weights.
    """
    sizes = list(sizes)
    # Each number while not every expert is touched, then the fewest tokens for each number of rows
    # of the fullest expert.
    few = range(1, _LADDER[0][0] * num_experts // top_k + 2)
    most_rows = -(-max_tokens * top_k // num_experts)
    more = ((rows - 1) * num_experts // top_k + 1 for rows in range(1, most_rows + 1))
    first: dict[tuple[GroupedMmConfig, ...], int] = {}
    for tokens in (*few, *more):
        if tokens <= max_tokens:
            configs = (choose_config(tokens * top_k, num_experts, *size) for size in sizes)
            first.setdefault(tuple(configs), tokens)
    return list(first.values())
