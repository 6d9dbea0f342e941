"""What the launches share: units of memory, and tensors as the kernels take them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nvfp4_ops import format as nvfp4
from nvfp4_ops.kernels.limits import MAX_EXPERTS

WARP = 32
WORD_BYTES, VECTOR_BYTES = 4, 16
CODE_BYTES = nvfp4.packed_size(nvfp4.BLOCK_SIZE)
"""Bytes of a block's codes."""
VALUE_BYTES = nvfp4.BLOCK_SIZE * torch.bfloat16.itemsize
"""Bytes of a block's values."""
# Rows of a tile that share a line: one in each group of 32.
ROW_GROUPS = nvfp4.SWIZZLE_LINE_BYTES // nvfp4.SWIZZLE_TILE_COLS
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

GetCompiled = Callable[[Any], Callable[..., None]]
"""From a config to its compiled kernel; compiles or looks it up."""
Launch = Callable[..., None]
"""Takes tensors and launches on the current stream."""


def is_gated(activation: str) -> bool:
    """Whether a fused activation takes an up value."""
    return activation.endswith("_mul") or activation == "swiglu_oai"


def why_no_rows(x: Tensor) -> str | None:
    """Why the kernels can not read the rows of x (R, K), or None where they can."""
    if x.shape[1] % nvfp4.BLOCK_SIZE:
        return f"K must be a multiple of {nvfp4.BLOCK_SIZE}, got {x.shape[1]}"
    if x.stride(1) != 1:
        return "elements of a row must be contiguous"
    row_stride = x.stride(0) if x.shape[0] > 1 else 0
    if x.data_ptr() % VECTOR_BYTES or row_stride * x.itemsize % VECTOR_BYTES:
        return f"rows must start at multiples of {VECTOR_BYTES} bytes"
    return None


def tiles_view(swizzled: Tensor) -> Tensor:
    """(row tiles, column tiles, 32, 16) scales as (row tiles, column tiles, 512) bytes."""
    row_tiles, col_tiles, *_ = swizzled.shape
    return swizzled.view(torch.uint8).view(row_tiles, col_tiles, nvfp4.SWIZZLE_TILE_BYTES)


def check_num_experts(offs: Tensor | None) -> None:
    if offs is not None and offs.shape[0] > MAX_EXPERTS:
        raise ValueError(f"offs: the kernel takes at most {MAX_EXPERTS}, got {offs.shape[0]}")
