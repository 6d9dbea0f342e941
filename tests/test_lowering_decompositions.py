"""Decompositions: the same bytes as the ops, also fused with their neighbours."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compare import assert_bytes_equal
from kernel_checks import hard_values, offs_of
from lowering_graphs import DECOMPOSE, run_rewritten
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config

import nvfp4_ops
from nvfp4_ops import reference
from nvfp4_ops.activation import Activation
from nvfp4_ops.lowering import decompositions, inductor
from nvfp4_ops.lowering.decompose import decompositions as table

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROWS, K = 131, 96


def hard_bytes() -> Tensor:
    """Every sign and binade of fp32 many times over, and what is next to each tie of e2m1."""
    bits = torch.arange(-(2**31), 2**31, 99_991, dtype=torch.int64).int()
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0, 448.0, 2.0**-6, 2.0**-10])
    around = [ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties * 0)]
    e4m3 = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    midpoints = (e4m3[1:] + e4m3[:-1]) / 2
    special = torch.tensor([torch.inf, torch.nan, 0.0, 2.0**-149, 3e38])
    values = torch.cat([bits.view(torch.float32), *around, e4m3, midpoints, special])
    return torch.cat([values, -values])


@pytest.mark.parametrize("device", DEVICES)
def test_decompositions_encode_e2m1(device: str) -> None:
    x = hard_bytes().to(device)
    codes = decompositions.encode_e2m1(x, x.view(torch.int32) < 0)
    assert_bytes_equal(codes.to(torch.uint8), reference.encode_e2m1(x))


@pytest.mark.parametrize("device", DEVICES)
def test_decompositions_encode_e4m3(device: str) -> None:
    x = hard_bytes().to(device).abs()
    sf_bytes = decompositions.encode_e4m3(x).to(torch.uint8)
    assert_bytes_equal(sf_bytes, reference.encode_e4m3(x).view(torch.uint8))


def test_decompositions_decode_every_code() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8)
    values = decompositions.decode_e4m3(every_byte.int())
    expected = every_byte.view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(values.signbit()[:-1], expected.signbit()[:-1])
    codes = torch.arange(16)
    values = decompositions.decode_e2m1(codes.int())
    assert_bytes_equal(values, reference.decode_e2m1(codes.to(torch.uint8)))


@pytest.mark.parametrize("device", DEVICES)
def test_decompositions_reciprocal_is_correctly_rounded(device: str) -> None:
    x = hard_bytes().to(device)
    expected = (1.0 / x.cpu()).to(device)
    actual = decompositions.reciprocal(x)
    finite = ~expected.isnan()
    assert_bytes_equal(actual[finite], expected[finite])
    assert bool(actual[~finite].isnan().all())


SCALES = ("tensor", "tiny", "huge", "per_row")


def scale_of(kind: str, rows: int) -> Tensor:
    if kind == "per_row":
        return torch.rand(rows, 1) * 0.01 + 1e-4
    return torch.tensor({"tensor": 0.0021, "tiny": 1e-40, "huge": 3e38}[kind])


def rows_of(dtype: torch.dtype, rows: int = ROWS, columns: int = K) -> Tensor:
    if dtype == torch.float32:
        return hard_values(rows, columns)
    return hard_values(rows, columns).to(dtype)


def assert_quantized_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for name, got, want in zip(("codes", "block_scale"), actual, expected, strict=True):
        assert_bytes_equal(got, want, name)


@pytest.fixture
def _no_caches() -> Iterator[None]:
    """Graphs are compiled, and so counted, every time."""
    torch._dynamo.reset()
    counters.clear()
    with config.patch(force_disable_caches=True), torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decompositions_quantize(dtype: torch.dtype, kind: str) -> None:
    scale = scale_of(kind, ROWS)
    for x in (rows_of(dtype), rows_of(dtype, ROWS, 2 * K)[:, ::2]):
        for offs, swizzled in ((None, False), (None, True), (offs_of(ROWS, 5), False)):
            actual = decompositions.quantize_nvfp4(x, scale, offs, swizzled)
            assert_quantized_equal(actual, reference.quantize_nvfp4(x, scale, offs, swizzled))


@pytest.mark.parametrize("num_rows", [0, 1, 127, 128, 129])
def test_decompositions_quantize_any_number_of_rows(num_rows: int) -> None:
    x, scale = torch.randn(num_rows, K).bfloat16(), torch.tensor(0.01)
    actual = decompositions.quantize_nvfp4(x, scale, None, True)
    assert_quantized_equal(actual, reference.quantize_nvfp4(x, scale, None, True))


@pytest.mark.parametrize(
    ("dtype", "device"),
    [
        (torch.bfloat16, "cpu"),
        *(pytest.param(dtype, "cuda", marks=pytest.mark.gpu) for dtype in DTYPES),
    ],
    ids=str,
)
@pytest.mark.usefixtures("_no_caches")
def test_decompositions_quantize_compiled(dtype: torch.dtype, device: str) -> None:
    compiled = torch.compile(decompositions.quantize_nvfp4, dynamic=False)
    x, scale = rows_of(dtype), scale_of("per_row", ROWS)
    scale[:20], scale[20:40], scale[40:60] = (scale_of(kind, 1) for kind in SCALES[:3])
    expected = reference.quantize_nvfp4(x, scale)
    actual = compiled(x.to(device), scale.to(device))
    assert_quantized_equal(tuple(out.cpu() for out in actual), expected)


@pytest.mark.parametrize("name", ["none", "relu2", "relu2_mul"])
def test_decompositions_activate_and_quantize(name: str) -> None:
    x, scale = rows_of(torch.bfloat16), torch.tensor(0.003)
    actual = decompositions.activate_and_quantize_nvfp4(x, scale, None, name)
    expected = reference.activate_and_quantize_nvfp4(x, scale, Activation(name))
    assert_quantized_equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("experts", [False, True], ids=["rows", "weights"])
def test_decompositions_dequantize(dtype: torch.dtype, experts: bool) -> None:
    shape = (5, ROWS) if experts else (ROWS,)
    codes = torch.randint(0, 256, (*shape, K // 2), dtype=torch.uint8)
    sf = torch.randint(0, 256, (*shape, K // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.rand(shape[0] if experts else (ROWS, 1)) + 0.5
    for offs in (None,) if experts else (None, offs_of(ROWS, 5)):
        actual = decompositions.dequantize_nvfp4(codes, sf, scale, offs, dtype)
        expected = reference.dequantize_nvfp4(codes, sf, scale, offs, dtype=dtype)
        known = ~expected.isnan()
        assert torch.equal(actual.isnan(), ~known)
        assert_bytes_equal(actual[known], expected[known])


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (300, 7), (3, 129, 6)], ids=str)
def test_decompositions_swizzle(shape: tuple[int, ...]) -> None:
    sf = torch.randint(0, 256, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert_bytes_equal(decompositions.swizzle_sf(sf), reference.swizzle_sf(sf))


def test_decompositions_leave_what_they_do_not_cover() -> None:
    x, per_expert, offs = torch.randn(9, K), torch.ones(5), offs_of(9, 5)
    codes, sf = reference.quantize_nvfp4(x, torch.ones(()))
    for result in (
        decompositions.quantize_nvfp4(x, per_expert, offs),
        decompositions.quantize_nvfp4(x, torch.ones(()), offs, True),
        decompositions.dequantize_nvfp4(codes, sf, per_expert, offs),
        decompositions.dequantize_nvfp4(codes, reference.swizzle_sf(sf), torch.ones(())),
        decompositions.swizzle_sf(sf, offs),
    ):
        assert result is NotImplemented


def test_decompositions_table_serves_export() -> None:
    class Quantize(torch.nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            return nvfp4_ops.quantize_nvfp4(x, scale, swizzled=True)

    inputs = (rows_of(torch.bfloat16), torch.tensor(0.002))
    program = torch.export.export(Quantize(), inputs).run_decompositions(table())
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("nvfp4_ops" in target for target in targets)
    expected = nvfp4_ops.quantize_nvfp4(*inputs, swizzled=True)
    assert_quantized_equal(program.module()(*inputs), expected)


# Fused with a neighbour.


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + 1e-6)
    return normed.to(x.dtype) * weight


def scaled(x: Tensor, weight: Tensor) -> Tensor:
    """So small that a compiler would rather compute it twice than store it."""
    return x * weight


def silu_mul(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize(
    ("neighbour", "stored", "swizzled", "device"),
    [
        # What these two leave out is the same code on a CPU, which compiles it for half a minute.
        (rms_norm, True, False, "cpu"),
        (scaled, False, True, "cpu"),
        *(
            pytest.param(neighbour, stored, swizzled, "cuda", marks=pytest.mark.gpu)
            for neighbour in (rms_norm, scaled, silu_mul)
            for stored in (True, False)
            for swizzled in (True, False)
        ),
    ],
)
@pytest.mark.usefixtures("_no_caches")
def test_decompose_quantizes_what_the_neighbour_would_store(
    neighbour: Callable[[Tensor, Tensor], Tensor], stored: bool, swizzled: bool, device: str
) -> None:
    """The codes are those of the rounded neighbour, also where nothing else needs its result."""

    def quantized(x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        y = neighbour(x, weight)
        codes, sf = nvfp4_ops.quantize_nvfp4(y, scale, swizzled=swizzled)
        return (y, codes, sf) if stored else (codes, sf)

    x = torch.randn(200, 1024).bfloat16().to(device)
    weight = torch.rand(1024).bfloat16().to(device)
    scale = torch.tensor(0.0013, device=device)
    with inductor.enabled(patterns=False, decompose=True):
        *y, codes, sf = torch.compile(quantized, dynamic=True)(x, weight, scale)
    assert counters["nvfp4_ops"]["decomposed"] == 1
    if not stored:
        y = [torch.compile(neighbour, dynamic=True)(x, weight)]
    expected = reference.quantize_nvfp4(y[0].cpu(), scale.cpu(), None, swizzled)
    if neighbour is rms_norm and not stored:
        # Another kernel may sum the squares in another order.
        differ = (codes.cpu() != expected[0]).sum()
        assert differ <= 1e-3 * codes.numel()
    else:
        assert_quantized_equal((codes.cpu(), sf.cpu()), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("_no_caches")
def test_decompose_rounds_what_it_dequantizes(device: str) -> None:
    def add(codes: Tensor, sf: Tensor, scale: Tensor, residual: Tensor) -> Tensor:
        values = nvfp4_ops.dequantize_nvfp4(codes, sf, scale, dtype=torch.bfloat16)
        return values.float() + residual

    x, scale = torch.randn(64, 256).bfloat16(), torch.tensor(0.0013)
    inputs = (*reference.quantize_nvfp4(x, scale), scale, torch.randn(64, 256))
    with inductor.enabled(patterns=False, decompose=True):
        actual = torch.compile(add)(*(tensor.to(device) for tensor in inputs))
    assert counters["nvfp4_ops"]["decomposed"] == 1
    assert_bytes_equal(actual.cpu(), add(*inputs))


def exp_activation(x: Tensor, scale: Tensor) -> Any:
    return nvfp4_ops.activate_and_quantize_nvfp4(x + 1, scale, activation="silu")


def squared_relu(x: Tensor, scale: Tensor) -> Any:
    return nvfp4_ops.activate_and_quantize_nvfp4(x + 1, scale, activation="relu2")


def of_an_input(x: Tensor, scale: Tensor) -> Any:
    return nvfp4_ops.quantize_nvfp4(x, scale)


def of_a_matmul(x: Tensor, scale: Tensor) -> Any:
    return nvfp4_ops.quantize_nvfp4(x @ x.T, scale)


def fp32_decoded(x: Tensor, scale: Tensor) -> Any:
    return nvfp4_ops.dequantize_nvfp4(*nvfp4_ops.quantize_nvfp4(x, scale), scale) + 1


CHOICES = {
    "exponential": (exp_activation, 0),
    "exact activation": (squared_relu, 1),
    "input": (of_an_input, 0),
    "matmul": (of_a_matmul, 0),
    "fp32": (fp32_decoded, 0),
}


@pytest.mark.parametrize(("function", "count"), CHOICES.values(), ids=CHOICES.keys())
def test_decompose_keeps_the_kernel_where_nothing_is_gained(
    function: Callable[[Tensor, Tensor], Any], count: int
) -> None:
    x, scale = torch.randn(32, 32).bfloat16(), torch.tensor(0.01)
    result, counts, _ = run_rewritten(function, x, scale, options=DECOMPOSE, dynamic=True)
    assert counts.get("decomposed", 0) == count
    expected = function(x, scale)
    assert type(result) is type(expected)
    for got, want in zip(result, expected, strict=True):
        assert_bytes_equal(got, want)
