"""grouped_scaled_mm against its equation, evaluated row by row without the package's code."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import (
    assert_bytes_equal,
    assert_gemm_close,
    assert_values_equal,
    bf16_grouped_mm,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import (
    NAN_E4M3,
    ONE_E4M3,
    Operands,
    int32,
    offs_of,
    operands,
    random_codes,
    random_sf,
)
from torch import Tensor

from nvfp4_ops import Activation, grouped_scaled_mm, swizzle_sf
from nvfp4_ops import activation as activations

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]).double()


def e4m3_value(byte: int) -> float:
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, (byte >> 3) & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


E4M3 = torch.tensor([e4m3_value(byte) for byte in range(256)], dtype=torch.float64)


def decode(codes: Tensor, sf: Tensor) -> Tensor:
    """(..., K) float64 values of (..., K / 2) codes with linear scales."""
    values = torch.empty(*codes.shape[:-1], codes.shape[-1] * 2, dtype=torch.float64)
    values[..., 0::2] = E2M1[(codes % 16).long()]
    values[..., 1::2] = E2M1[(codes // 16).long()]
    return values * E4M3[sf.view(torch.uint8).long()].repeat_interleave(16, dim=-1)


def silu_mul(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


def swiglu_oai(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    assert limit is not None
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


# What each fused activation means, on float64 halves of the columns (or on all of them).
UNGATED: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x) ** 2,
}
GATED: dict[str, Callable[[Tensor, Tensor, float | None], Tensor]] = {
    "silu_mul": silu_mul,
    "gelu_tanh_mul": lambda gate, up, _: F.gelu(gate, approximate="tanh") * up,
    "relu2_mul": lambda gate, up, _: F.relu(gate) ** 2 * up,
    "swiglu_oai": swiglu_oai,
}

ACTIVATIONS = [
    Activation("silu"),
    Activation("gelu_tanh"),
    Activation("relu2"),
    Activation("silu_mul"),
    Activation("silu_mul", 0.25),
    Activation("gelu_tanh_mul"),
    Activation("relu2_mul"),
    Activation("swiglu_oai"),
    Activation("swiglu_oai", 0.25),
]
each_activation = pytest.mark.parametrize(
    "act", ACTIVATIONS, ids=lambda act: f"{act.name}-{act.limit}"
)

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
A_DTYPES = [torch.uint8, *FLOATS]


def dtype_id(dtype: torch.dtype) -> str:
    return "w4a4" if dtype == torch.uint8 else str(dtype).removeprefix("torch.")


each_a_dtype = pytest.mark.parametrize("a_dtype", A_DTYPES, ids=dtype_id)

COUNTS = {
    "empty-expert": [2, 0, 3],
    "all-on-one": [0, 0, 9],
    "all-on-first": [9, 0, 0],
    "no-rows": [0, 0],
    "one-row": [1],
    "127-rows": [127],
    "128-rows": [128],
    "129-rows": [129],
    "across-tiles": [1, 127, 129, 0, 5],
}
each_counts = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())


def exact_row(
    row: Tensor, weight: Tensor, alpha: Tensor, scale: float, bias: Tensor, act: Activation
) -> Tensor:
    """One row of the result in float64; alpha (1,) or (2,)."""
    n = weight.shape[0]
    out = torch.empty(n, dtype=torch.float64)
    for column in range(n):
        segment = column * len(alpha) // n
        dot = (weight[column] * row).sum()
        out[column] = dot * alpha[segment] * scale + bias[column]
    if act.name in UNGATED:
        return UNGATED[act.name](out)
    return GATED[act.name](out[: n // 2], out[n // 2 :], act.limit)


def exact(
    made: Operands,
    *,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
    act: Activation | None = None,
) -> Tensor:
    """The op's equation in float64; block scales must be linear."""
    act = act or Activation()
    a = made.a.double() if made.sf_a is None else decode(made.a, made.sf_a)
    b = decode(made.b, made.sf_b)
    num_rows, n = a.shape[0], b.shape[1]
    alpha = made.alpha.double().reshape(b.shape[0], -1)
    out = torch.zeros(num_rows, n // 2 if act.name in GATED else n, dtype=torch.float64)
    start = 0
    for expert, end in enumerate(made.offs.tolist()):
        for r in range(start, end):
            scale = 1.0 if row_scale is None else float(row_scale.reshape(-1)[r])
            bias_row = torch.zeros(n) if bias is None else bias[expert]
            out[r] = exact_row(a[r], b[expert], alpha[expert], scale, bias_row.double(), act)
        start = end
    return out


def assert_rounded(actual: Tensor, expected: Tensor) -> None:
    """``actual`` is float64 ``expected`` rounded to fp32, then to its own dtype."""
    assert_values_equal(actual, expected.float().to(actual.dtype))


@each_counts
@each_a_dtype
def test_grouped_mm_equals_the_equation(counts: list[int], a_dtype: torch.dtype) -> None:
    made = operands(counts, n=6, a_dtype=a_dtype)
    assert_rounded(grouped_scaled_mm(*made, out_dtype=torch.float32), exact(made))


@each_a_dtype
@pytest.mark.parametrize("out_dtype", FLOATS, ids=dtype_id)
def test_grouped_mm_rounds_once_to_out_dtype(a_dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    made = operands([5, 0, 9], a_dtype=a_dtype)
    assert_rounded(grouped_scaled_mm(*made, out_dtype=out_dtype), exact(made))


def test_grouped_mm_writes_bf16_by_default() -> None:
    made = operands([3])
    expected = grouped_scaled_mm(*made, out_dtype=torch.bfloat16)
    assert_bytes_equal(grouped_scaled_mm(*made), expected)


@each_a_dtype
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=dtype_id)
def test_grouped_mm_error_is_within_the_bound(a_dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    made = operands([33, 0, 20, 11], n=32, k=256, a_dtype=a_dtype, segments=2)
    row_scale = torch.rand(64) + 0.5
    a = made.a.double() if made.sf_a is None else decode(made.a, made.sf_a)
    b = decode(made.b, made.sf_b) * made.alpha.double().repeat_interleave(16, dim=1).unsqueeze(-1)
    pytorch = bf16_grouped_mm(a * row_scale.double().unsqueeze(1), b, made.offs)
    actual = grouped_scaled_mm(*made, row_scale=row_scale, out_dtype=out_dtype)
    assert_gemm_close(actual, exact(made, row_scale=row_scale), pytorch)


def test_grouped_mm_bound_sees_a_wrong_block_scale() -> None:
    made = operands([16], n=32, k=256)
    assert made.sf_a is not None
    a, b = decode(made.a, made.sf_a), decode(made.b, made.sf_b) * made.alpha.double().view(1, 1, 1)
    wrong = made._replace(sf_b=made.sf_b.view(torch.uint8).roll(1, dims=2).view(made.sf_b.dtype))
    with pytest.raises(AssertionError, match="more than the bound"):
        assert_gemm_close(grouped_scaled_mm(*wrong), exact(made), bf16_grouped_mm(a, b, made.offs))


@pytest.mark.parametrize("out_dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("a_dtype", FLOATS, ids=dtype_id)
def test_grouped_mm_one_hot_rows_decode_the_weight(
    a_dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    num_experts, n, k = 2, 9, 48
    made = Operands(
        a=torch.eye(k).repeat(num_experts, 1).to(a_dtype),
        b=random_codes(num_experts, n, k // 2),
        sf_a=None,
        sf_b=random_sf(num_experts, n, k // 16),
        alpha=torch.ones(num_experts),
        offs=offs_of([k] * num_experts),
    )
    weight = decode(made.b, made.sf_b).transpose(1, 2).flatten(0, 1)
    assert_values_equal(grouped_scaled_mm(*made, out_dtype=out_dtype), weight.to(out_dtype))


def test_grouped_mm_one_hot_codes_decode_every_code_and_scale() -> None:
    k, n = 32, 256
    one_hot = torch.zeros(k, k // 2, dtype=torch.uint8)
    one_hot[torch.arange(k), torch.arange(k) // 2] = (
        torch.tensor([0x02, 0x20]).repeat(k // 2).byte()
    )
    # Column n has block scale byte n, and each of the 16 codes in both blocks.
    every_code = torch.tensor([low + 16 * (low + 1) for low in range(0, 16, 2)]).byte()
    every_scale = torch.arange(n).byte().view(1, n, 1).expand(1, n, k // 16).contiguous()
    made = Operands(
        a=one_hot,
        b=every_code.repeat(1, n, 2),
        sf_a=torch.full((k, k // 16), ONE_E4M3).byte().view(torch.float8_e4m3fn),
        sf_b=every_scale.view(torch.float8_e4m3fn),
        alpha=torch.ones(1),
        offs=int32(k),
    )
    weight = torch.outer(E4M3, E2M1.repeat(2)).T
    # NaN times zero is NaN, so the columns of a NaN scale are NaN in all rows.
    assert_values_equal(grouped_scaled_mm(*made), weight.bfloat16())


@pytest.mark.parametrize("segments", [1, 2], ids=["E", "E2"])
def test_grouped_mm_alpha_scales_its_expert_and_segment(segments: int) -> None:
    made = operands([2, 0, 3], n=10, segments=segments)
    ones = made._replace(alpha=torch.ones_like(made.alpha))
    exponents = torch.arange(3 * segments).view(made.alpha.shape)
    powers = made._replace(alpha=2.0**exponents)
    expected = grouped_scaled_mm(*ones, out_dtype=torch.float32)
    factors = powers.alpha.reshape(3, segments).repeat_interleave(10 // segments, dim=1)
    expected *= factors[[0, 0, 2, 2, 2]]
    assert_values_equal(grouped_scaled_mm(*powers, out_dtype=torch.float32), expected)
    assert_rounded(grouped_scaled_mm(*made, out_dtype=torch.float32), exact(made))


def test_grouped_mm_odd_n() -> None:
    for n in (1, 3):
        made = operands([2, 3], n=n)
        assert_rounded(grouped_scaled_mm(*made, out_dtype=torch.float32), exact(made))


@each_a_dtype
@pytest.mark.parametrize("shape", [(5,), (5, 1)], ids=["R", "R1"])
def test_grouped_mm_row_scale_multiplies_its_row(
    shape: tuple[int, ...], a_dtype: torch.dtype
) -> None:
    made, row_scale = operands([2, 0, 3], a_dtype=a_dtype), torch.rand(shape) * 4
    actual = grouped_scaled_mm(*made, row_scale=row_scale, out_dtype=torch.float32)
    assert_rounded(actual, exact(made, row_scale=row_scale))


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_grouped_mm_bias_is_added_after_the_scales(dtype: torch.dtype) -> None:
    made, bias = operands([2, 0, 3], segments=2), torch.randn(3, 24).to(dtype)
    row_scale = torch.rand(5) * 4
    actual = grouped_scaled_mm(*made, row_scale=row_scale, bias=bias, out_dtype=torch.float32)
    assert_rounded(actual, exact(made, row_scale=row_scale, bias=bias))


@each_activation
@pytest.mark.parametrize("a_dtype", [torch.uint8, torch.bfloat16], ids=dtype_id)
def test_grouped_mm_activation_equals_the_equation(act: Activation, a_dtype: torch.dtype) -> None:
    made = operands([4, 0, 7], a_dtype=a_dtype, rows_past_end=2, segments=2)
    options: dict[str, Any] = {"row_scale": torch.rand(13) + 0.5, "bias": torch.randn(3, 24)}
    actual = grouped_scaled_mm(*made, **options, activation=act, out_dtype=torch.float32)
    expected = exact(made, **options, act=act)
    assert float(expected.abs().max()) > 0.05
    torch.testing.assert_close(actual, expected.float(), rtol=2.0**-23, atol=1e-12)


@each_activation
def test_grouped_mm_activation_equals_unfused(act: Activation) -> None:
    made = operands([4, 0, 7], segments=2)
    options: dict[str, Any] = {"bias": torch.randn(3, 24), "out_dtype": torch.float32}
    unfused = activations.apply(act, grouped_scaled_mm(*made, **options).double())
    fused = grouped_scaled_mm(*made, **options, activation=act)
    torch.testing.assert_close(fused, unfused.float(), rtol=1e-5, atol=1e-6)


def test_grouped_mm_takes_an_activation_by_name() -> None:
    made = operands([4, 3])
    for name in (*UNGATED, *GATED):
        expected = grouped_scaled_mm(*made, activation=Activation(name))
        assert_bytes_equal(grouped_scaled_mm(*made, activation=name), expected, name)


@pytest.mark.parametrize("swizzled", [False, True], ids=["linear", "swizzled"])
@each_a_dtype
def test_grouped_mm_rows_past_the_end_are_zero_whatever_they_hold(
    a_dtype: torch.dtype, swizzled: bool
) -> None:
    clean = operands([2, 0, 3], a_dtype=a_dtype, rows_past_end=4)
    row_scale, bias = torch.rand(9, 1), torch.randn(3, 24)
    poisoned = clean._replace(a=clean.a.clone())
    if clean.sf_a is None:
        poisoned.a[5:] = torch.nan
    else:
        sf_bytes = clean.sf_a.view(torch.uint8).clone()
        sf_bytes[5:] = NAN_E4M3
        poisoned = poisoned._replace(sf_a=sf_bytes.view(torch.float8_e4m3fn))
    poisoned_scale = row_scale.clone()
    poisoned_scale[5:] = torch.nan
    if swizzled:
        poisoned = poisoned.swizzled()
    for act in ("none", "swiglu_oai", "silu"):
        out = grouped_scaled_mm(*poisoned, row_scale=poisoned_scale, bias=bias, activation=act)
        expected = grouped_scaled_mm(*clean, row_scale=row_scale, bias=bias, activation=act)
        assert_bytes_equal(out, expected)
        assert_bytes_equal(out[5:], torch.zeros_like(out[5:]))
        assert bool((out[:5] != 0).any(dim=1).all())


@each_counts
def test_grouped_mm_swizzled_scales_give_the_same_bytes(counts: list[int]) -> None:
    made = operands(counts, n=130, k=80, rows_past_end=3)
    assert_bytes_equal(grouped_scaled_mm(*made.swizzled()), grouped_scaled_mm(*made))
    weight_only = operands(counts, n=130, k=80, a_dtype=torch.bfloat16)
    assert_bytes_equal(grouped_scaled_mm(*weight_only.swizzled()), grouped_scaled_mm(*weight_only))


def test_grouped_mm_reads_no_pad_of_swizzled_scales() -> None:
    made = operands([2, 0, 130], n=130, k=80)
    assert made.sf_a is not None
    ones = made._replace(
        sf_a=torch.ones_like(made.sf_a.float()).to(torch.float8_e4m3fn),
        sf_b=torch.ones_like(made.sf_b.float()).to(torch.float8_e4m3fn),
    ).swizzled()

    def poison(sf: Tensor | None, used: Tensor | None) -> Tensor:
        assert sf is not None
        assert used is not None
        pads = used.view(torch.uint8) == 0
        assert bool(pads.any())
        return torch.where(pads, NAN_E4M3, sf.view(torch.uint8)).view(torch.float8_e4m3fn)

    swizzled = made.swizzled()
    poisoned = swizzled._replace(
        sf_a=poison(swizzled.sf_a, ones.sf_a), sf_b=poison(swizzled.sf_b, ones.sf_b)
    )
    assert_bytes_equal(grouped_scaled_mm(*poisoned), grouped_scaled_mm(*made))


def with_bad_row(made: Operands, row: int, value: float) -> Operands:
    """NaN, or Inf for float rows, in one element (or block scale) of a row."""
    if made.sf_a is None:
        a = made.a.clone()
        a[row, 17] = value
        return made._replace(a=a)
    sf_bytes = made.sf_a.view(torch.uint8).clone()
    sf_bytes[row, 1] = NAN_E4M3
    return made._replace(sf_a=sf_bytes.view(torch.float8_e4m3fn))


@each_a_dtype
def test_grouped_mm_nan_stays_in_its_row(a_dtype: torch.dtype) -> None:
    made = operands([3, 0, 5], a_dtype=a_dtype)
    clean = grouped_scaled_mm(*made)
    out = grouped_scaled_mm(*with_bad_row(made, 4, torch.nan))
    assert bool(out[4].isnan().all())
    others = [0, 1, 2, 3, 5, 6, 7]
    assert_bytes_equal(out[others], clean[others])


def test_grouped_mm_nan_row_scale_stays_in_its_row() -> None:
    made, row_scale = operands([3, 0, 5]), torch.rand(8)
    clean = grouped_scaled_mm(*made, row_scale=row_scale)
    row_scale[2] = torch.nan
    out = grouped_scaled_mm(*made, row_scale=row_scale)
    assert bool(out[2].isnan().all())
    others = [0, 1, 3, 4, 5, 6, 7]
    assert_bytes_equal(out[others], clean[others])


def test_grouped_mm_nan_weight_stays_in_its_column() -> None:
    made = operands([3, 2, 5])
    clean = grouped_scaled_mm(*made)
    sf_bytes = made.sf_b.view(torch.uint8).clone()
    sf_bytes[1, 7, 0] = NAN_E4M3
    out = grouped_scaled_mm(*made._replace(sf_b=sf_bytes.view(torch.float8_e4m3fn)))
    assert bool(out[3:5, 7].isnan().all())
    clean[3:5, 7] = out[3:5, 7]
    assert_bytes_equal(out, clean)


@pytest.mark.parametrize("a_dtype", FLOATS, ids=dtype_id)
def test_grouped_mm_inf_follows_ieee_in_its_row(a_dtype: torch.dtype) -> None:
    made = operands([3, 0, 5], a_dtype=a_dtype)
    bad = with_bad_row(made, 4, torch.inf)
    out = grouped_scaled_mm(*bad, out_dtype=torch.float32)
    assert bool((~out[4].isfinite()).all())
    assert_rounded(out, exact(bad))
    others = [0, 1, 2, 3, 5, 6, 7]
    assert_bytes_equal(out[others], grouped_scaled_mm(*made, out_dtype=torch.float32)[others])


@pytest.mark.parametrize("where", ["alpha", "row_scale"])
@pytest.mark.parametrize("out_dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("act", ["none", "silu", "relu2", "silu_mul"])
def test_grouped_mm_scales_before_it_rounds(act: str, out_dtype: torch.dtype, where: str) -> None:
    """Largest accumulator there is: 7168 * 2688^2 = 5.2e10, far above fp16."""
    k = 7168
    largest = torch.full((1, 2, k // 2), 0x77, dtype=torch.uint8)
    sf = torch.full((1, 2, k // 16), 0x7E, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.tensor([4e-11])
    alpha, row_scale = (scale, None) if where == "alpha" else (torch.ones(1), scale)
    out = grouped_scaled_mm(
        largest[0, :1],
        largest,
        sf[0, :1],
        sf,
        alpha,
        int32(1),
        row_scale=row_scale,
        activation=act,
        out_dtype=out_dtype,
    )
    product = torch.tensor(k * 2688.0**2, dtype=torch.float64) * scale.double()
    assert 2 < float(product) < 3
    expected = GATED[act](product, product, None) if act in GATED else UNGATED[act](product)
    torch.testing.assert_close(out, expected.expand(out.shape).to(out_dtype), rtol=2.0**-22, atol=0)


def compute_rows(made: Operands, rows: list[int], bias: Tensor, row_scale: Tensor) -> Tensor:
    """The given rows of the batch, which must be in rising order of expert, as their own batch."""
    ends = made.offs.tolist()
    counts = [sum((0, *ends)[e] <= row < ends[e] for row in rows) for e in range(len(ends))]
    part = made._replace(
        a=made.a[rows],
        sf_a=None if made.sf_a is None else made.sf_a[rows],
        offs=offs_of(counts),
    )
    return grouped_scaled_mm(
        *part,
        bias=bias,
        row_scale=row_scale[rows],
        activation="silu_mul",
        out_dtype=torch.float32,
    )


@each_a_dtype
def test_grouped_mm_row_does_not_depend_on_the_batch(a_dtype: torch.dtype) -> None:
    made = operands([9, 0, 1, 23], n=64, k=256, a_dtype=a_dtype)
    bias, row_scale = torch.randn(4, 64), torch.rand(33)
    whole = compute_rows(made, list(range(33)), bias, row_scale)
    for row in range(33):
        alone = compute_rows(made, [row], bias, row_scale)
        assert_bytes_equal(alone, whole[row : row + 1], f"row {row} alone")
    for rows in ([0, 1], [8, 9, 10], [8, 7, 3, 9, 30, 12], list(range(3, 33)), [20] * 17):
        assert_bytes_equal(compute_rows(made, rows, bias, row_scale), whole[rows], f"{rows}")


@each_a_dtype
def test_grouped_mm_gives_the_same_bits_twice(a_dtype: torch.dtype) -> None:
    made = operands([9, 0, 23], n=64, k=256, a_dtype=a_dtype)
    first = grouped_scaled_mm(*made, activation="gelu_tanh_mul", out_dtype=torch.float32)
    again = grouped_scaled_mm(*made, activation="gelu_tanh_mul", out_dtype=torch.float32)
    assert_bytes_equal(again, first)


def strided(x: Tensor) -> Tensor:
    """The same values with gaps between the elements and a transposed order in memory."""
    spread = x.new_zeros((*reversed(x.shape), 2))
    spread[..., 0] = x.permute(*reversed(range(x.ndim)))
    result = spread[..., 0].permute(*reversed(range(x.ndim)))
    assert not result.is_contiguous()
    return result


@each_a_dtype
def test_grouped_mm_strided_operands_give_the_same_bytes(a_dtype: torch.dtype) -> None:
    made = operands([3, 0, 4], a_dtype=a_dtype, segments=2)
    bias, row_scale = torch.randn(3, 24), torch.rand(7, 1)
    expected = grouped_scaled_mm(*made, bias=bias, row_scale=row_scale)
    parts = [None if x is None else strided(x) for x in made]
    actual = grouped_scaled_mm(*parts, bias=strided(bias), row_scale=strided(row_scale))
    assert_bytes_equal(actual, expected)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_grouped_mm_ragged_shapes_equal_the_equation(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=5), label="counts")
    n = data.draw(st.integers(1, 5), label="half of n") * 2
    k = data.draw(st.integers(1, 6), label="blocks") * 16
    a_dtype = data.draw(st.sampled_from(A_DTYPES), label="a")
    torch.manual_seed(data.draw(st.integers(0, 2**16), label="seed"))
    made = operands(
        counts,
        n,
        k,
        a_dtype=a_dtype,
        rows_past_end=data.draw(st.integers(0, 3), label="rows past the end"),
        segments=data.draw(st.sampled_from([1, 2]), label="segments"),
    )
    layout = made.swizzled() if data.draw(st.booleans(), label="swizzled") else made
    assert_rounded(grouped_scaled_mm(*layout, out_dtype=torch.float32), exact(made))


VALID = operands([2, 0, 3], n=8, k=32)
FLOAT_A = torch.ones(5, 32, dtype=torch.bfloat16)
ODD_B = {"b": random_codes(3, 7, 16), "sf_b": random_sf(3, 7, 2)}

# id: replaced arguments, exception, message.
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a-rank": (
        {"a": random_codes(1, 5, 16)},
        ValueError,
        "a: must be (R, K) or (R, K/2) codes (rank 2), got shape (1, 5, 16)",
    ),
    "a-float-with-sf_a": ({"a": FLOAT_A}, TypeError, "a with sf_a: must be uint8, got bfloat16"),
    "a-codes-without-sf_a": (
        {"sf_a": None},
        TypeError,
        "a without sf_a: must be bfloat16 or float16 or float32, got uint8",
    ),
    "a-float64": (
        {"a": FLOAT_A.double(), "sf_a": None},
        TypeError,
        "a without sf_a: must be bfloat16 or float16 or float32, got float64",
    ),
    "a-packed-k": (
        {"a": random_codes(5, 32)},
        ValueError,
        "a: must be (R, K/2) codes = (5, 16), got shape (5, 32)",
    ),
    "a-k": (
        {"a": FLOAT_A[:, :16], "sf_a": None},
        ValueError,
        "a: must be (R, K) = (5, 32), got shape (5, 16)",
    ),
    "b-rank": (
        {"b": random_codes(8, 16)},
        ValueError,
        "b: must be (E, N, K/2) codes (rank 3), got shape (8, 16)",
    ),
    "b-dtype": ({"b": random_codes(3, 8, 16).char()}, TypeError, "b: must be uint8, got int8"),
    "b-k": ({"b": random_codes(3, 8, 12)}, ValueError, "b: K/2 must be a multiple of 8, got 12"),
    "sf_a-dtype": (
        {"sf_a": torch.ones(5, 2)},
        TypeError,
        "sf_a: must be float8_e4m3fn, got float32",
    ),
    "sf_a-shape": (
        {"sf_a": random_sf(5, 3)},
        ValueError,
        "sf_a: must be the linear scales (R, K/16) = (5, 2), got shape (5, 3)",
    ),
    "sf_a-linear-sf_b-swizzled": (
        {"sf_b": swizzle_sf(VALID.sf_b)},
        ValueError,
        "sf_a: must be swizzled (rank 4) because sf_b is, got shape (5, 2); swizzle_sf and "
        "unswizzle_sf convert",
    ),
    "sf_a-swizzled-sf_b-linear": (
        {"sf_a": VALID.swizzled().sf_a},
        ValueError,
        "sf_a: must be linear (R, K/16) because sf_b is, got shape (3, 1, 32, 16)",
    ),
    "sf_a-swizzled-without-offs": (
        {"sf_a": random_sf(1, 1, 32, 16), "sf_b": VALID.swizzled().sf_b},
        ValueError,
        "sf_a: must be the scales of a, swizzled with offs = (3, 1, 32, 16), got shape "
        "(1, 1, 32, 16)",
    ),
    "sf_b-dtype": (
        {"sf_b": random_codes(3, 8, 2)},
        TypeError,
        "sf_b: must be float8_e4m3fn, got uint8",
    ),
    "sf_b-shape": (
        {"sf_b": random_sf(3, 2, 8)},
        ValueError,
        "sf_b: must be the linear scales (E, N, K/16) = (3, 8, 2), got shape (3, 2, 8)",
    ),
    "sf_b-rank": (
        {"sf_b": random_sf(24, 2)},
        ValueError,
        "sf_b: must be the linear scales (E, N, K/16) (rank 3), got shape (24, 2)",
    ),
    "sf_b-swizzled-shape": (
        {"sf_b": random_sf(1, 1, 32, 16)},
        ValueError,
        "sf_b: must be the swizzled scales of b = (3, 1, 32, 16), got shape (1, 1, 32, 16)",
    ),
    "alpha-dtype": (
        {"alpha": torch.ones(3).double()},
        TypeError,
        "alpha: must be float32, got float64",
    ),
    "alpha-shape": (
        {"alpha": torch.ones(2)},
        ValueError,
        "alpha: must be (E,) or (E, 2) = (3,), got shape (2,)",
    ),
    "alpha-scalar": (
        {"alpha": torch.ones(())},
        ValueError,
        "alpha: must be (E,) or (E, 2) (rank 1), got shape ()",
    ),
    "alpha-three-segments": (
        {"alpha": torch.ones(3, 3)},
        ValueError,
        "alpha: must be (E,) or (E, 2) = (3, 2), got shape (3, 3)",
    ),
    "alpha-odd-n": (
        {**ODD_B, "alpha": torch.ones(3, 2)},
        ValueError,
        "b: N, two column segments, must be a multiple of 2, got 7",
    ),
    "gated-odd-n": (
        {**ODD_B, "activation": "silu_mul"},
        ValueError,
        "b: N, gate and up rows, must be a multiple of 2, got 7",
    ),
    "offs-dtype": ({"offs": int32(2, 2, 5).long()}, TypeError, "offs: must be int32, got int64"),
    "offs-shape": (
        {"offs": int32(2, 5)},
        ValueError,
        "offs: must be the (E,) end row of each expert = (3,), got shape (2,)",
    ),
    "offs-starts-and-end": (
        {"offs": int32(0, 2, 2, 5)},
        ValueError,
        "offs: must be the (E,) end row of each expert = (3,), got shape (4,)",
    ),
    "offs-decreasing": (
        {"offs": int32(3, 2, 5)},
        ValueError,
        "offs: must be the non-decreasing end rows of the experts, at most the number of rows "
        "(5), got [3, 2, 5]",
    ),
    "offs-too-large": ({"offs": int32(2, 2, 6)}, ValueError, "rows (5), got [2, 2, 6]"),
    "offs-negative": ({"offs": int32(-1, 2, 5)}, ValueError, "rows (5), got [-1, 2, 5]"),
    "no-experts": (
        {
            "b": random_codes(0, 8, 16),
            "sf_b": random_sf(0, 8, 2),
            "alpha": torch.ones(0),
            "offs": int32(),
        },
        ValueError,
        "offs: must have at least one expert, got (0,)",
    ),
    "row_scale-dtype": (
        {"row_scale": torch.ones(5).half()},
        TypeError,
        "row_scale: must be float32, got float16",
    ),
    "row_scale-rows": (
        {"row_scale": torch.ones(4)},
        ValueError,
        "row_scale: must be (R,) or (R, 1) = (5,), got shape (4,)",
    ),
    "row_scale-columns": (
        {"row_scale": torch.ones(5, 2)},
        ValueError,
        "row_scale: must be (R,) or (R, 1) = (5, 1), got shape (5, 2)",
    ),
    "row_scale-scalar": (
        {"row_scale": torch.ones(())},
        ValueError,
        "row_scale: must be (R,) or (R, 1) (rank 1), got shape ()",
    ),
    "bias-dtype": (
        {"bias": torch.ones(3, 8).double()},
        TypeError,
        "bias: must be bfloat16 or float16 or float32, got float64",
    ),
    "bias-shape": (
        {"bias": torch.ones(8)},
        ValueError,
        "bias: must be (E, N) (rank 2), got shape (8,)",
    ),
    "bias-of-activated-columns": (
        {"bias": torch.ones(3, 4), "activation": "silu_mul"},
        ValueError,
        "bias: must be (E, N) = (3, 8), got shape (3, 4)",
    ),
    "activation": ({"activation": "swish"}, ValueError, "activation: must be one of"),
    "out_dtype": (
        {"out_dtype": torch.float64},
        TypeError,
        "out_dtype: must be bfloat16, float16 or float32, got torch.float64",
    ),
    "device": (
        {"alpha": torch.ones(3, device="meta")},
        ValueError,
        "alpha: must be on cpu like the first argument, on meta",
    ),
}


def test_grouped_mm_valid_arguments_are_accepted() -> None:
    assert_rounded(grouped_scaled_mm(*VALID, out_dtype=torch.float32), exact(VALID))


@pytest.mark.parametrize(("replaced", "error", "message"), BAD.values(), ids=BAD.keys())
def test_grouped_mm_rejects(replaced: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {**VALID._asdict(), **replaced}
    with pytest.raises(error, match=re.escape(message)):
        grouped_scaled_mm(**arguments)
