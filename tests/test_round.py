"""round_nvfp4 and round_per_token_nvfp4 are quantization and exact decoding, to the byte."""

import re
from typing import Any

import pytest
import torch
from compare import assert_bytes_equal
from kernel_checks import hard_values
from samples import int32, operands
from torch import Tensor

import nvfp4_ops
from nvfp4_ops import reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
OFFS = int32(3, 3, 130)
ROWS, K = 140, 48


def decoded(x: Tensor, scale: Tensor, offs: Tensor | None = None) -> Tensor:
    return reference.decode_blocks(*nvfp4_ops.quantize_nvfp4(x, scale, offs), torch.bfloat16)


def row_scales(num_rows: int) -> Tensor:
    return torch.rand(num_rows, 1) * 0.01 + 1e-4


def token_of_row(num_rows: int, num_tokens: int) -> Tensor:
    """Every token, some of them often, and rows of none at the end and in between."""
    tokens = torch.arange(num_rows, dtype=torch.int32) % num_tokens
    tokens[-4:], tokens[num_rows // 2] = -1, -1
    return tokens


@every_dtype
@pytest.mark.parametrize("offs", [None, OFFS, int32(0), int32(ROWS)], ids=str)
def test_round_is_quantize_and_decode(dtype: torch.dtype, offs: Tensor | None) -> None:
    x = hard_values(ROWS, K).to(dtype)
    scales = [torch.tensor(0.01), torch.tensor(torch.nan), row_scales(ROWS)]
    if offs is not None:
        scales.append(torch.rand(offs.shape[0]) * 0.01)
    for scale in scales:
        assert_bytes_equal(nvfp4_ops.round_nvfp4(x, scale, offs), decoded(x, scale, offs))


@every_dtype
def test_round_times_global_scale_is_dequantize(dtype: torch.dtype) -> None:
    x, scale = hard_values(ROWS, K).to(dtype), torch.rand(3) * 0.01
    codes, sf = nvfp4_ops.quantize_nvfp4(x, scale, OFFS)
    expected = nvfp4_ops.dequantize_nvfp4(codes, sf, scale, OFFS)
    row_scale = torch.cat([scale, torch.ones(1)])[reference.expert_of_row(OFFS, ROWS)]
    rounded = nvfp4_ops.round_nvfp4(x, scale, OFFS)
    torch.testing.assert_close(
        rounded.float() * row_scale.unsqueeze(1), expected, rtol=0, atol=0, equal_nan=True
    )


@every_dtype
@pytest.mark.parametrize("num_tokens", [1, 17, 400])
def test_round_gathers_like_permute(dtype: torch.dtype, num_tokens: int) -> None:
    x, tokens = hard_values(num_tokens, K).to(dtype), token_of_row(ROWS, num_tokens)
    rows = nvfp4_ops.permute(x, tokens)
    for scale, offs in ((torch.tensor(0.01), None), (row_scales(ROWS), OFFS)):
        actual = nvfp4_ops.round_nvfp4(x, scale, offs, token_of_row=tokens)
        assert_bytes_equal(actual, decoded(rows, scale, offs))
    actual, scale = nvfp4_ops.round_per_token_nvfp4(x, OFFS, token_of_row=tokens)
    codes, sf, expected_scale = nvfp4_ops.quantize_per_token_nvfp4(rows, OFFS)
    assert_bytes_equal(actual, reference.decode_blocks(codes, sf, torch.bfloat16))
    assert_bytes_equal(scale, expected_scale)
    assert (scale[tokens < 0] == 1).all()


@every_dtype
@pytest.mark.parametrize("offs", [None, OFFS, int32(0), int32(ROWS)], ids=str)
def test_round_per_token_is_its_steps(dtype: torch.dtype, offs: Tensor | None) -> None:
    x = hard_values(ROWS, K).to(dtype)
    rounded, scale = nvfp4_ops.round_per_token_nvfp4(x, offs)
    expected = nvfp4_ops.global_scale(x, per_token=True)
    if offs is not None:
        expected[int(offs[-1]) :] = 1.0
    assert_bytes_equal(scale, expected)
    assert_bytes_equal(rounded, decoded(x, expected, offs))


def test_round_keeps_signs_saturates_and_zeroes_nobodys_rows() -> None:
    x = torch.zeros(6, 16)
    x[0, :4] = torch.tensor([-0.0, -1e-9, 6.0, -torch.inf])
    x[1, 0], x[1, 1] = torch.nan, 3.0
    x[2, :] = 448.0 * 8
    x[4:] = torch.nan
    out = nvfp4_ops.round_nvfp4(x, torch.ones(()), int32(2, 4))
    assert out[0, :2].signbit().all()
    assert not out[0, 4:].signbit().any()
    assert out[0, 3] == -6 * 448
    assert out[1].isnan().all()
    assert (out[2] == 6 * 448).all()
    assert_bytes_equal(out[4:], torch.zeros(2, 16, dtype=torch.bfloat16))
    # A row of no token is zero even over a scale that makes zeros NaN.
    nan = torch.tensor(torch.nan)
    of_none = nvfp4_ops.round_nvfp4(x, nan, token_of_row=int32(-1, 2))
    assert_bytes_equal(of_none[0], torch.zeros(16, dtype=torch.bfloat16))
    assert of_none[1].isnan().all()


@pytest.mark.parametrize("num_rows", [0, 1, 127, 128, 129])
def test_round_with_row_counts(num_rows: int) -> None:
    x = torch.randn(num_rows, 64).bfloat16()
    rounded, scale = nvfp4_ops.round_per_token_nvfp4(x)
    assert rounded.shape == (num_rows, 64)
    assert scale.shape == (num_rows, 1)
    # Between 4 and 6 the grid is 2 wide: at most half of that over 4, and what sf was rounded.
    error = (rounded.float() * scale - x.float()).abs().unflatten(1, (4, 16))
    amax = x.float().abs().unflatten(1, (4, 16)).amax(2, keepdim=True)
    assert (error <= 0.26 * amax).all()
    nobodys = torch.full((num_rows,), -1, dtype=torch.int32)
    for tokens in (nobodys, nobodys[:0]):
        rows = nvfp4_ops.round_nvfp4(x, torch.ones(()), token_of_row=tokens)
        assert_bytes_equal(rows, torch.zeros(tokens.shape[0], 64, dtype=torch.bfloat16))


def test_round_takes_strided_rows() -> None:
    wide = torch.randn(50, 100)
    strided, tokens = wide[::2, 2:50], int32(3, -1, 24)
    scale = torch.tensor(0.01)
    for of in (None, tokens):
        assert_bytes_equal(
            nvfp4_ops.round_nvfp4(strided, scale, token_of_row=of),
            nvfp4_ops.round_nvfp4(strided.contiguous(), scale, token_of_row=of),
        )


@pytest.mark.parametrize("activation", [None, "silu_mul"])
def test_round_multiplies_to_the_bits_of_codes(activation: str | None) -> None:
    """The point of it: the same sums of the same products."""
    made = operands([5, 0, 130, 1], n=64, k=96, rows_past_end=3)
    x = torch.randn(made.a.shape[0], 96).bfloat16()
    row_scale = nvfp4_ops.global_scale(x, per_token=True)
    codes, sf = nvfp4_ops.quantize_nvfp4(x, row_scale, made.offs)
    rounded = nvfp4_ops.round_nvfp4(x, row_scale, made.offs)
    options: dict[str, Any] = {"row_scale": row_scale, "activation": activation}
    for out_dtype in (torch.bfloat16, torch.float32):
        expected, actual = (
            nvfp4_ops.grouped_scaled_mm(
                *made._replace(a=a, sf_a=sf_a), out_dtype=out_dtype, **options
            )
            for a, sf_a in ((codes, sf), (rounded, None))
        )
        assert expected.abs().max() > 0
        assert_bytes_equal(actual, expected)


X, ONE = torch.ones(2, 32), torch.ones(())
BAD: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "k": (
        "round_nvfp4",
        (torch.ones(2, 40), ONE),
        {},
        ValueError,
        "x: K must be a multiple of 16, got 40",
    ),
    "rank": (
        "round_nvfp4",
        (torch.ones(32), ONE),
        {},
        ValueError,
        "x: must be (R, K) (rank 2), got shape (32,)",
    ),
    "tokens-rank": (
        "round_nvfp4",
        (torch.ones(32), ONE),
        {"token_of_row": int32(0)},
        ValueError,
        "x: must be (T, K) (rank 2), got shape (32,)",
    ),
    "dtype": (
        "round_nvfp4",
        (X.double(), ONE),
        {},
        TypeError,
        "x: must be bfloat16 or float16 or float32, got float64",
    ),
    "scale": (
        "round_nvfp4",
        (X, torch.ones(2, 1)),
        {"token_of_row": int32(0, 1, 1)},
        ValueError,
        "global_scale: must be () or (E,) with offs or (R, 1) with R = 3, got shape (2, 1)",
    ),
    "scale-dtype": (
        "round_nvfp4",
        (X, ONE.double()),
        {},
        TypeError,
        "global_scale: must be float32, got float64",
    ),
    "offs": (
        "round_nvfp4",
        (X, ONE, int32(3)),
        {},
        ValueError,
        "offs: must be the non-decreasing end rows",
    ),
    "token-dtype": (
        "round_nvfp4",
        (X, ONE),
        {"token_of_row": torch.tensor([0, 1])},
        TypeError,
        "token_of_row: must be int32, got int64",
    ),
    "token": (
        "round_nvfp4",
        (X, ONE),
        {"token_of_row": int32(0, 2)},
        ValueError,
        "token_of_row: must be -1 or one of the 2 tokens, got 2",
    ),
    "per-token-token": (
        "round_per_token_nvfp4",
        (X,),
        {"token_of_row": int32(-2)},
        ValueError,
        "token_of_row: must be -1 or one of the 2 tokens, got -2",
    ),
    "per-token-k": (
        "round_per_token_nvfp4",
        (torch.ones(2, 0),),
        {},
        ValueError,
        "x: K must be positive, got 0",
    ),
    "per-token-offs": (
        "round_per_token_nvfp4",
        (X, int32(2, 1)),
        {},
        ValueError,
        "offs: must be the non-decreasing end rows",
    ),
}


@pytest.mark.parametrize(
    ("op", "arguments", "options", "error", "message"), BAD.values(), ids=BAD.keys()
)
def test_round_errors_name_the_argument(
    op: str,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        getattr(nvfp4_ops, op)(*arguments, **options)
