"""quantize_weight: bytes equal to the independent rule, special values, messages."""

from collections.abc import Callable

import independent
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from independent import F32
from torch import Tensor

from nvfp4_ops import NVFP4Weight, dequantize_nvfp4, quantize_weight

NAN, INF = float("nan"), float("inf")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

DATA: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape) * 0.02,
    "log-normal rows": lambda rng, shape: (
        rng.standard_normal(shape) * np.exp(3 * rng.standard_normal((*shape[:-1], 1)))
    ),
    "small integers": lambda rng, shape: rng.integers(-12, 13, shape).astype(float),
    # Some rows, and maybe whole experts, are zero.
    "sparse": lambda rng, shape: rng.standard_normal(shape) * rng.integers(0, 2, (*shape[:-1], 1)),
    "zeros of both signs": lambda rng, shape: rng.choice([0.0, -0.0], shape),
    "wide": lambda rng, shape: np.exp2(rng.uniform(-60, 60, shape)) * rng.choice([1, -1], shape),
    # Ratios that underflow in fp32.
    "wider": lambda rng, shape: np.exp2(rng.uniform(-120, 120, shape)) * rng.choice([1, -1], shape),
    "wider rows": lambda rng, shape: (
        rng.standard_normal(shape) * np.exp2(rng.uniform(-120, 120, (*shape[:-1], 1)))
    ),
    "huge": lambda rng, shape: np.clip(rng.standard_normal(shape) * 1e38, -3e38, 3e38),
}


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """(N, K) or (E, N, K), finite."""
    lead = draw(st.sampled_from([(), (1,), (3,)]))
    shape = (*lead, draw(st.integers(1, 6)), 16 * draw(st.integers(1, 4)))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    w = torch.from_numpy(DATA[draw(st.sampled_from(sorted(DATA)))](rng, shape)).float()
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    finite_max = torch.finfo(dtype).max
    return w.clamp(-finite_max, finite_max).to(dtype)


def assert_bytes(got: NVFP4Weight, w: Tensor, scale: Tensor) -> None:
    """Every expert equals the independent rule with its own global scale."""
    assert torch.equal(got.global_scale, scale)
    matrices = w.float().numpy().reshape(-1, *w.shape[-2:])
    codes = got.codes.numpy().reshape(len(matrices), *got.codes.shape[-2:])
    sf_bytes = got.block_scale.view(torch.uint8).numpy().reshape(*codes.shape[:2], -1)
    for expert, matrix in enumerate(matrices):
        expected = independent.quantize_weight(matrix, scale.flatten().numpy()[expert])
        np.testing.assert_array_equal(codes[expert], expected[0])
        np.testing.assert_array_equal(sf_bytes[expert], expected[1])


def own_scale(w: Tensor) -> Tensor:
    matrices = w.float().numpy().reshape(-1, *w.shape[-2:])
    scales = [independent.weight_global_scale(matrix) for matrix in matrices]
    return torch.from_numpy(np.array(scales, F32)).reshape(w.shape[:-2])


def quantize_block(*values: float, scale: float) -> tuple[list[int], int]:
    """Codes and scale byte of one fp32 block; values are followed by zeros."""
    w = torch.zeros(1, 16)
    w[0, : len(values)] = torch.tensor(values)
    codes, sf, _ = quantize_weight(w, torch.tensor(scale))
    unpacked = [nibble for byte in codes.flatten().tolist() for nibble in (byte & 15, byte >> 4)]
    return unpacked, int(sf.view(torch.uint8))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(weights())
def test_quantize_weight_bytes(w: Tensor) -> None:
    assert_bytes(quantize_weight(w), w, own_scale(w))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(weights(), st.floats(-40, 40), st.booleans())
