"""activate_and_quantize_nvfp4 and quantize_per_token_nvfp4 are the steps they stand for."""

import re
from typing import Any

import pytest
import torch
from compare import assert_bytes_equal
from samples import int32
from torch import Tensor

import nvfp4_ops
from nvfp4_ops import Activation
from nvfp4_ops import activation as activations

ACTIVATIONS = [
    *(Activation(name) for name in activations.ACTIVATION_NAMES),
    Activation("silu_mul", 0.5),
]
every_activation = pytest.mark.parametrize(
    "act", ACTIVATIONS, ids=lambda act: f"{act.name}-{act.limit}"
)
OFFS = int32(3, 3, 130)


def activated(x: Tensor, act: Activation) -> Tensor:
    """In fp32, then rounded to the dtype of x."""
    return activations.apply(act, x.float()).to(x.dtype)


def rows(act: Activation, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """140 rows of 48 activated columns: zeros, large ones and NaN among them."""
    x = 2 * torch.randn(140, 96 if act.gated else 48)
    x[0], x[1], x[2, 5], x[3] = 0.0, 1e4, torch.nan, 1e-30
    return x.to(dtype)


@every_activation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_activate_and_quantize_is_its_two_steps(act: Activation, dtype: torch.dtype) -> None:
    x = rows(act, dtype)
    y = activated(x, act)
    for scale, offs in (
        (torch.tensor(0.01), None),
        (torch.rand(140, 1) * 0.01, OFFS),
        (torch.tensor([0.01, 0.02, 0.03]), OFFS),
    ):
        for swizzled in (False, True):
            actual = nvfp4_ops.activate_and_quantize_nvfp4(
                x, scale, offs, activation=act, swizzled=swizzled
            )
            expected = nvfp4_ops.quantize_nvfp4(y, scale, offs, swizzled=swizzled)
            for got, want in zip(actual, expected, strict=True):
                assert_bytes_equal(got, want)


@every_activation
@pytest.mark.parametrize("offs", [None, OFFS, int32(0), int32(140)], ids=str)
def test_quantize_per_token_is_its_steps(act: Activation, offs: Tensor | None) -> None:
    x = rows(act)
    y = activated(x, act)
    scale = nvfp4_ops.global_scale(y, per_token=True)
    if offs is not None:
        scale[int(offs[-1]) :] = 1.0
    for swizzled in (False, True):
        actual = nvfp4_ops.quantize_per_token_nvfp4(x, offs, activation=act, swizzled=swizzled)
        codes, sf = nvfp4_ops.quantize_nvfp4(y, scale, offs, swizzled=swizzled)
        for got, want in zip(actual, (codes, sf, scale), strict=True):
            assert_bytes_equal(got, want)


def test_quantize_per_token_rows_do_not_depend_on_each_other() -> None:
    x = rows(Activation())
    codes, sf, scale = nvfp4_ops.quantize_per_token_nvfp4(x)
    for row in (0, 1, 2, 77):
        for got, want in zip(
            nvfp4_ops.quantize_per_token_nvfp4(x[row : row + 1]),
            (codes, sf, scale),
            strict=True,
        ):
            assert_bytes_equal(got, want[row : row + 1])


def test_activated_rounds_before_it_quantizes() -> None:
    x = torch.randn(200, 256).bfloat16()
    squares, scale = x.float().clamp(min=0).square(), torch.tensor(0.003)
    codes, _ = nvfp4_ops.activate_and_quantize_nvfp4(x, scale, activation="relu2")
    assert torch.equal(codes, nvfp4_ops.quantize_nvfp4(squares.bfloat16(), scale)[0])
    # The rows tell the two orders apart.
    assert not torch.equal(codes, nvfp4_ops.quantize_nvfp4(squares, scale)[0])


@pytest.mark.parametrize("num_rows", [0, 1, 127, 128, 129])
def test_activated_ops_with_row_counts(num_rows: int) -> None:
    x = torch.randn(num_rows, 64).bfloat16()
    codes, sf, scale = nvfp4_ops.quantize_per_token_nvfp4(x, activation="silu_mul")
    assert codes.shape == (num_rows, 16)
    assert sf.shape == (num_rows, 2)
    assert scale.shape == (num_rows, 1)
    if num_rows:
        y = nvfp4_ops.dequantize_nvfp4(codes, sf, scale)
        error = (y - activated(x, Activation("silu_mul")).float()).abs()
        assert (error.unflatten(1, (2, 16)).amax(2) <= 6 * sf.float() * scale / 4).all()


BAD: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (
        "activate_and_quantize_nvfp4",
        (torch.ones(2, 48), torch.ones(())),
        {"activation": "silu_mul"},
        ValueError,
        "x: 2K, gate and up columns, must be a multiple of 32, got 48",
    ),
    (
        "activate_and_quantize_nvfp4",
        (torch.ones(2, 40), torch.ones(())),
        {"activation": "silu"},
        ValueError,
        "x: K must be a multiple of 16, got 40",
    ),
    (
        "activate_and_quantize_nvfp4",
        (torch.ones(2, 32), torch.ones(3)),
        {"activation": "silu"},
        ValueError,
        "global_scale: must be () or (R,) or (R, 1) with R = 2, got shape (3,)",
    ),
    (
        "activate_and_quantize_nvfp4",
        (torch.ones(2, 32).double(), torch.ones(())),
        {"activation": "silu"},
        TypeError,
        "x: must be bfloat16 or float16 or float32, got float64",
    ),
    (
        "quantize_per_token_nvfp4",
        (torch.ones(2, 32),),
        {"activation": "swish"},
        ValueError,
        "activation: must be one of",
    ),
    (
        "quantize_per_token_nvfp4",
        (torch.ones(2, 2, 32),),
        {},
        ValueError,
        "x: must be (R, K) (rank 2), got shape (2, 2, 32)",
    ),
    (
        "quantize_per_token_nvfp4",
        (torch.ones(2, 0),),
        {},
        ValueError,
        "x: K must be positive, got 0",
    ),
    (
        "quantize_per_token_nvfp4",
        (torch.ones(2, 16), int32(2, 1)),
        {},
        ValueError,
        "offs: must be the non-decreasing end rows",
    ),
]


@pytest.mark.parametrize(("op", "arguments", "options", "error", "message"), BAD)
def test_activated_ops_errors_name_the_argument(
    op: str,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        getattr(nvfp4_ops, op)(*arguments, **options)
