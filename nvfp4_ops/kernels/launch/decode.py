"""Launch of ``decode``."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nvfp4_ops import format as nvfp4
from nvfp4_ops.kernels.launch.tensors import (
    ROW_GROUPS,
    VECTOR_BYTES,
    WARP,
    GetCompiled,
    Launch,
    check_num_experts,
    tiles_view,
)

# 16-byte stores that a lane prepares at once.
VECTORS_PER_LANE = 4

THREADS = 256

WARPS = THREADS // WARP

# Swizzled, a CTA has the eight rows of two lines next to each other: they share every sector.
LINES_PER_UNIT = WARPS // ROW_GROUPS

UNITS_PER_TILE = nvfp4.SWIZZLE_LINES // LINES_PER_UNIT


@dataclass(frozen=True)
class DecodeConfig:
    """dtype: of the output. scale: "none" is 1, "expert" one for each expert's rows.

    ragged: experts' rows end at ``offs``; else each has as many.
    """

    dtype: torch.dtype
    scale: Literal["none", "tensor", "row", "expert"]
    swizzled: bool
    ragged: bool


def prepare_decode(
    codes: Tensor,
    block_scale: Tensor,
    global_scale: Tensor | None,
    offs: Tensor | None,
    dtype: torch.dtype,
    get_compiled: GetCompiled,
) -> Launch:
    """out = dequantize_nvfp4(codes, block_scale, global_scale, offs), every byte of it written.

    codes: (R, K / 2) or (E, N, K / 2) uint8, contiguous, at a multiple of 8 bytes, not empty.
    block_scale: one byte elements, contiguous, rank 4 where swizzled. global_scale: fp32,
    contiguous: (), with offs or rank 3 codes (E,), else (R,) or (R, 1); None is 1, with dtype bf16.
    offs: (E,) int32 or None.
    get_compiled: from a ``DecodeConfig`` to what ``build`` returns for it.

    Returns launch(codes, block_scale, global_scale, offs, out), out (R, K) or (E, N, K) of dtype,
    contiguous.
    """
    check_num_experts(offs)
    scale: Literal["none", "tensor", "row", "expert"] = "row"
    if global_scale is None:
        scale = "none"
    elif global_scale.ndim == 0:
        scale = "tensor"
    elif codes.ndim == 3 or (global_scale.ndim == 1 and offs is not None):
        scale = "expert"
    swizzled = block_scale.ndim == 4
    config = DecodeConfig(dtype, scale, swizzled, offs is not None)
    *lead, packed_k = codes.shape
    num_rows = codes.numel() // packed_k
    if swizzled:
        grid_rows = block_scale.shape[0] * UNITS_PER_TILE
    else:
        grid_rows = nvfp4.ceil_div(num_rows, WARPS)
    k = packed_k * nvfp4.CODES_PER_BYTE
    grid_steps = nvfp4.ceil_div(k * dtype.itemsize, WARP * VECTORS_PER_LANE * VECTOR_BYTES)
    compiled = get_compiled(config)
    rows_per_expert = lead[-1]

    def launch(
        codes: Tensor,
        block_scale: Tensor,
        global_scale: Tensor | None,
        offs: Tensor | None,
        out: Tensor,
    ) -> None:
        if swizzled:
            sf = tiles_view(block_scale)
        else:
            sf = block_scale.view(torch.uint8)
        if codes.ndim == 3:
            codes, out = codes.view(num_rows, packed_k), out.view(num_rows, k)
            sf = sf if swizzled else sf.view(num_rows, -1)
        scale = None if global_scale is None else global_scale.view(-1)
        compiled(codes, sf, scale, offs, out, rows_per_expert, grid_rows, grid_steps)

    return launch
