"""Activations inside a kernel: one fp32 gate (and up) value to one fp32 value.

The meaning is ``nvfp4_ops.activation``'s, clamps, Inf and NaN included. Portable; for epilogues and
for the fused quantization, which both trace ``apply``.

``ex2.approx`` and ``rcp.approx`` are within 2 and 1 units in the last place. What adds to that is
the rounded argument of ``ex2``: with z the argument of the sigmoid, a result is within about
6 + 2 |z| units of the exact one where z < 0, within 6 elsewhere. Sigmoids below 2^-126 are zero.
"""

import math
from typing import Any

import cutlass.cute as cute
from cutlass import Float32

from nvfp4_ops.kernels.launch.tensors import is_gated as is_gated

NAMES = (
    "none",
    "silu",
    "silu_mul",
    "gelu_tanh",
    "gelu_tanh_mul",
    "relu2",
    "relu2_mul",
    "swiglu_oai",
)
SWIGLU_OAI_ALPHA = 1.702
GELU_TANH_CUBIC = 0.044715
_LOG2_E = math.log2(math.e)


class DeviceOps:
    """What ``apply`` is made of besides products and sums; tests run it on the host with others."""

    @staticmethod
    def exp2(value: Float32) -> Float32:
        """2^value; subnormal results are zero."""
        return _ptx("ex2.approx.ftz.f32 {$w0}, {$r0};", value)

    @staticmethod
    def reciprocal(value: Float32) -> Float32:
        return _ptx("rcp.approx.ftz.f32 {$w0}, {$r0};", value)

    @staticmethod
    def minimum(value: Float32, limit: float) -> Float32:
        """NaN stays NaN, as in ``torch.clamp``."""
        return cute.arch.fmin(value, limit, nan=True)

    @staticmethod
    def maximum(value: Float32, limit: float) -> Float32:
        return cute.arch.fmax(value, limit, nan=True)


def _ptx(code: str, value: Float32) -> Float32:
    result: Float32 = cute.arch.inline_ptx(code, write_only_types=[Float32], read_only_args=[value])
    return result


def apply(
    name: str, limit: float | None, gate: Any, up: Any, ops: type[DeviceOps] = DeviceOps
) -> Any:
    """act(gate), times up or up + 1 where ``is_gated(name)``; called while a kernel is traced.

    name: one of ``NAMES``. limit: clamps the gate from above and up on both sides, or None.
    gate, up: fp32; up is None where the activation is not gated.
    """
    if up is not None and limit is not None:
        gate = ops.minimum(gate, limit)
        up = ops.maximum(ops.minimum(up, limit), -limit)
    if name == "none":
        return gate
    if name == "swiglu_oai":
        return gate * _sigmoid_of_log2(gate * (-SWIGLU_OAI_ALPHA * _LOG2_E), ops) * (up + 1.0)
    if name.startswith("silu"):
        activated = gate * _sigmoid_of_log2(gate * -_LOG2_E, ops)
    elif name.startswith("gelu_tanh"):
        # (1 + tanh(z)) / 2 is the sigmoid of 2 z, without the cancellation near z = -1.
        scale = -2.0 * math.sqrt(2.0 / math.pi) * _LOG2_E
        inner = gate * (gate * gate * (scale * GELU_TANH_CUBIC) + scale)
        activated = gate * _sigmoid_of_log2(inner, ops)
    else:
        positive = ops.maximum(gate, 0.0)
        activated = positive * positive
    return activated if up is None else activated * up


def _sigmoid_of_log2(minus_z_log2_e: Any, ops: type[DeviceOps]) -> Any:
    """1 / (1 + exp(-z)) from -z log2(e): 0 and 1 at the infinities."""
    return ops.reciprocal(ops.exp2(minus_z_log2_e) + 1.0)