def test_quantize_weight_bytes_with_an_explicit_scale(
    w: Tensor, exponent: float, poison: bool
) -> None:
    scale = torch.full(w.shape[:-2], 2.0**exponent) * (1 + torch.arange(w.shape[:-2].numel())).view(
        w.shape[:-2]
    )
    if poison:
        w.view(-1)[:: w.shape[-1] + 5] = NAN
        w.view(-1)[3 :: w.shape[-1] + 7] = -INF
    assert_bytes(quantize_weight(w, scale), w, scale)


def test_quantize_weight_experts_are_independent() -> None:
    w = torch.randn(3, 24, 64, dtype=torch.bfloat16) * torch.tensor([1, 1e-3, 1e3]).view(3, 1, 1)
    together = quantize_weight(w.bfloat16())
    for expert in range(3):
        alone = quantize_weight(w[expert].bfloat16())
        assert torch.equal(together.codes[expert], alone.codes)
        assert torch.equal(together.global_scale[expert], alone.global_scale)
        assert torch.equal(
            together.block_scale[expert].view(torch.uint8), alone.block_scale.view(torch.uint8)
        )


def test_quantize_weight_takes_any_strides() -> None:
    w = torch.randn(64, 3, 48).permute(1, 2, 0)
    assert_bytes(quantize_weight(w), w, own_scale(w))
    assert_bytes(quantize_weight(w[1].T[:, ::3]), w[1].T[:, ::3], own_scale(w[1].T[:, ::3]))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_quantize_weight_round_trip_error(dtype: torch.dtype) -> None:
    w = (torch.randn(4, 64, 256) * 0.02).to(dtype)
    error = dequantize_nvfp4(*quantize_weight(w)) - w.float()
    assert 0.09 < float(error.norm() / w.float().norm()) < 0.1


@pytest.mark.parametrize("shape", [(4, 32), (2, 4, 32)], ids=["matrix", "experts"])
@pytest.mark.parametrize("zero", [0.0, -0.0], ids=["+0", "-0"])
def test_quantize_weight_zero(shape: tuple[int, ...], zero: float) -> None:
    codes, sf, scale = quantize_weight(torch.full(shape, zero))
    assert not codes.any()
    assert (sf.view(torch.uint8) == 0x38).all()
    assert torch.equal(scale, torch.ones(shape[:-2]))


@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32), (0, 3, 32)], ids=str)
def test_quantize_weight_without_rows(shape: tuple[int, ...]) -> None:
    codes, sf, scale = quantize_weight(torch.zeros(shape))
    assert codes.shape == (*shape[:-1], 16)
    assert sf.shape == (*shape[:-1], 2)
    assert torch.equal(scale, torch.ones(shape[:-2]))


def test_quantize_weight_zero_block_has_scale_one() -> None:
    w = torch.zeros(1, 32)
    w[0, 0] = 2688.0
    codes, sf, scale = quantize_weight(w)
    assert (sf.tolist(), scale.item()) == ([[448.0, 1.0]], 1.0)
    assert codes.flatten().tolist() == [7] + [0] * 15


def test_quantize_weight_signs_of_zero() -> None:
    """-0 is code 0, a negative that rounds to zero code 8, the tie -0.25 too."""
    assert quantize_block(6.0, -0.0, -0.2, -0.25, 0.2, scale=1.0) == (
        [7, 0, 8, 8, 0] + [0] * 11,
        0x38,
    )


def test_quantize_weight_underflowing_quotients_are_zeros() -> None:
    """In ModelOpt a block whose amax / (6 * global scale) is 0 in fp32 counts as a zero block, and
    an element whose w / step is -0 has no sign."""
    assert quantize_block(1e-30, -1e-30, scale=1e30) == ([0] * 16, 0x38)
    assert quantize_block(6e30, -1e-30, -1e-10, scale=1e30) == ([7, 0, 8] + [0] * 13, 0x38)
    assert quantize_block(1e38, -1e38, scale=1e38) == ([2, 10] + [0] * 14, 0x38)  # 6e38 is Inf


