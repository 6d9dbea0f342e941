"""dequantize_nvfp4: codes and scales back to floating point, for inspection and tests."""

import torch
from torch import Tensor

from nvfp4_ops import format as nvfp4
from nvfp4_ops import kernels, reference
from nvfp4_ops.ops.quantize import FLOAT_DTYPES, check_row_scale
from nvfp4_ops.plans import Run
from nvfp4_ops.registry import (
    check_dtype,
    check_multiple,
    check_offs,
    check_same_device,
    check_shape,
    register,
    shape_text,
)


def _check(
    codes: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    offs: Tensor | None,
    dtype: torch.dtype | None,
) -> None:
    if codes.ndim not in (2, 3):
        raise ValueError(f"codes: must be (R, K/2) or (E, N, K/2), got {shape_text(codes)}")
    check_dtype("codes", codes, torch.uint8)
    check_multiple("codes", "K/2", codes.shape[-1], nvfp4.packed_size(nvfp4.BLOCK_SIZE))
    check_dtype("block_scale", block_scale, torch.float8_e4m3fn)
    linear = (*codes.shape[:-1], nvfp4.num_blocks(codes.shape[-1] * nvfp4.CODES_PER_BYTE))
    if offs is not None:
        if codes.ndim == 3:
            raise ValueError("offs: goes with codes (R, K/2) only, got (E, N, K/2)")
        check_offs(offs, codes.shape[0])
    if block_scale.ndim == 4:
        num_experts = None if offs is None else offs.shape[0]
        swizzled = nvfp4.swizzled_shape(linear, num_experts)
        check_shape("block_scale", block_scale, swizzled, "swizzled")
    else:
        check_shape("block_scale", block_scale, linear, "linear, codes.shape[:-1] + (K/16,)")
    if codes.ndim == 2:
        check_row_scale("global_scale", global_scale, offs, codes.shape[0])
    else:
        check_dtype("global_scale", global_scale, torch.float32)
        if global_scale.ndim > 0:
            check_shape("global_scale", global_scale, (codes.shape[0],), "() or (E,)")
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype: must be one of {FLOAT_DTYPES}, got {dtype}")
    for name, tensor in (
        ("block_scale", block_scale),
        ("global_scale", global_scale),
        ("offs", offs),
    ):
        check_same_device(name, tensor, codes.device)


def _empty(codes: Tensor, dtype: torch.dtype | None) -> Tensor:
    *lead, packed_k = codes.shape
    k = packed_k * nvfp4.CODES_PER_BYTE
    return codes.new_empty(*lead, k, dtype=dtype or torch.float32)


def _fake(
    codes: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    offs: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    _check(codes, block_scale, global_scale, offs, dtype)
    return _empty(codes, dtype)


def _plan(
    codes: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    offs: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Run | None:
    _check(codes, block_scale, global_scale, offs, dtype)
    if not kernels.has_elementwise(codes, offs):
        return None
    launch = kernels.prepare_dequantize(
        codes, block_scale, global_scale, offs, dtype or torch.float32
    )

    def run(
        codes: Tensor,
        block_scale: Tensor,
        global_scale: Tensor,
        offs: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        out = _empty(codes, dtype)
        launch(codes, block_scale, global_scale, offs, out)
        return out

    return run


def _reference(
    codes: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    offs: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    dtype = dtype or torch.float32
    return reference.dequantize_nvfp4(codes, block_scale, global_scale, offs, dtype=dtype)


_op = register(
    "dequantize_nvfp4(Tensor codes, Tensor block_scale, Tensor global_scale, Tensor? offs=None,"
    " ScalarType? dtype=None) -> Tensor",
    fake=_fake,
    kernel=_reference,
    plan=_plan,
)


def dequantize_nvfp4(
    codes: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    offs: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Decode NVFP4: e2m1(code) * block_scale * global_scale in fp32, then cast to ``dtype``.

    The first product is exact in fp32, so an fp32 result carries a single rounding.

    Args:
        codes: (R, K / 2) or, for weights, (E, N, K / 2) uint8.
        block_scale: float8_e4m3fn, linear (R, K / 16) or (E, N, K / 16), or swizzled (rank 4).
        global_scale: fp32 decode scale: () or, for activations, (R,), (R, 1) or (E,) with
            ``offs``; for weights (E,).
        offs: (E,) int32 end row of each expert, for activations. Rows from ``offs[-1]`` on are
            zero.
        dtype: bf16, fp16 or fp32.

    Returns:
        (R, K) or (E, N, K) of ``dtype``. A NaN block scale gives NaN.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape is not one of the above.
    """
    return _op(codes, block_scale, global_scale, offs, dtype)
