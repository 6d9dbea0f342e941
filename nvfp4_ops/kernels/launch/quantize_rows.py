"""Launch of ``quantize_rows``: to codes and block scales, or to values."""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from nvfp4_ops import format as nvfp4
from nvfp4_ops.kernels.launch.tensors import (
    ROW_GROUPS,
    WARP,
    GetCompiled,
    Launch,
    check_num_experts,
    is_gated,
    tiles_view,
    why_no_rows,
)
from nvfp4_ops.kernels.limits import num_multiprocessors

# Blocks that a lane has in flight: while it quantizes one, the next ones are on their way.
BLOCKS_PER_LANE = 2

# Lanes side by side in a row. Swizzled, a warp has a line of each tile it meets: a row of each
# group of 32, so that a line's 16 scale bytes are stored at once.
LINEAR_LANES, SWIZZLED_LANES = WARP, WARP // ROW_GROUPS

LINEAR_COLS, SWIZZLED_COLS = BLOCKS_PER_LANE * LINEAR_LANES, BLOCKS_PER_LANE * SWIZZLED_LANES

# CTAs a multiprocessor from which on it is better to give a warp more steps than to add CTAs.
CTAS_PER_SM = 8

Scale = Literal["tensor", "row", "expert"]


@dataclass(frozen=True)
class QuantizeConfig:
    """activation, limit: applied to x first; a gated activation reads 2 K columns.

    values: write e2m1 * block scale in bf16, linear, instead of codes and block scales. gather:
    row r is made of the row of x that ``token_of_row[r]`` names; of values only.
    """

    dtype: torch.dtype
    scale: Scale
    swizzled: bool
    ragged: bool
    activation: str = "none"
    limit: float | None = None
    values: bool = False
    gather: bool = False
    threads: int = 128

    @property
    def resident_ctas(self) -> int:
        """CTAs that a multiprocessor holds at once: 64 registers a thread are enough for blocks of
        16-bit elements, fp32 and an activation take twice as many each. Left to itself, ptxas takes
        fewer, and puts loads next to their uses."""
        return 8 * 2 // self.dtype.itemsize // (1 if self.activation == "none" else 2)


@cache
def choose_col_warps(num_sf_cols: int, warps: int) -> int:
    """Warps side by side in a line: of those that waste the fewest, the most, up to half of all.

    The other half has the next line, which shares sectors of 32 bytes with it.

    >>> [choose_col_warps(cols, 8) for cols in (8, 16, 48, 180, 448)]
    [1, 1, 1, 4, 4]
    """

    def rank(col_warps: int) -> tuple[int, int]:
        steps = nvfp4.ceil_div(num_sf_cols, col_warps * SWIZZLED_COLS)
        return steps * col_warps, -col_warps

    return min((1 << i for i in range(max(1, warps.bit_length() - 1))), key=rank)


def choose_grid(
    config: QuantizeConfig, rows: int, cols: int, row_tiles: int, multiprocessors: int
) -> tuple[int, int, int]:
    """(CTAs along rows, CTAs along column steps, warps side by side)."""
    warps = config.threads // WARP
    if not config.swizzled:
        grid_rows, col_warps = nvfp4.ceil_div(rows, warps), 1
        num_steps = nvfp4.ceil_div(cols, LINEAR_COLS)
    else:
        num_sf_cols = nvfp4.ceil_div(cols, nvfp4.SWIZZLE_TILE_COLS) * nvfp4.SWIZZLE_TILE_COLS
        col_warps = choose_col_warps(num_sf_cols, warps)
        grid_rows = nvfp4.ceil_div(row_tiles * nvfp4.SWIZZLE_LINES, warps // col_warps)
        num_steps = nvfp4.ceil_div(num_sf_cols, col_warps * SWIZZLED_COLS)
    if config.values:
        # A warp that loads its next blocks between its stores of values is a seventh slower.
        return grid_rows, num_steps, col_warps
    # A row's steps go to CTAs of their own while there are multiprocessors to spare.
    grid_steps = min(num_steps, max(1, CTAS_PER_SM * multiprocessors // grid_rows))
    return grid_rows, grid_steps, col_warps


def _scale_of(global_scale: Tensor, offs: Tensor | None) -> Scale:
    if global_scale.ndim == 0:
        return "tensor"
    return "expert" if global_scale.ndim == 1 and offs is not None else "row"


def prepare_quantize(
    x: Tensor,
    global_scale: Tensor,
    offs: Tensor | None,
    get_compiled: GetCompiled,
    *,
    row_tiles: int | None = None,
    activation: str = "none",
    limit: float | None = None,
) -> Launch:
    """codes, block_scale = quantize_nvfp4(act(x), global_scale, offs), every byte of both written.

    x: (R, K), with a gated activation (R, 2 K), with ``why_no_rows(x)`` None. global_scale: fp32 ()
    or (1,), with offs (E,), else (R,) or (R, 1), contiguous. offs: (E,) int32 or None.
    row_tiles: of swizzled block scales, None where they are linear.
    get_compiled: from a ``QuantizeConfig`` to what ``build`` returns for it.

    Returns launch(x, global_scale, offs, codes (R, K / 2) uint8, block_scale), the latter one byte
    elements, rank 2 or with row_tiles rank 4; both contiguous.
    """
    check_num_experts(offs)
    reason = why_no_rows(x)
    if reason is not None:
        raise ValueError(f"x: {reason}")
    swizzled = row_tiles is not None
    scale = _scale_of(global_scale, offs)
    config = QuantizeConfig(x.dtype, scale, swizzled, offs is not None, activation, limit)
    cols = nvfp4.num_blocks(x.shape[1] // (2 if is_gated(activation) else 1))
    multiprocessors = num_multiprocessors(x.device)
    grid = choose_grid(config, x.shape[0], cols, row_tiles or 0, multiprocessors)
    compiled = get_compiled(config)

    def launch(
        x: Tensor, global_scale: Tensor, offs: Tensor | None, codes: Tensor, block_scale: Tensor
    ) -> None:
        sf = tiles_view(block_scale) if swizzled else block_scale.view(torch.uint8)
        compiled(x, global_scale.ravel(), offs, None, codes, sf, *grid)

    return launch


def prepare_round(
    x: Tensor,
    global_scale: Tensor,
    offs: Tensor | None,
    token_of_row: Tensor | None,
    get_compiled: GetCompiled,
) -> Launch:
    """out = round_nvfp4(x, global_scale, offs, token_of_row), every byte written.

    As ``prepare_quantize``, but for token_of_row: (R,) int32, contiguous, or None. The global scale
    is of the rows of out.

    Returns launch(x, global_scale, offs, token_of_row, out (R, K) bf16, contiguous).
    """
    check_num_experts(offs)
    reason = why_no_rows(x)
    if reason is not None:
        raise ValueError(f"x: {reason}")
    config = QuantizeConfig(
        x.dtype,
        _scale_of(global_scale, offs),
        swizzled=False,
        ragged=offs is not None,
        values=True,
        gather=token_of_row is not None,
    )
    num_rows = x.shape[0] if token_of_row is None else token_of_row.shape[0]
    cols = nvfp4.num_blocks(x.shape[1])
    grid = choose_grid(config, num_rows, cols, 0, num_multiprocessors(x.device))
    compiled = get_compiled(config)

    def launch(
        x: Tensor,
        global_scale: Tensor,
        offs: Tensor | None,
        token_of_row: Tensor | None,
        out: Tensor,
    ) -> None:
        compiled(x, global_scale.ravel(), offs, token_of_row, out, None, *grid)

    return launch
