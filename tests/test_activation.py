"""Activations against torch.nn.functional and the formulas of the models that use them."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_bytes_equal
from torch import Tensor

from nvfp4_ops import Activation
from nvfp4_ops.activation import ACTIVATION_NAMES, apply

# Both tails, around zero, exact clamp limits, and their neighbours.
POINTS = torch.cat([torch.linspace(-30, 30, 1201), torch.tensor([-7.0, 7.0, -1e4, 1e4, 0.0, -0.0])])
POINTS = POINTS.double()


def gate_up() -> tuple[Tensor, Tensor]:
    """All pairs of every 10th point."""
    gate, up = torch.meshgrid(POINTS[::10], POINTS[::10], indexing="ij")
    return gate.contiguous(), up.contiguous()


def deepseek_v4_silu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """Only the gate's upper side is clamped: silu takes care of the lower."""
    gate = torch.minimum(gate, torch.tensor(limit))
    up = torch.maximum(torch.minimum(up, torch.tensor(limit)), torch.tensor(-limit))
    return F.silu(gate) * up


def gpt_oss_swiglu(gate: Tensor, up: Tensor, limit: float = 7.0) -> Tensor:
    gate = torch.minimum(gate, torch.tensor(limit))
    up = torch.maximum(torch.minimum(up, torch.tensor(limit)), torch.tensor(-limit))
    return (up + 1) * (gate / (1 + torch.exp(-1.702 * gate)))


UNGATED: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x) * F.relu(x),
}
GATED: dict[str, tuple[Activation, Callable[[Tensor, Tensor], Tensor]]] = {
    "silu_mul": (Activation("silu_mul"), lambda g, u: F.silu(g) * u),
    "silu_mul-10": (Activation("silu_mul", 10), lambda g, u: deepseek_v4_silu(g, u, 10)),
    "silu_mul-0.5": (Activation("silu_mul", 0.5), lambda g, u: deepseek_v4_silu(g, u, 0.5)),
    "silu_mul-inf": (Activation("silu_mul", torch.inf), lambda g, u: F.silu(g) * u),
    "gelu_tanh_mul": (
        Activation("gelu_tanh_mul"),
        lambda g, u: F.gelu(g, approximate="tanh") * u,
    ),
    "relu2_mul": (Activation("relu2_mul"), lambda g, u: F.relu(g) * F.relu(g) * u),
    "swiglu_oai": (Activation("swiglu_oai"), gpt_oss_swiglu),
    "swiglu_oai-2": (Activation("swiglu_oai", 2), lambda g, u: gpt_oss_swiglu(g, u, 2)),
}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def test_activation_table_is_tested_whole() -> None:
    tested = {*UNGATED, *(act.name for act, _ in GATED.values())}
    assert tested == set(ACTIVATION_NAMES)


@pytest.mark.parametrize(("name", "expected"), UNGATED.items(), ids=UNGATED.keys())
def test_activation_elementwise_equals_torch(
    name: str, expected: Callable[[Tensor], Tensor]
) -> None:
    assert not Activation(name).gated
    assert_close(apply(Activation(name), POINTS.view(1, -1)), expected(POINTS).view(1, -1))


@pytest.mark.parametrize(("act", "expected"), GATED.values(), ids=GATED.keys())
def test_activation_gated_reads_gate_then_up(
    act: Activation, expected: Callable[[Tensor, Tensor], Tensor]
) -> None:
    assert act.gated
    gate, up = gate_up()
    assert_close(apply(act, torch.cat([gate, up], dim=-1)), expected(gate, up))


def test_activation_gated_works_on_the_last_dimension() -> None:
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    gate, up = x[..., :4], x[..., 4:]
    assert_close(apply(Activation("silu_mul"), x), F.silu(gate) * up)
    assert_bytes_equal(
        apply(Activation("silu_mul"), x.transpose(0, 1)),
        apply(Activation("silu_mul"), x).transpose(0, 1),
    )


def test_activation_oai_at_its_limits_by_hand() -> None:
    x = torch.tensor([[100.0, 7.0, -100.0, 0.0, 100.0, -100.0, 3.0, 5.0]], dtype=torch.float64)
    seven = 7 * torch.sigmoid(torch.tensor(1.702 * 7, dtype=torch.float64))
    expected = torch.stack([8 * seven, -6 * seven, seven * 0, seven * 0])
    torch.testing.assert_close(
        apply(Activation("swiglu_oai"), x)[0], expected, rtol=1e-14, atol=1e-60
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_activation_keeps_the_dtype(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(5, 16).to(dtype)
    actual = apply(Activation(name), x)
    assert actual.dtype == dtype
    expected = apply(Activation(name), x.double())
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_activation_returns_a_fresh_tensor(name: str) -> None:
    x = torch.randn(2, 8)
    before = x.clone()
    apply(Activation(name), x).fill_(7)
    assert_bytes_equal(x, before)


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_activation_keeps_nan_in_its_element(name: str) -> None:
    clean = apply(Activation(name), torch.ones(2, 8))
    x = torch.ones(2, 8)
    x[1, 2] = torch.nan
    actual = apply(Activation(name), x)
    assert bool(actual[1, 2].isnan())
    assert int(actual.isnan().sum()) == 1
    assert_bytes_equal(actual[0], clean[0])


def test_activation_oai_limit_defaults_to_seven() -> None:
    assert Activation("swiglu_oai").limit == 7.0
    assert Activation("swiglu_oai") == Activation("swiglu_oai", 7.0)
    assert len({Activation("swiglu_oai"), Activation("swiglu_oai", 7.0)}) == 1
    assert Activation("silu_mul").limit is None
    assert Activation() == Activation("none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("swish",), "activation: must be one of ('none', 'silu', "),
        (("",), "got ''"),
        (("silu", 7.0), "limit: only silu_mul and swiglu_oai are clamped, got 'silu'"),
        (("relu2_mul", 7.0), "limit: only silu_mul and swiglu_oai are clamped, got 'relu2_mul'"),
        (("silu_mul", 0.0), "limit: must be positive, got 0.0"),
        (("swiglu_oai", -1.0), "limit: must be positive, got -1.0"),
        (("silu_mul", float("nan")), "limit: must be positive, got nan"),
    ],
    ids=["unknown", "empty", "silu", "relu2_mul", "zero", "negative", "nan"],
)
def test_activation_rejects(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Activation(*arguments)


def test_activation_is_immutable() -> None:
    with pytest.raises(AttributeError):
        Activation("silu").name = "relu2"  # type: ignore[misc]