def test_quantize_weight_block_scale_floor() -> None:
    """Never below 2^-9, so that a small block is not lost; large elements of it keep a code."""
    assert quantize_block(6 * 2.0**-10, -6 * 2.0**-10, scale=1.0) == ([5, 13] + [0] * 14, 1)
    assert quantize_block(2.0**-40, -(2.0**-40), scale=1.0) == ([0, 8] + [0] * 14, 1)


def test_quantize_weight_too_large_saturates() -> None:
    assert quantize_block(1e30, -1e30, 448.0, scale=1.0) == ([7, 15, 2] + [0] * 13, 0x7E)


def test_quantize_weight_inf_saturates_under_an_explicit_scale() -> None:
    assert quantize_block(INF, -INF, 448.0, -1.0, scale=1.0) == ([7, 15, 2, 8] + [0] * 12, 0x7E)


def test_quantize_weight_nan_makes_its_block_nan_under_an_explicit_scale() -> None:
    w = torch.randn(2, 48)
    expected = quantize_weight(w, torch.tensor(0.01))
    w[1, 20] = -NAN
    got = quantize_weight(w, torch.tensor(0.01))
    expected.codes[1, 8:16] = 0x77
    expected.block_scale.view(torch.uint8)[1, 1] = 0x7F
    assert torch.equal(got.codes, expected.codes)
    assert torch.equal(got.block_scale.view(torch.uint8), expected.block_scale.view(torch.uint8))


def test_quantize_weight_does_not_write_its_input() -> None:
    w = torch.randn(2, 4, 32)
    before = w.clone()
    quantize_weight(w)
    assert torch.equal(w, before)


def with_value(shape: tuple[int, ...], value: float, *experts: int) -> Tensor:
    w = torch.ones(shape)
    for expert in experts or (0,):
        w[expert].view(-1)[5] = value
    return w


W, ONE = torch.ones(4, 32), torch.ones(())

# name: (w, global scale, error, message)
BAD: dict[str, tuple[Tensor, Tensor | None, type[Exception], str]] = {
    "dtype": (W.double(), None, TypeError, "w: must be bfloat16 or .* got float64"),
    "rank 1": (W[0], None, ValueError, r"w: must be \(N, K\) or \(E, N, K\), got shape \(32,\)"),
    "rank 4": (W[None, None], None, ValueError, r"w: must be .* got shape \(1, 1, 4, 32\)"),
    "K": (W[:, :24], None, ValueError, "w: K must be a multiple of 16, got 24"),
    "Inf": (with_value((4, 32), INF), None, ValueError, "w: must be finite, got Inf or NaN$"),
    "NaN of an expert": (with_value((3, 4, 32), NAN, 1), None, ValueError, r"in experts \[1\]$"),
    "-Inf of two": (with_value((9, 4, 32), -INF, 2, 8), None, ValueError, r"in experts \[2, 8\]$"),
    "scale dtype": (W, ONE.double(), TypeError, "global_scale: must be float32, got float64"),
    "scale of a matrix": (W, torch.ones(1), ValueError, r"global_scale: must be .* shape \(1,\)"),
    "one scale of experts": (W[None], ONE, ValueError, r"global_scale: must be .*\(E,\).*\(\)"),
    "scale experts": (W[None], torch.ones(2), ValueError, r"\(E,\) = \(1,\), got shape \(2,\)"),
    "scale 0": (W, 0 * ONE, ValueError, "global_scale: must be positive and finite, got"),
    "scale negative": (W, -ONE, ValueError, "global_scale: must be positive and finite, got"),
    "scale NaN": (W, NAN * ONE, ValueError, "global_scale: must be positive and finite, got"),
    "scale Inf": (W, INF * ONE, ValueError, "global_scale: must be positive and finite, got"),
}  # fmt: skip


@pytest.mark.parametrize(("w", "scale", "error", "message"), BAD.values(), ids=BAD.keys())
def test_quantize_weight_rejects(
    w: Tensor, scale: Tensor | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        quantize_weight(w, scale)
