"""prepack_weight: canonical weights to the layout that a GPU's grouped mm reads."""

import torch
from torch import Tensor

from nvfp4_ops import format as nvfp4
from nvfp4_ops import kernels
from nvfp4_ops.registry import (
    check_dtype,
    check_multiple,
    check_rank,
    check_same_device,
    check_shape,
    register,
)


def _check(codes: Tensor, block_scale: Tensor, gated: bool) -> None:
    check_rank("codes", codes, 3, "(E, N, K/2)")
    check_dtype("codes", codes, torch.uint8)
    num_experts, n, packed_k = codes.shape
    if gated:
        check_multiple("codes", "N, F gate and F up rows,", n, 2 * nvfp4.BLOCK_SIZE)
    else:
        check_multiple("codes", "N", n, nvfp4.BLOCK_SIZE)
    check_multiple("codes", "K/2", packed_k, nvfp4.packed_size(nvfp4.BLOCK_SIZE))
    check_dtype("block_scale", block_scale, torch.float8_e4m3fn)
    linear = (num_experts, n, nvfp4.num_blocks(packed_k * nvfp4.CODES_PER_BYTE))
    check_shape("block_scale", block_scale, linear, "the linear scales (E, N, K/16)")
    check_same_device("block_scale", block_scale, codes.device)


def _fake(codes: Tensor, block_scale: Tensor, gated: bool = False) -> Tensor:
    _check(codes, block_scale, gated)
    num_experts, n, packed_k = codes.shape
    k = packed_k * nvfp4.CODES_PER_BYTE
    return codes.new_empty(kernels.prepacked_shape(num_experts, n, k, gated=gated))


def _kernel(codes: Tensor, block_scale: Tensor, gated: bool = False) -> Tensor:
    _check(codes, block_scale, gated)
    return kernels.prepack(codes, block_scale, gated=gated)


_op = register(
    "prepack_weight(Tensor codes, Tensor block_scale, bool gated=False) -> Tensor",
    fake=_fake,
    kernel=_kernel,
)


def prepack_weight(codes: Tensor, block_scale: Tensor, *, gated: bool = False) -> Tensor:
    """Rearrange weights into blocks that Hopper's grouped mm loads and decodes without a shuffle.

    Still 4.5 bits a weight, N padded to a multiple of 64 and K to one of 128. Values are kept
    exactly; of the bytes, only codes under a zero block scale and the split of a sign between code
    and (negative) scale are not. Offline work: a Hopper GPU does it about as fast as it copies,
    others expert by expert. The layout may be another in another version of this package, so files
    are to hold canonical weights; exported programs know which one theirs is.

    Args:
        codes: (E, N, K / 2) uint8; N and K multiples of 16.
        block_scale: (E, N, K / 16) float8_e4m3fn, linear.
        gated: the rows are F gate rows, then F up rows, F a multiple of 16, for a gated activation:
            pairs of them come to lie together, each 32 gate rows with their 32 up rows.

    Returns:
        (E, N' / 64, K' / 128, 4608) uint8, or with ``gated`` (E, F' / 64, 2, K' / 128, 4608), to be
        passed as ``b`` of ``grouped_scaled_mm`` with ``sf_b`` None and ``num_columns`` N.

    Raises:
        TypeError: another dtype. ValueError: another shape.
    """
    return _op(codes, block_scale, gated)
