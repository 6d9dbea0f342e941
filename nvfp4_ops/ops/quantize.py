"""quantize_nvfp4 and its global scale: bf16 rows to 4-bit codes and block scales."""

import torch
from torch import Tensor

from nvfp4_ops import format as nvfp4
from nvfp4_ops import kernels, reference
from nvfp4_ops.activation import Activation
from nvfp4_ops.plans import Run
from nvfp4_ops.registry import (
    check_dtype,
    check_multiple,
    check_offs,
    check_rank,
    check_same_device,
    check_value,
    register,
    shape_text,
)

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_row_scale(name: str, scale: Tensor, offs: Tensor | None, num_rows: int) -> None:
    """fp32 () per tensor, (E,) per expert with offs, (R, 1) per row, (R,) per row without offs."""
    check_dtype(name, scale, torch.float32)
    if scale.ndim == 0:
        return
    if scale.ndim == 1 and offs is not None:
        ok, rule = scale.shape[0] == offs.shape[0], "() or (E,) or (R, 1)"
    else:
        ok, rule = scale.ndim <= 2 and scale.shape[0] == num_rows, "() or (R,) or (R, 1)"
        if scale.ndim == 2:
            ok, rule = ok and scale.shape[1] == 1, "() or (E,) with offs or (R, 1)"
    check_value(
        ok,
        lambda: (
            f"{name}: must be {rule} with R = {num_rows}"
            f"{'' if offs is None else f', E = {offs.shape[0]}'}, got {shape_text(scale)}"
        ),
    )


def _check(x: Tensor, global_scale: Tensor, offs: Tensor | None) -> None:
    check_rank("x", x, 2, "(R, K)")
    check_dtype("x", x, *FLOAT_DTYPES)
    check_multiple("x", "K", x.shape[1], nvfp4.BLOCK_SIZE)
    if offs is not None:
        check_offs(offs, x.shape[0])
    check_row_scale("global_scale", global_scale, offs, x.shape[0])
    for name, tensor in (("global_scale", global_scale), ("offs", offs)):
        check_same_device(name, tensor, x.device)


