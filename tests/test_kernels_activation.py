"""The activations that kernels trace, run here on torch tensors in place of registers."""

import os

import pytest
import torch
from torch import Tensor

from nvfp4_ops import Activation
from nvfp4_ops import activation as activations

if not torch.cuda.is_available():
    os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")
pytest.importorskip("cutlass")

from nvfp4_ops.kernels import activation as kernel

ACTIVATIONS = [
    *(Activation(name) for name in activations.ACTIVATION_NAMES),
    Activation("silu_mul", 7.0),
    Activation("swiglu_oai", 2.0),
]
every_activation = pytest.mark.parametrize(
    "activation", ACTIVATIONS, ids=lambda a: f"{a.name}-{a.limit}"
)
UNIT = 2.0**-23


class TorchOps:
    """``DeviceOps`` on tensors; subnormal results are flushed as on the device."""

    @staticmethod
    def _flush(value: Tensor) -> Tensor:
        return torch.where(value.abs() < 2.0**-126, 0.0, value)

    @classmethod
    def exp2(cls, value: Tensor) -> Tensor:
        return cls._flush(value.exp2())

    @classmethod
    def reciprocal(cls, value: Tensor) -> Tensor:
        return cls._flush(value.reciprocal())

    @staticmethod
    def minimum(value: Tensor, limit: float) -> Tensor:
        return value.clamp(max=limit)

    @staticmethod
    def maximum(value: Tensor, limit: float) -> Tensor:
        return value.clamp(min=limit)


def pairs(*specials: float, end: float = 40.0) -> tuple[Tensor, Tensor]:
    """All pairs of points up to ``end``, around zero and the limits, and of ``specials``."""
    more = torch.tensor([0.0, -0.0, 2.0, -2.0, 7.0, -7.0, *specials])
    points = torch.cat([torch.linspace(-end, end, 641), more])
    gate, up = torch.meshgrid(points, points[::7], indexing="ij")
    return gate.reshape(-1), up.reshape(-1)


def expected(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    return activations.apply(activation, torch.cat([gate, up], -1) if activation.gated else gate)


def actual(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    up_or_none = up if kernel.is_gated(activation.name) else None
    result = kernel.apply(activation.name, activation.limit, gate, up_or_none, TorchOps)
    assert isinstance(result, Tensor)
    return result


def test_activation_names_and_constants_are_those_of_the_package() -> None:
    assert kernel.NAMES == activations.ACTIVATION_NAMES
    assert kernel.SWIGLU_OAI_ALPHA == activations.SWIGLU_OAI_ALPHA
    assert kernel.GELU_TANH_CUBIC == activations.GELU_TANH_CUBIC
    for name in kernel.NAMES:
        assert kernel.is_gated(name) == Activation(name).gated


@every_activation
def test_activation_has_the_values_of_the_package(activation: Activation) -> None:
    gate, up = (x.double() for x in pairs(1e4, -1e4))
    torch.testing.assert_close(
        actual(activation, gate, up), expected(activation, gate, up), rtol=1e-13, atol=1e-13
    )


@every_activation
def test_activation_has_the_specials_of_the_package(activation: Activation) -> None:
    inf, huge = float("inf"), 1e30
    # Beyond, tanh in fp32 is -1 for the package: a negative number times up becomes a zero.
    gate, up = pairs(inf, -inf, float("nan"), huge, -huge, end=3.0)
    gate, up = gate[gate != -7.0], up[gate != -7.0]
    # Only where something is not finite: the values are compared above.
    special = ~(gate.isfinite() & up.isfinite()) | (gate.abs() == huge) | (up.abs() == huge)
    gate, up = gate[special], up[special]
    torch.testing.assert_close(
        actual(activation, gate, up),
        expected(activation, gate, up),
        rtol=1e-4,
        atol=1e-4,
        equal_nan=True,
    )


@every_activation
def test_activation_in_fp32_is_within_the_stated_units(activation: Activation) -> None:
    gate, up = pairs()
    exact = actual(activation, gate.double(), up.double())
    error = (actual(activation, gate, up).double() - exact).abs() / exact.abs().clamp(min=1e-30)
    argument = gate.double()
    if activation.name.startswith("gelu_tanh"):
        argument = 1.6 * gate.double() * (1 + 0.044715 * gate.double().square())
    bound = 6 + 2 * argument.clamp(max=0).abs()
    # exp2 and the reciprocal of the host are better than the device's by 3 units.
    assert (error / UNIT <= bound - 3).all()
