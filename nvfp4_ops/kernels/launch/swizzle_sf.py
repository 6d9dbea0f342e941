"""Launches of ``swizzle_sf``, in both directions."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nvfp4_ops.kernels.launch.tensors import (
    VECTOR_BYTES,
    WORD_BYTES,
    GetCompiled,
    Launch,
    check_num_experts,
    tiles_view,
)


@dataclass(frozen=True)
class SwizzleConfig:
    direction: Literal["swizzle", "unswizzle"]
    ragged: bool
    row_align: Literal[1, 4, 16]
    """Bytes that divide the length and the address of each linear row: the widest access."""
    threads: int = 128


def row_alignment(linear: Tensor) -> int:
    """Widest of 16, 4, 1 bytes that divides the length and the address of every row."""
    for width in (VECTOR_BYTES, WORD_BYTES):
        if linear.shape[-1] % width == 0 and linear.data_ptr() % width == 0:
            return width
    return 1


def prepare_swizzle(
    direction: Literal["swizzle", "unswizzle"],
    linear: Tensor,
    offs: Tensor | None,
    get_compiled: GetCompiled,
) -> Launch:
    """swizzled = swizzle_sf(linear, offs) or the inverse, every byte of the result written.

    linear: (R, C) or (E, N, C) float8_e4m3fn or uint8, contiguous, not empty. offs: (E,) int32 or
    None. get_compiled: from a ``SwizzleConfig`` to what ``build`` returns for it.

    Returns launch(linear, swizzled, offs), swizzled (row tiles, ceil(C / 4), 32, 16) of one byte
    elements, contiguous.
    """
    check_num_experts(offs)
    config = SwizzleConfig(direction, offs is not None, row_alignment(linear))
    compiled = get_compiled(config)
    rows_per_expert, num_columns = linear.shape[-2:]

    def launch(linear: Tensor, swizzled: Tensor, offs: Tensor | None) -> None:
        rows = linear.view(torch.uint8)
        rows = rows.view(-1, num_columns) if rows.ndim == 3 else rows
        compiled(rows, tiles_view(swizzled), offs, rows_per_expert)

    return launch