def quantized_shapes(
    rows: int, k: int, offs: Tensor | None, swizzled: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of codes and block scales."""
    linear = (rows, nvfp4.num_blocks(k))
    num_experts = None if offs is None else offs.shape[0]
    return (
        (rows, nvfp4.packed_size(k)),
        nvfp4.swizzled_shape(linear, num_experts) if swizzled else linear,
    )


def _fake(
    x: Tensor, global_scale: Tensor, offs: Tensor | None = None, swizzled: bool = False
) -> tuple[Tensor, Tensor]:
    _check(x, global_scale, offs)
    return empty_quantized(x, *quantized_shapes(x.shape[0], x.shape[1], offs, swizzled))


def empty_quantized(
    x: Tensor, codes_shape: tuple[int, ...], sf_shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Codes and block scales, on the device of x."""
    return (
        x.new_empty(*codes_shape, dtype=torch.uint8),
        x.new_empty(*sf_shape, dtype=torch.float8_e4m3fn),
    )


def _plan(
    x: Tensor, global_scale: Tensor, offs: Tensor | None = None, swizzled: bool = False
) -> Run | None:
    _check(x, global_scale, offs)
    return plan_quantize(x, global_scale, offs, Activation(), swizzled)


def plan_quantize(
    x: Tensor, global_scale: Tensor, offs: Tensor | None, act: Activation, swizzled: bool
) -> Run | None:
    """What quantizes the activated rows of x, or None where the reference must; checks nothing."""
    if not kernels.has_elementwise(x, offs):
        return None
    k = x.shape[1] // 2 if act.gated else x.shape[1]
    shapes = quantized_shapes(x.shape[0], k, offs, swizzled)
    launch = kernels.prepare_quantize(
        x,
        global_scale,
        offs,
        row_tiles=shapes[1][0] if swizzled else None,
        activation=act.name,
        limit=act.limit,
    )

    def run(
        x: Tensor, global_scale: Tensor, offs: Tensor | None = None, *_: object
    ) -> tuple[Tensor, Tensor]:
        codes, block_scale = empty_quantized(x, *shapes)
        launch(x, global_scale, offs, codes, block_scale)
        return codes, block_scale

    return run


_op = register(
    "quantize_nvfp4(Tensor x, Tensor global_scale, Tensor? offs=None, bool swizzled=False)"
    " -> (Tensor, Tensor)",
    fake=_fake,
    kernel=reference.quantize_nvfp4,
    plan=_plan,
)


def quantize_nvfp4(
    x: Tensor, global_scale: Tensor, offs: Tensor | None = None, *, swizzled: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantize rows of activations to NVFP4.

    x[r, k] ~ e2m1(codes[r, k]) * block_scale[r, k // 16] * global_scale

    The rule is Transformer Engine's, bit for bit, each step one fp32 operation, with
    G = min(1 / global_scale, FLT_MAX) and amax over the 16 elements of a block:

        block_scale = e4m3(min(amax * (G * fl(1/6)), 448))            to nearest, ties to even
        inv_scale   = min(1 / (block_scale * (1 / G)), FLT_MAX)       0 where block_scale is 0
        code        = e2m1(x * inv_scale)                             to nearest, ties to even

    =====================  =============================================================
    zero block             block scale 0, codes 0 (8 for -0.0)
    block scale underflow  block scale 0, codes 0 or 8. Transformer Engine saturates these
                           codes; both decode to zero
    -0.0, tiny negatives   code 8: the sign is kept
    too large              block scale 448, codes saturate at +-6
    Inf                    saturates: block scale 448, code 7 or 15; finite neighbours ~ 0
    NaN                    block scale NaN (byte 0x7F), all codes of the block 7; no other
                           block changes
    =====================  =============================================================

    Args:
        x: (R, K) bf16, fp16 or fp32, any strides; K a multiple of 16, R may be 0.
        global_scale: fp32 decode scale, positive: () for all rows, (R,) or (R, 1) per row (as
            ``nvfp4_ops.global_scale`` returns it), or with ``offs`` (E,) per expert or (R, 1)
            per row. Its values are not checked: that would stall the GPU.
        offs: (E,) int32 end row of each expert (rows per expert [2, 0, 3] -> [2, 2, 5]). Rows
            from ``offs[-1]`` on belong to no expert: their codes and scales are zero bytes.
        swizzled: write the block scales in the 128x4 layout of ``swizzle_sf``, each expert on a
            tile of its own where ``offs`` is given.

    Returns:
        codes: (R, K / 2) uint8, even k in the low nibble.
        block_scale: (R, K / 16) float8_e4m3fn, or with ``swizzled`` rank 4 as ``swizzle_sf``.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape is not one of the above, or (on the CPU) offs is not non-decreasing.
    """
    return _op(x, global_scale, offs, swizzled)


def _check_global_scale(x: Tensor, per_token: bool) -> None:
    check_dtype("x", x, *FLOAT_DTYPES)
    if per_token:
        check_rank("x", x, 2, "(R, K)")
        check_value(x.shape[1] > 0, lambda: "x: K must be positive, got 0")


def empty_scale(x: Tensor, per_token: bool) -> Tensor:
    if per_token:
        return x.new_empty(x.shape[0], 1, dtype=torch.float32)
    return x.new_empty((), dtype=torch.float32)


def _fake_global_scale(x: Tensor, per_token: bool = False) -> Tensor:
    _check_global_scale(x, per_token)
    return empty_scale(x, per_token)


def _plan_global_scale(x: Tensor, per_token: bool = False) -> Run | None:
    _check_global_scale(x, per_token)
    if not x.is_cuda or kernels.why_no_global_scale(x, per_token) is not None:
        return None
    launch = kernels.prepare_global_scale(x, per_token=per_token)

    def run(x: Tensor, per_token: bool = False) -> Tensor:
        scale = empty_scale(x, per_token)
        launch(x, scale)
        return scale

    return run


_op_global_scale = register(
    "global_scale(Tensor x, bool per_token=False) -> Tensor",
    fake=_fake_global_scale,
    kernel=reference.global_scale,
    plan=_plan_global_scale,
)


def global_scale(x: Tensor, per_token: bool = False) -> Tensor:
    """Dynamic global scale of activations: amax / (6 * 448), a decode scale.

    An amax of zero or Inf gives 1.0 (Transformer Engine's convention), and the scale is at least
    the smallest normal fp32 so that its reciprocal is finite. NaN gives NaN: of its own row with
    ``per_token``, of the whole tensor without.

    Args:
        x: (..., K) bf16, fp16 or fp32; with ``per_token`` (R, K).
        per_token: one scale per row rather than one for all. The scale of a row then does not
            depend on the other rows of the batch.

    Returns:
        fp32 () or, with ``per_token``, (R, 1).

    Raises:
        TypeError: x has another dtype.
        ValueError: ``per_token`` and x is not a matrix.
    """
    return _op_global_scale(x, per_token)
