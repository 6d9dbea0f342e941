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

# Four lanes side by side read 64 contiguous bytes of a row, and eight lanes below each other write
# 128 contiguous bytes of a tile: whole sectors on both sides.
LANES_ACROSS = 4


@dataclass(frozen=True)
class SwizzleConfig:
    direction: Literal["swizzle", "unswizzle"]
    ragged: bool
    row_align: Literal[1, 4, 16]
    """Bytes that divide the length and the address of each linear row: the widest access."""
    threads: int = 128


def choose_threads(num_cols: int) -> int:
    """Four warps for each 64 columns, up to four times: a CTA has whole rows of up to 256 bytes.

    Those of a row tile are contiguous on both sides. CTAs of a part of them each come back to the
    same pages of memory when all row tiles are through.

    >>> [choose_threads(num_cols) for num_cols in (1, 64, 65, 256, 448)]
    [128, 128, 512, 512, 512]
    """
    return 128 if num_cols <= LANES_ACROSS * VECTOR_BYTES else 512


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
    rows_per_expert, num_columns = linear.shape[-2:]
    threads = choose_threads(num_columns)
    config = SwizzleConfig(direction, offs is not None, row_alignment(linear), threads)
    compiled = get_compiled(config)

    def launch(linear: Tensor, swizzled: Tensor, offs: Tensor | None) -> None:
        rows = linear.view(torch.uint8)
        rows = rows.view(-1, num_columns) if rows.ndim == 3 else rows
        compiled(rows, tiles_view(swizzled), offs, rows_per_expert)

    return launch
