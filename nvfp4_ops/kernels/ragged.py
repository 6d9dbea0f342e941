"""Which expert a row belongs to, and where its rows lie in swizzled scales.

Swizzled, each expert starts on a tile of 128 rows of its own.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from nvfp4_ops import format as nvfp4
from nvfp4_ops.kernels.launch.tensors import WARP


@cute.jit
def warp_upper_bound(table: cute.Tensor, size: Int32, value: Int32) -> Int32:
    """How many entries of a non-decreasing table are <= value.

    By a whole warp, for one value, up to 32 * 32 entries: two loads a lane; halving takes ten.
    """
    lane = cute.arch.lane_idx()
    width = (size + (WARP - 1)) // WARP
    first = lane * width
    passed = False
    if first < size:
        passed = Int32(table[cutlass.min(first + width, size) - 1]) <= value
    first = _count_lanes(passed) * width
    entry = first + lane
    passed = False
    if lane < width and entry < size:
        passed = Int32(table[entry]) <= value
    return cutlass.min(first + _count_lanes(passed), size)


def _count_lanes(predicate: cutlass.Boolean) -> Int32:
    return cute.arch.popc(cute.arch.vote_ballot_sync(predicate))


@cute.jit
def entry_before(table: cute.Tensor, index: Int32) -> Int32:
    """table[index - 1], and 0 before the first."""
    entry = Int32(0)
    if index > 0:
        entry = Int32(table[index - 1])
    return entry


@cute.jit
def warp_prefix_sum(value: Int32, lane: Int32) -> Int32:
    """Sum of the values of this lane and those below."""
    for step in cutlass.range_constexpr(5):
        below = cute.arch.shuffle_sync_up(value, 1 << step, mask_and_clamp=0)
        if lane >= (1 << step):
            value = value + below
    return value


@cute.jit
def _tiles_of_lane(mOffs: cute.Tensor, num_experts: Int32, expert: Int32):
    """Tiles of an expert; none past the last."""
    tiles = Int32(0)
    if expert < num_experts:
        rows = Int32(mOffs[expert]) - entry_before(mOffs, expert)
        tiles = (rows + (nvfp4.SWIZZLE_TILE_ROWS - 1)) // nvfp4.SWIZZLE_TILE_ROWS
    return tiles


@cute.jit
def locate_ragged_tile(mOffs: cute.Tensor, num_experts: Int32, tile: Int32):
    """Expert of a row tile, its first linear row, how many rows; none past the last expert.

    By a whole warp, 32 experts at a time: every warp finds its own tile, so that CTAs neither share
    a table nor wait for one. Rows per expert [2, 0, 130]: tiles 0, 1, 2 are of experts 0, 2, 2.
    """
    lane = cute.arch.lane_idx()
    first_expert, tiles_before = Int32(0), Int32(0)
    own = _tiles_of_lane(mOffs, num_experts, lane)
    total = cute.arch.warp_redux_sync(own, "add")
    while first_expert + WARP < num_experts and tiles_before + total <= tile:
        tiles_before = tiles_before + total
        first_expert = first_expert + WARP
        own = _tiles_of_lane(mOffs, num_experts, first_expert + lane)
        total = cute.arch.warp_redux_sync(own, "add")
    passed = tiles_before + warp_prefix_sum(own, lane) <= tile
    expert = cutlass.min(first_expert + _count_lanes(passed), num_experts)
    passed_tiles = Int32(0)
    if passed:
        passed_tiles = own
    tile_in_expert = tile - tiles_before - cute.arch.warp_redux_sync(passed_tiles, "add")
    first = Int32(0)
    count = Int32(0)
    if expert < num_experts:
        first = entry_before(mOffs, expert) + tile_in_expert * nvfp4.SWIZZLE_TILE_ROWS
        count = cutlass.min(Int32(mOffs[expert]) - first, Int32(nvfp4.SWIZZLE_TILE_ROWS))
    return expert, first, count


@cute.jit
def locate_tile(rows_per_expert: Int32, tile: Int32):
    """The same where every expert has as many rows."""
    tiles_per_expert = (rows_per_expert + (nvfp4.SWIZZLE_TILE_ROWS - 1)) // nvfp4.SWIZZLE_TILE_ROWS
    expert = tile // tiles_per_expert
    row = (tile - expert * tiles_per_expert) * nvfp4.SWIZZLE_TILE_ROWS
    count = cutlass.min(rows_per_expert - row, Int32(nvfp4.SWIZZLE_TILE_ROWS))
    return expert, expert * rows_per_expert + row, count
