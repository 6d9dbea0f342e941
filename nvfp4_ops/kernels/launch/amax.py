"""Launches of ``amax``: the global scales of rows, or of a whole tensor."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nvfp4_ops import format as nvfp4
from nvfp4_ops.kernels.launch.tensors import VECTOR_BYTES, WARP, GetCompiled, Launch
from nvfp4_ops.kernels.limits import num_multiprocessors

# 16-byte loads that a lane has in flight.
VECTORS_PER_LANE = 4

# Parts of a tensor, each with a maximum of its own: CTAs a multiprocessor.
PARTS_PER_SM = 8


@dataclass(frozen=True)
class AmaxConfig:
    """of: "row" writes the global scale of each row, "part" the largest magnitude of each CTA's
    share of all rows. row_warps: warps that share a row, a power of two.
    """

    dtype: torch.dtype
    of: Literal["row", "part"]
    row_warps: int = 1
    threads: int = 256


def choose_row_warps(num_rows: int, row_bytes: int, multiprocessors: int, warps: int = 8) -> int:
    """One warp a row where rows are short or many, else the CTA's: a few rows are to be spread.

    >>> [choose_row_warps(rows, 14336, 132) for rows in (1, 1000, 65536)]
    [8, 8, 1]
    """
    lane_bytes = VECTORS_PER_LANE * VECTOR_BYTES * WARP
    many = num_rows >= 4 * warps * multiprocessors
    return 1 if many or row_bytes <= lane_bytes else warps


def prepare_row_scales(
    num_rows: int, k: int, dtype: torch.dtype, device: torch.device, get_compiled: GetCompiled
) -> Launch:
    """scale = global_scale(x, per_token=True) of x (R, K), R and K positive.

    get_compiled: from an ``AmaxConfig`` to what ``build`` returns for it.

    Returns launch(x, scale), ``why_no_rows(x)`` None, scale fp32, R elements, contiguous.
    """
    row_warps = choose_row_warps(num_rows, k * dtype.itemsize, num_multiprocessors(device))
    config = AmaxConfig(dtype, "row", row_warps)
    num_ctas = nvfp4.ceil_div(num_rows, config.threads // WARP // row_warps)
    compiled = get_compiled(config)

    def launch(x: Tensor, scale: Tensor) -> None:
        compiled(x, scale.ravel(), num_ctas)

    return launch


def prepare_tensor_scale(
    num_elements: int, dtype: torch.dtype, device: torch.device, get_compiled: GetCompiled
) -> Launch:
    """scale = global_scale(x): the CTAs' maxima, then the scale of these as of one row.

    num_elements: of x, a multiple of 16, at least 16. get_compiled: as above.

    Returns launch(x, scale), x contiguous and 16-byte aligned, scale fp32 ().
    """
    config = AmaxConfig(dtype, "part")
    bytes_per_cta = config.threads * VECTORS_PER_LANE * VECTOR_BYTES
    num_parts = min(
        PARTS_PER_SM * num_multiprocessors(device),
        nvfp4.ceil_div(num_elements * dtype.itemsize, bytes_per_cta),
    )
    # The parts are read as one row of whole blocks.
    num_parts = nvfp4.ceil_div(num_parts, nvfp4.BLOCK_SIZE) * nvfp4.BLOCK_SIZE
    compiled = get_compiled(config)
    scale_of_parts = prepare_row_scales(1, num_parts, torch.float32, device, get_compiled)

    def launch(x: Tensor, scale: Tensor) -> None:
        parts = x.new_empty(1, num_parts, dtype=torch.float32)
        compiled(x.view(1, -1), parts.view(-1), num_parts)
        scale_of_parts(parts, scale)

    return launch
