"""quantize_nvfp4 and global_scale: bytes equal to the independent rule, and each special value."""

from collections.abc import Callable

import independent
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from independent import Floats
from torch import Tensor

from nvfp4_ops import dequantize_nvfp4, global_scale, quantize_nvfp4, swizzle_sf

EXHAUSTIVE = settings(max_examples=150, deadline=None, derandomize=True)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())

NAN, INF = float("nan"), float("inf")
FP32_MAX = torch.finfo(torch.float32).max
FP32_TINY = torch.finfo(torch.float32).smallest_normal


def _outliers(rng: np.random.Generator, rows: int, k: int) -> Floats:
    x = rng.standard_normal((rows, k))
    x.flat[:1] = 3e4
    return x


def _e4m3_midpoints(rng: np.random.Generator, rows: int, k: int) -> Floats:
    """With a power of two as global scale every block scale is a rounding tie of e4m3."""
    sf_bytes = rng.integers(8, 0x7D, (rows, k // 16, 1)).astype(np.uint8)
    low, high = independent.decode_e4m3(sf_bytes), independent.decode_e4m3(sf_bytes + np.uint8(1))
    x = rng.integers(-12, 13, (rows, k // 16, 16)) / 12
    x[:, :, rng.integers(16)] = -1
    return (x * (low + high) / 2 * 6).reshape(rows, k)


DATA: dict[str, Callable[[np.random.Generator, int, int], Floats]] = {
    "normal": lambda rng, rows, k: rng.standard_normal((rows, k)),
    "log-normal rows": lambda rng, rows, k: (
        rng.standard_normal((rows, k)) * np.exp(3 * rng.standard_normal((rows, 1)))
    ),
    "small integers": lambda rng, rows, k: rng.integers(-12, 13, (rows, k)).astype(float),
    "sparse": lambda rng, rows, k: rng.standard_normal((rows, k)) * rng.integers(0, 2, (rows, 1)),
    "subnormal": lambda rng, rows, k: rng.standard_normal((rows, k)) * 2.0**-135,
    "huge": lambda rng, rows, k: np.clip(rng.standard_normal((rows, k)) * 1e38, -3e38, 3e38),
    "outliers": _outliers,
    "e4m3 midpoints": _e4m3_midpoints,
    # Any bits at all, with NaN and Inf among them.
    "bits": lambda rng, rows, k: rng.integers(0, 1 << 32, (rows, k), np.uint32).view(np.float32),
}


@st.composite
def inputs(draw: st.DrawFn) -> Tensor:
    rows, k = draw(st.integers(0, 9)), 16 * draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    x = DATA[draw(st.sampled_from(sorted(DATA)))](rng, rows, k)
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    return torch.from_numpy(x).float().to(DTYPES[dtype])


@st.composite
def scales(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """Powers of two, ordinary ones, and the two ends of fp32, where the reciprocal overflows."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    kind = draw(st.sampled_from(["power", "normal", "tiny", "huge"]))
    exponent = {
        "power": rng.integers(-20, 21, shape),
        "normal": rng.normal(-8, 4, shape),
        "tiny": rng.uniform(-149, -120, shape),
        "huge": rng.uniform(100, 127, shape),
    }[kind]
    return torch.from_numpy(np.asarray(np.exp2(exponent), np.float32))


@st.composite
def end_rows(draw: st.DrawFn, num_rows: int) -> Tensor:
    """Any number of experts, empty ones too, and often rows past the end."""
    cuts = draw(st.lists(st.integers(0, num_rows), min_size=1, max_size=5))
    return torch.tensor(sorted(cuts), dtype=torch.int32)


def assert_bytes(
    got: tuple[Tensor, Tensor], x: Tensor, scale: Tensor, offs: Tensor | None = None
) -> None:
    """Linear codes and scales equal the independent ones."""
    ends = None if offs is None else offs.tolist()
    codes, sf_bytes = independent.quantize(x.float().numpy(), scale.numpy(), ends)
    np.testing.assert_array_equal(got[0].numpy(), codes)
    np.testing.assert_array_equal(sf_as_bytes(got[1]).numpy(), sf_bytes)


def sf_as_bytes(sf: Tensor) -> Tensor:
    return sf.view(torch.uint8)


def quantize_block(*values: float, scale: float = 1.0) -> tuple[list[int], int]:
    """Codes and scale byte of one fp32 block; values are followed by zeros."""
    x = torch.zeros(1, 16)
    x[0, : len(values)] = torch.tensor(values)
    codes, sf = quantize_nvfp4(x, torch.tensor(scale))
    unpacked = [nibble for byte in codes.flatten().tolist() for nibble in (byte & 15, byte >> 4)]
    return unpacked, int(sf_as_bytes(sf))


# Bytes


@EXHAUSTIVE
@given(st.data())
def test_quantize_bytes_with_one_scale(data: st.DataObject) -> None:
    x = data.draw(inputs())
    scale = data.draw(st.one_of(scales(()), st.just(global_scale(x))))
    assert_bytes(quantize_nvfp4(x, scale), x, scale)


@EXHAUSTIVE
@given(st.data())
def test_quantize_bytes_with_a_scale_per_row(data: st.DataObject) -> None:
    x = data.draw(inputs())
    scale = data.draw(st.one_of(scales((len(x), 1)), st.just(global_scale(x, per_token=True))))
    assert_bytes(quantize_nvfp4(x, scale), x, scale)
    assert_bytes(quantize_nvfp4(x, scale.flatten()), x, scale)


@EXHAUSTIVE
@given(st.data())
def test_quantize_bytes_with_offs(data: st.DataObject) -> None:
    x = data.draw(inputs())
    offs = data.draw(end_rows(len(x)))
    shape = data.draw(st.sampled_from([(), (len(offs),), (len(x), 1)]))
    scale = data.draw(scales(shape))
    assert_bytes(quantize_nvfp4(x, scale, offs), x, scale, offs)


@EXHAUSTIVE
@given(st.data())
def test_quantize_swizzled_is_swizzle_of_linear(data: st.DataObject) -> None:
    x = data.draw(inputs().filter(lambda x: len(x) > 0))
    offs = data.draw(st.one_of(st.none(), end_rows(len(x))))
    scale = global_scale(x, per_token=True)
    codes, sf = quantize_nvfp4(x, scale, offs)
    swizzled_codes, swizzled = quantize_nvfp4(x, scale, offs, swizzled=True)
    assert torch.equal(swizzled_codes, codes)
    assert torch.equal(sf_as_bytes(swizzled), sf_as_bytes(swizzle_sf(sf, offs)))


@pytest.mark.parametrize("rows", [0, 1, 127, 128, 129])
def test_quantize_bytes_at_tile_edges(rows: int) -> None:
    x = torch.randn(rows, 48, dtype=torch.bfloat16)
    offs = torch.tensor([rows // 3, rows // 3, rows], dtype=torch.int32)
    scale = torch.rand(3)
    assert_bytes(quantize_nvfp4(x, scale, offs), x, scale, offs)
    _, sf = quantize_nvfp4(x, scale, offs, swizzled=True)
    _, linear = independent.quantize(x.float().numpy(), scale.numpy(), offs.tolist())
    expected = independent.swizzle_ragged(linear, offs.tolist())
    np.testing.assert_array_equal(sf_as_bytes(sf).flatten().numpy(), expected)


@pytest.mark.parametrize("offs", [None, [0], [0, 0, 0]], ids=["no offs", "1 expert", "3 experts"])
def test_quantize_swizzled_without_rows_is_zero(offs: list[int] | None) -> None:
    ends = None if offs is None else torch.tensor(offs, dtype=torch.int32)
    _, sf = quantize_nvfp4(torch.zeros(0, 32), torch.ones(()), ends, swizzled=True)
    assert sf.shape == (0 if offs is None else 127 * len(offs) // 128, 1, 32, 16)
    assert not sf_as_bytes(sf).any()


@every_dtype
def test_quantize_all_rows_on_one_expert(dtype: torch.dtype) -> None:
    x = torch.randn(37, 64).to(dtype)
    offs = torch.tensor([0, 37, 37], dtype=torch.int32)
    scale = torch.tensor([NAN, 0.01, NAN])
    assert_bytes(quantize_nvfp4(x, scale, offs), x, torch.tensor(0.01))


def test_quantize_rows_past_the_end_are_zero_even_where_nan() -> None:
    x = torch.randn(6, 32)
    x[4:] = torch.tensor([[NAN], [INF]])
    offs = torch.tensor([1, 1, 4], dtype=torch.int32)
    scale = torch.full((6, 1), 0.01)
    scale[4:] = NAN
    codes, sf = quantize_nvfp4(x, scale, offs)
    assert not codes[4:].any()
    assert not sf_as_bytes(sf)[4:].any()
    assert_bytes((codes[:4], sf[:4]), x[:4], scale[:4])
    _, swizzled = quantize_nvfp4(x, scale, offs, swizzled=True)
    assert int(sf_as_bytes(swizzled).count_nonzero()) == 4 * 2


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T,
        lambda x: x[:, ::2],
        lambda x: x[1::3],
        lambda x: x[:, 16:],
        lambda x: x[:1].expand(5, -1),
        lambda x: x.flip(0)[:, ::4],
    ],
    ids=["transposed", "every other column", "every third row", "offset", "expanded", "flipped"],
)
@every_dtype
def test_quantize_takes_any_strides(view: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x = view(torch.randn(64, 64).to(dtype))
    scale = torch.rand(2 * len(x))[::2]
    assert_bytes(quantize_nvfp4(x, scale), x, scale)


def test_quantize_does_not_write_its_input() -> None:
    x = torch.randn(4, 32)
    before = x.clone()
    quantize_nvfp4(x, torch.tensor(0.01))
    assert torch.equal(x, before)


def test_quantize_gives_the_same_bits_twice() -> None:
    x, scale = torch.randn(300, 256, dtype=torch.bfloat16), torch.rand(300, 1)
    first, second = quantize_nvfp4(x, scale), quantize_nvfp4(x, scale)
    assert torch.equal(first[0], second[0])
    assert torch.equal(sf_as_bytes(first[1]), sf_as_bytes(second[1]))


def test_quantize_of_a_row_does_not_depend_on_the_batch() -> None:
    x = torch.randn(33, 256, dtype=torch.bfloat16)
    codes, sf = quantize_nvfp4(x, global_scale(x, per_token=True))
    for row in range(len(x)):
        alone = x[row : row + 1]
        row_codes, row_sf = quantize_nvfp4(alone, global_scale(alone, per_token=True))
        assert torch.equal(row_codes[0], codes[row])
        assert torch.equal(sf_as_bytes(row_sf)[0], sf_as_bytes(sf)[row])


# Special values, as the table of the docstring has them


def test_quantize_zero_block() -> None:
    assert quantize_block() == ([0] * 16, 0)


def test_quantize_keeps_negative_zero() -> None:
    assert quantize_block(-0.0) == ([8] + [0] * 15, 0)
    assert quantize_block(6.0, -0.0) == ([7, 8] + [0] * 14, 0x38)


def test_quantize_keeps_the_sign_of_tiny_negatives() -> None:
    assert quantize_block(6.0, -1e-30, -0.25, 0.25) == ([7, 8, 8] + [0] * 13, 0x38)


def test_quantize_block_scale_underflow() -> None:
    """amax / 6 of 2^-10 is the tie between 0 and the smallest scale, and goes to 0."""
    assert quantize_block(6 * 2.0**-10, -6 * 2.0**-10) == ([0, 8] + [0] * 14, 0)
    assert quantize_block(1e-38, -1e-38) == ([0, 8] + [0] * 14, 0)
    codes, sf_byte = quantize_block(6 * 2.0**-10 * 1.01)
    assert (codes[0], sf_byte) == (5, 1)  # just above the tie: scale 2^-9, 3.03 rounds to 3


def test_quantize_too_large_saturates() -> None:
    assert quantize_block(6 * 448.0) == ([7] + [0] * 15, 0x7E)
    assert quantize_block(1e30, -1e30, 6 * 448) == ([7, 15, 7] + [0] * 13, 0x7E)


def test_quantize_inf_saturates_and_keeps_finite_neighbours() -> None:
    assert quantize_block(INF, -INF, 448.0, -1.0) == ([7, 15, 2, 8] + [0] * 12, 0x7E)


@pytest.mark.parametrize("nan", [NAN, -NAN], ids=["+nan", "-nan"])
def test_quantize_nan_makes_its_block_nan(nan: float) -> None:
    assert quantize_block(1.0, nan, -INF) == ([7] * 16, 0x7F)


@every_dtype
def test_quantize_nan_changes_no_other_block(dtype: torch.dtype) -> None:
    x = torch.randn(5, 64).to(dtype)
    poisoned = x.clone()
    poisoned[2, 17] = NAN
    (codes, sf), (got_codes, got_sf) = (
        quantize_nvfp4(v, torch.tensor(0.01)) for v in (x, poisoned)
    )
    assert int(sf_as_bytes(got_sf)[2, 1]) == 0x7F
    assert (got_codes[2, 8:16] == 0x77).all()
    expected_sf = sf_as_bytes(sf).clone()
    expected_sf[2, 1], codes[2, 8:16] = 0x7F, 0x77
    assert torch.equal(got_codes, codes)
    assert torch.equal(sf_as_bytes(got_sf), expected_sf)
    decoded = dequantize_nvfp4(got_codes, got_sf, torch.tensor(0.01))
    assert decoded.isnan().nonzero().tolist() == [[2, k] for k in range(16, 32)]


@pytest.mark.parametrize("scale", [1e-30, FP32_TINY, 1e-40, 2.0**-149, 1e30, FP32_MAX], ids=str)
def test_quantize_extreme_global_scale(scale: float) -> None:
    """Below the smallest normal the reciprocal overflows and is clamped to the largest fp32."""
    rows = [torch.randn(16) * magnitude for magnitude in (scale, 1000 * scale, 1.0, 1e30)]
    x = torch.stack(rows)
    got = quantize_nvfp4(x, torch.tensor(scale))
    assert_bytes(got, x, torch.tensor(scale))
    assert not got[1].float().isnan().any()


# Error


@every_dtype
@pytest.mark.parametrize("per_token", [False, True], ids=["per tensor", "per token"])
def test_quantize_round_trip_error(dtype: torch.dtype, per_token: bool) -> None:
    x = torch.randn(256, 512).to(dtype)
    scale = global_scale(x, per_token)
    error = dequantize_nvfp4(*quantize_nvfp4(x, scale), scale) - x.float()
    assert 0.09 < float(error.norm() / x.float().norm()) < 0.1


def test_quantize_error_of_each_element_is_bounded() -> None:
    """At most half of the widest step, 4 to 6, of a block scale that is rounded up by 1/16."""
    x = torch.randn(64, 256) * torch.logspace(-1, 1, 64).unsqueeze(1)
    scale = global_scale(x)
    codes, sf = quantize_nvfp4(x, scale)
    assert float(sf.float().min()) > 2.0**-6, "block scales are normal numbers"
    error = (dequantize_nvfp4(codes, sf, scale) - x).abs()
    amax = x.unflatten(1, (-1, 16)).abs().amax(2).repeat_interleave(16, 1)
    assert (error <= amax / 6 * (1 + 1 / 16) * (1 + 1e-6)).all()


def test_quantize_keeps_values_of_the_format() -> None:
    """Quantizing what was decoded gives the same bytes, where each block uses its largest code."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    x = torch.cat([values, -values]).repeat(0x7E, 1)
    sf = torch.arange(1, 0x7F).to(torch.uint8).view(torch.float8_e4m3fn).unsqueeze(1)
    codes, got_sf = quantize_nvfp4(x * sf.float() * 0.25, torch.tensor(0.25))
    assert torch.equal(sf_as_bytes(got_sf), sf_as_bytes(sf))
    assert torch.equal(dequantize_nvfp4(codes, got_sf, torch.tensor(1.0)), x * sf.float())


# global_scale


@every_dtype
def test_global_scale_is_amax_over_2688(dtype: torch.dtype) -> None:
    x = torch.randn(7, 48).to(dtype)
    values = x.float().numpy()
    assert global_scale(x).item() == independent.global_scale(np.abs(values).max())
    rows = [independent.global_scale(np.abs(row).max()) for row in values]
    per_token = global_scale(x, per_token=True)
    assert per_token.shape == (7, 1)
    assert per_token.flatten().tolist() == rows


@EXHAUSTIVE
@given(inputs().filter(lambda x: len(x) > 0))
def test_global_scale_per_token_of_any_input(x: Tensor) -> None:
    with np.errstate(invalid="ignore"):
        rows = [independent.global_scale(np.abs(row).max()) for row in x.float().numpy()]
    np.testing.assert_array_equal(global_scale(x, per_token=True).flatten().numpy(), rows)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, 1.0),
        (-0.0, 1.0),
        (INF, 1.0),
        (-INF, 1.0),
        (2688.0, 1.0),
        (-1.0, float(np.float32(1) / np.float32(2688))),
        (1e-42, FP32_TINY),
        (1e-36, FP32_TINY),
        (FP32_MAX, float(np.float32(FP32_MAX) / np.float32(2688))),
    ],
    ids=str,
)
def test_global_scale_special_values(value: float, expected: float) -> None:
    x = torch.zeros(2, 16)
    x[0, 3] = value
    assert global_scale(x).item() == expected
    assert global_scale(x, per_token=True).tolist() == [[expected], [1.0]]


def test_global_scale_nan_is_of_its_own_row() -> None:
    x = torch.full((3, 16), 2688.0)
    x[1, :2] = torch.tensor([NAN, INF])
    assert global_scale(x).isnan()
    per_token = global_scale(x, per_token=True).flatten()
    assert per_token.isnan().tolist() == [False, True, False]
    assert per_token[[0, 2]].tolist() == [1.0, 1.0]


def test_global_scale_without_rows() -> None:
    assert global_scale(torch.zeros(0, 16)).item() == 1.0
    assert global_scale(torch.zeros(0, 16), per_token=True).shape == (0, 1)


def test_global_scale_takes_any_rank_and_strides() -> None:
    x = torch.randn(4, 6, 32)
    assert torch.equal(global_scale(x), x.abs().max() / 2688)
    assert torch.equal(
        global_scale(x[:, 1, ::2].T, True), global_scale(x[:, 1, ::2].T.clone(), True)
    )


# Bad input

X, ONE = torch.zeros(3, 16), torch.ones(())
OFFS = torch.tensor([1, 3], dtype=torch.int32)

# name: (x, global scale, offs, error, message)
BAD: dict[str, tuple[Tensor, Tensor, Tensor | None, type[Exception], str]] = {
    "K": (torch.zeros(3, 40), ONE, None, ValueError, "x: K must be a multiple of 16, got 40"),
    "rank 1": (X[0], ONE, None, ValueError, r"x: must be \(R, K\) .* shape \(16,\)"),
    "rank 3": (X[None], ONE, None, ValueError, r"x: must be \(R, K\) .* shape \(1, 3, 16\)"),
    "dtype": (X.double(), ONE, None, TypeError, "x: must be bfloat16 or .* got float64"),
    "scale dtype": (X, ONE.half(), None, TypeError, "global_scale: must be float32, got float16"),
    "scale (4,)": (X, torch.ones(4), None, ValueError, r"\(R, 1\) with R = 3, got shape \(4,\)"),
    "scale (4, 1)": (X, torch.ones(4, 1), None, ValueError, r"R = 3, got shape \(4, 1\)"),
    "scale (3, 2)": (X, torch.ones(3, 2), None, ValueError, r"R = 3, got shape \(3, 2\)"),
    "scale (3, 1, 1)": (X, torch.ones(3, 1, 1), None, ValueError, r"got shape \(3, 1, 1\)"),
    "scale (R,) with offs": (X, torch.ones(3), OFFS, ValueError, r"\(E,\) .* R = 3, E = 2, got"),
    "offs decreasing": (X, ONE, OFFS.flip(0), ValueError, r"offs: .*non-decreasing.*\[3, 1\]"),
    "offs past R": (X[:2], ONE, OFFS, ValueError, r"offs: .*number of rows \(2\), got \[1, 3\]"),
    "offs negative": (X, ONE, OFFS - 2, ValueError, r"offs: .*got \[-1, 1\]"),
    "offs dtype": (X, ONE, OFFS.long(), TypeError, "offs: must be int32, got int64"),
    "offs rank": (X, ONE, OFFS[None], ValueError, r"offs: .*rank 1.*shape \(1, 2\)"),
    "offs empty": (X, ONE, OFFS[:0], ValueError, "offs: must have at least one expert"),
}


@pytest.mark.parametrize(("x", "scale", "offs", "error", "message"), BAD.values(), ids=BAD.keys())
def test_quantize_rejects(
    x: Tensor, scale: Tensor, offs: Tensor | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        quantize_nvfp4(x, scale, offs)


def test_quantize_scale_with_offs_is_per_expert_also_where_it_could_be_per_row() -> None:
    """With as many experts as rows (E,) and (R,) look alike; (R, 1) says per row."""
    x = torch.full((3, 16), 6.0)
    offs = torch.tensor([0, 0, 3], dtype=torch.int32)
    scale = torch.tensor([1.0, 2.0, 4.0])
    assert quantize_nvfp4(x, scale, offs)[1].float().flatten().tolist() == [0.25, 0.25, 0.25]
    assert quantize_nvfp4(x, scale[:, None], offs)[1].float().flatten().tolist() == [1, 0.5, 0.25]


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(16), ValueError, r"x: must be \(R, K\) \(rank 2\), got shape \(16,\)"),
        (torch.zeros(3, 0), ValueError, "x: K must be positive, got 0"),
        (torch.zeros(3, 16, dtype=torch.int32), TypeError, "x: must be bfloat16 .* got int32"),
    ],
    ids=["rank", "K", "dtype"],
)
def test_global_scale_per_token_rejects(x: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        global_scale(x, per_token=True)
