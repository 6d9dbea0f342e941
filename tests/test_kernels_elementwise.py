"""Global scales, decoding and the fused activation: compiled anywhere, compared on a GPU."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_checks import (
    INF,
    NAN,
    assert_follows_previous_kernel,
    config_id,
    frames_and_registers,
    hard_values,
    offs_of,
    poisoned,
)

import nvfp4_ops
from nvfp4_ops import Activation, reference
from nvfp4_ops import format as nvfp4

if not torch.cuda.is_available():
    os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")
pytest.importorskip("cutlass")
pytest.importorskip("tvm_ffi")

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint32
from cutlass.cute.runtime import from_dlpack

from nvfp4_ops.kernels import amax, decode, per_token
from nvfp4_ops.kernels import quantize_rows as quantize
from nvfp4_ops.kernels.launch.amax import VECTORS_PER_LANE, AmaxConfig
from nvfp4_ops.kernels.launch.decode import DecodeConfig, prepare_decode
from nvfp4_ops.kernels.launch.per_token import PerTokenConfig
from nvfp4_ops.kernels.launch.per_token import choose_config as choose_per_token
from nvfp4_ops.kernels.launch.quantize_rows import QuantizeConfig

BF16, FP16, FP32 = DTYPES = (torch.bfloat16, torch.float16, torch.float32)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
MODULES = {
    AmaxConfig: amax,
    DecodeConfig: decode,
    PerTokenConfig: per_token,
    QuantizeConfig: quantize,
}

AMAX_CONFIGS = [
    *(AmaxConfig(dtype, "row", row_warps) for dtype in DTYPES for row_warps in (1, 8)),
    *(AmaxConfig(dtype, "part") for dtype in DTYPES),
]
DECODE_CONFIGS = [
    *(
        DecodeConfig(BF16, "none", swizzled, ragged)
        for swizzled in (False, True)
        for ragged in (False, True)
    ),
    DecodeConfig(BF16, "tensor", False, False),
    DecodeConfig(FP16, "expert", True, False),
    DecodeConfig(FP32, "row", True, True),
    DecodeConfig(FP32, "expert", False, True),
]
ACTIVATED_CONFIGS = [
    QuantizeConfig(BF16, "tensor", False, False, "silu_mul"),
    QuantizeConfig(BF16, "row", False, True, "relu2"),
    QuantizeConfig(FP16, "expert", False, True, "gelu_tanh_mul"),
    QuantizeConfig(BF16, "row", True, True, "swiglu_oai", 7.0),
    QuantizeConfig(FP32, "expert", True, True, "silu_mul", 10.0),
]

PER_TOKEN_CONFIGS = [
    choose_per_token(BF16, 2048),
    choose_per_token(FP16, 16384, ragged=True),
    choose_per_token(FP32, 16384),
    choose_per_token(BF16, 16384, ragged=True, activation="silu_mul"),
    choose_per_token(FP32, 8192, activation="swiglu_oai", limit=7.0),
    *(
        choose_per_token(dtype, k, ragged=not gather, values=True, gather=gather)
        for dtype in DTYPES
        for k in (768, 7168, 16384)
        for gather in (False, True)
    ),
]

# --- Compiled without a GPU -------------------------------------------------------------------


def build(config: Any, options: str = "") -> Any:
    return MODULES[type(config)].build(config, options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests compile and run them")
@pytest.mark.parametrize(
    "config",
    [*AMAX_CONFIGS, *DECODE_CONFIGS, *ACTIVATED_CONFIGS, *PER_TOKEN_CONFIGS],
    ids=config_id,
)
def test_kernels_compile_without_a_stack(config: Any, tmp_path: Path) -> None:
    ptx = build(config, f"--keep-ptx --keep-cubin --dump-dir {tmp_path}").__ptx__
    frames, registers = frames_and_registers(tmp_path)
    assert frames
    assert not any(frames)
    assert ".local" not in ptx
    assert "div.full" not in ptx
    assert_follows_previous_kernel(ptx)
    if isinstance(config, AmaxConfig):
        assert ptx.count("ld.global.v4") == VECTORS_PER_LANE
        assert ptx.count("div.rn.f32") == (config.of == "row")
    elif isinstance(config, DecodeConfig):
        assert "fma" not in ptx
        # Half of the threads that a multiprocessor has.
        assert registers <= 64
    elif isinstance(config, QuantizeConfig):
        assert registers * config.threads * config.resident_ctas <= 1 << 16


@pytest.mark.parametrize("activation", ["none", "silu_mul"])
@every_dtype
def test_per_token_config_holds_the_row(dtype: torch.dtype, activation: str) -> None:
    limit = 8192 if dtype == FP32 and activation == "silu_mul" else 16384
    for k in (16, 512, 768, 2048, 2880, 4096, 7168, limit):
        config = choose_per_token(dtype, k, activation=activation)
        assert config is not None
        num_blocks = 32 * config.row_warps * config.blocks_per_lane
        assert k <= 16 * num_blocks
        # Not more idle lanes than the next smaller power of two would have.
        assert num_blocks < 2 * max(k // 16, 32)
    assert choose_per_token(dtype, limit + 16, activation=activation) is None


def test_kernel_configs_are_checked() -> None:
    with pytest.raises(ValueError, match="without a global scale only bfloat16"):
        decode.DecodeKernel(DecodeConfig(FP32, "none", False, False))
    with pytest.raises(ValueError, match="scale: must be none, tensor, row or expert"):
        decode.DecodeKernel(DecodeConfig(FP32, "column", False, False))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not an amax config"):
        amax.AmaxKernel(AmaxConfig(BF16, "row", row_warps=3))
    with pytest.raises(ValueError, match="activation: must be one of"):
        quantize.QuantizeKernel(QuantizeConfig(BF16, "tensor", False, False, "silu_mull"))


@cute.jit
def _spread_on_host(codes: cute.Tensor, words: cute.Tensor, count: Int32):
    for i in cutlass.range(count):
        words[i] = Int32(decode.spread_byte(Uint32(codes[i])))


def test_spread_byte_is_the_value_of_every_pair_of_codes() -> None:
    codes = torch.arange(256, dtype=torch.int32)
    words = torch.empty_like(codes)
    _spread_on_host(from_dlpack(codes), from_dlpack(words), Int32(256))
    values = words.view(torch.bfloat16).double().view(256, 2) * 2.0**126
    expected = reference.decode_e2m1(reference.unpack_codes(codes.to(torch.uint8).unsqueeze(1)))
    assert torch.equal(values, expected.double())
    assert torch.equal(values.signbit(), expected.signbit())


OPS = (
    "activate_and_quantize_nvfp4",
    "dequantize_nvfp4",
    "global_scale",
    "quantize_per_token_nvfp4",
    "round_nvfp4",
    "round_per_token_nvfp4",
)

# --- Run on a GPU -----------------------------------------------------------------------------

get_compiled = cache(build)


def assert_same_values(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Same bytes, but for the payload of NaNs."""
    actual = actual.cpu()
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(actual[numbers], expected[numbers])
    assert torch.equal(actual[numbers].signbit(), expected[numbers].signbit())


def scale_inputs(rows: int, columns: int) -> torch.Tensor:
    """Also rows of the smallest and largest scales, in no particular order."""
    x = hard_values(rows, columns)
    x[-1] *= 2.0**-140
    return x[torch.randperm(x.shape[0])]


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize(
    "shape",
    [(9, 16), (16, 48), (127, 2880), (300, 7168), (40000, 64), (11, 100000)],
    ids=str,
)
def test_global_scale_kernel_gives_the_bits_of_the_reference(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    x = scale_inputs(*shape).to(dtype)
    actual = nvfp4_ops.global_scale(x.cuda(), per_token=True)
    assert_same_values(actual, reference.global_scale(x, per_token=True))
    finite = x[x.float().isfinite().all(dim=1)]
    for part in (x, finite, finite[:1], torch.zeros(3, 32, dtype=dtype)):
        assert_same_values(nvfp4_ops.global_scale(part.cuda()), reference.global_scale(part))


@pytest.mark.gpu
@every_dtype
def test_global_scale_kernel_finds_every_element(dtype: torch.dtype) -> None:
    """A maximum, a NaN and an Inf at each position of the last rows, and at both ends."""
    x = torch.zeros(70, 1040, dtype=dtype, device="cuda")
    positions = [0, 1, 69 * 1040, *range(x.numel() - 300, x.numel(), 7), x.numel() - 1]
    for position in positions:
        for value in (-3.0, NAN, -INF):
            flat = x.zero_().view(-1)
            flat[5], flat[position] = 1.0, value
            assert_same_values(nvfp4_ops.global_scale(x), reference.global_scale(x.cpu()))
            per_row = nvfp4_ops.global_scale(x, per_token=True)
            assert_same_values(per_row, reference.global_scale(x.cpu(), per_token=True))


@pytest.mark.gpu
def test_global_scale_kernel_with_strided_rows() -> None:
    wide = torch.randn(200, 400).bfloat16()
    # Rows that start at multiples of 16 bytes, and rows that do not.
    for part in (slice(16, 336), slice(1, 17), slice(0, 400)):
        x, x_cuda = wide[::3, part], wide.cuda()[::3, part]
        for of_rows in (False, True):
            expected = reference.global_scale(x, of_rows)
            assert_same_values(nvfp4_ops.global_scale(x_cuda, of_rows), expected)


def check_dequantize(
    codes: torch.Tensor,
    sf: torch.Tensor,
    scale: torch.Tensor,
    offs: torch.Tensor | None,
    dtype: torch.dtype,
) -> None:
    offs_cuda = None if offs is None else offs.cuda()
    for scales in (sf, reference.swizzle_sf(sf, offs)):
        expected = reference.dequantize_nvfp4(codes, scales, scale, offs, dtype=dtype)
        actual = nvfp4_ops.dequantize_nvfp4(
            codes.cuda(), scales.cuda(), scale.cuda(), offs_cuda, dtype=dtype
        )
        assert_same_values(actual, expected)


def random_quantized(*lead: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Any codes and scales, negative ones and NaN among them."""
    codes = torch.randint(0, 256, (*lead, k // 2), dtype=torch.uint8)
    sf = torch.randint(0, 256, (*lead, k // 16), dtype=torch.uint8)
    return codes, sf.view(torch.float8_e4m3fn)


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("k", [16, 48, 1040, 4096])
@pytest.mark.parametrize("rows", [1, 127, 128, 129, 700])
def test_dequantize_kernel_gives_the_bits_of_the_reference(
    rows: int, k: int, dtype: torch.dtype
) -> None:
    codes, sf = random_quantized(rows, k=k)
    check_dequantize(codes, sf, torch.tensor(0.0123), None, dtype)
    check_dequantize(codes, sf, torch.rand(rows, 1), None, dtype)
    for num_experts in (1, 5, 300):
        offs = offs_of(rows, num_experts)
        check_dequantize(codes, sf, torch.rand(num_experts), offs, dtype)
        check_dequantize(codes, sf, torch.tensor(0.0123), offs, dtype)
    on_one = torch.full((3,), rows, dtype=torch.int32)
    check_dequantize(codes, sf, torch.rand(rows, 1), on_one, dtype)
    check_dequantize(codes, sf, torch.rand(3), torch.zeros_like(on_one), dtype)


@pytest.mark.gpu
@every_dtype
def test_dequantize_kernel_with_weights(dtype: torch.dtype) -> None:
    codes, sf = random_quantized(5, 200, k=112)
    for scale in (torch.tensor(0.0123), torch.rand(5)):
        check_dequantize(codes, sf, scale, None, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("num_experts", [1, 6, 257])
def test_decode_kernel_is_exact_in_bf16(num_experts: int) -> None:
    codes, sf = random_quantized(300, k=2064)
    offs = offs_of(300, num_experts)
    expected = reference.decode_blocks(codes, sf, BF16)
    expected[offs[-1] :] = 0
    # What lies past the end is not read.
    sf.view(torch.uint8)[offs[-1] :] = 0x7F
    for scales in (sf, reference.swizzle_sf(sf, offs)):
        out = poisoned((300, 4128)).view(BF16)
        args = (codes.cuda(), scales.cuda(), None, offs.cuda())
        prepare_decode(*args, BF16, get_compiled)(*args, out)
        assert_same_values(out, expected)


def check_activated(
    x: torch.Tensor, scale: torch.Tensor, offs: torch.Tensor | None, act: Activation, share: float
) -> None:
    """Equal bytes, but for a share of codes whose activated value rounded to a neighbour."""
    offs_cuda = None if offs is None else offs.cuda()
    for swizzled in (False, True):
        expected = reference.activate_and_quantize_nvfp4(x, scale, act, offs, swizzled)
        actual = nvfp4_ops.activate_and_quantize_nvfp4(
            x.cuda(), scale.cuda(), offs_cuda, activation=act, swizzled=swizzled
        )
        for got, want in zip(actual, expected, strict=True):
            assert got.shape == want.shape
            differ = got.cpu().view(torch.uint8) != want.view(torch.uint8)
            assert differ.sum() <= share * differ.numel()
        values = [
            reference.dequantize_nvfp4(codes.cpu(), sf.cpu(), scale, offs)
            for codes, sf in (actual, expected)
        ]
        # A neighbouring code is at most a third of the largest of its block away.
        got, want = (value.unflatten(-1, (-1, nvfp4.BLOCK_SIZE)) for value in values)
        assert torch.equal(got.isnan(), want.isnan())
        bound = 0.4 * want.abs().amax(dim=-1, keepdim=True)
        assert ((got - want).abs() <= bound).logical_or(want.isnan()).all()


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("shape", [(1, 32), (129, 2080), (300, 4096)], ids=str)
def test_activate_and_quantize_kernel_with_exact_activations(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    x = hard_values(*shape).to(dtype)
    rows = x.shape[0]
    offs = offs_of(rows, 5)
    for act in (Activation("relu2"), Activation("relu2_mul"), Activation("none")):
        for scale in (torch.tensor(0.01), torch.rand(rows, 1) * 0.01 + 1e-4):
            check_activated(x, scale, None, act, 0.0)
        check_activated(x, torch.rand(5) * 0.01 + 1e-4, offs, act, 0.0)


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize(
    "act",
    [
        Activation("silu"),
        Activation("silu_mul"),
        Activation("silu_mul", 2.0),
        Activation("gelu_tanh"),
        Activation("gelu_tanh_mul"),
        Activation("swiglu_oai"),
    ],
    ids=lambda act: f"{act.name}-{act.limit}",
)
def test_activate_and_quantize_kernel_is_near_the_reference(
    dtype: torch.dtype, act: Activation
) -> None:
    x = (3 * torch.randn(300, 2080)).to(dtype)
    x[5, 3], x[6, 5], x[7, 7] = NAN, INF, -INF
    offs = offs_of(300, 257)
    check_activated(x, torch.tensor(0.002), None, act, 1e-3)
    check_activated(x, torch.rand(257) * 0.01 + 1e-3, offs, act, 1e-3)


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("k", [16, 768, 2880, 7168, 20000])
def test_quantize_per_token_kernel_gives_the_bytes_of_the_reference(
    dtype: torch.dtype, k: int
) -> None:
    for act in (Activation("none"), Activation("relu2"), Activation("relu2_mul")):
        x = hard_values(131, 2 * k if act.gated else k).to(dtype)
        on_one = torch.full((3,), 131, dtype=torch.int32)
        for offs in (None, offs_of(131, 5), offs_of(131, 300), on_one, torch.zeros_like(on_one)):
            offs_cuda = None if offs is None else offs.cuda()
            for swizzled in (False, True):
                expected = reference.quantize_per_token_nvfp4(x, act, offs, swizzled)
                actual = nvfp4_ops.quantize_per_token_nvfp4(
                    x.cuda(), offs_cuda, activation=act, swizzled=swizzled
                )
                for got, want in zip(actual[:2], expected[:2], strict=True):
                    assert torch.equal(got.cpu().view(torch.uint8), want.view(torch.uint8))
                assert_same_values(actual[2], expected[2])


@pytest.mark.gpu
def test_elementwise_ops_replay_in_a_cuda_graph_with_new_inputs() -> None:
    """A chain of kernels that follow each other closely, each on the previous one's output."""
    x, offs = torch.randn(300, 512).bfloat16().cuda(), offs_of(300, 6).cuda()

    def chain() -> tuple[torch.Tensor, ...]:
        scale = nvfp4_ops.global_scale(x)
        codes, sf = nvfp4_ops.quantize_nvfp4(x, scale, offs, swizzled=True)
        linear = nvfp4_ops.unswizzle_sf(sf, (300, 32), offs)
        decoded = nvfp4_ops.dequantize_nvfp4(codes, linear, scale, offs, dtype=BF16)
        per_row = nvfp4_ops.global_scale(decoded, per_token=True)
        act = nvfp4_ops.activate_and_quantize_nvfp4(decoded, per_row, offs, activation="relu2_mul")
        rows = nvfp4_ops.quantize_per_token_nvfp4(decoded, offs, activation="relu2", swizzled=True)
        return scale, codes, sf, linear, decoded, per_row, *act, *rows

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = chain()
    for seed in range(5):
        torch.manual_seed(seed)
        x.copy_(torch.randn(300, 512))
        offs.copy_(offs_of(300, 6))
        graph.replay()
        replayed = [t.clone() for t in static]
        x_cpu, offs_cpu = x.cpu(), offs.cpu()
        scale = reference.global_scale(x_cpu)
        codes, sf = reference.quantize_nvfp4(x_cpu, scale, offs_cpu, True)
        linear = reference.unswizzle_sf(sf, (300, 32), offs_cpu)
        decoded = reference.dequantize_nvfp4(codes, linear, scale, offs_cpu, dtype=BF16)
        per_row = reference.global_scale(decoded, per_token=True)
        act = reference.activate_and_quantize_nvfp4(
            decoded, per_row, Activation("relu2_mul"), offs_cpu
        )
        rows = reference.quantize_per_token_nvfp4(decoded, Activation("relu2"), offs_cpu, True)
        expected = (scale, codes, sf, linear, decoded, per_row, *act, *rows)
        for i, (got, want) in enumerate(zip(replayed, expected, strict=True)):
            as_bytes = [t.cpu().contiguous().view(-1).view(torch.uint8) for t in (got, want)]
            assert torch.equal(*as_bytes), i


@pytest.mark.gpu
def test_elementwise_kernels_serve_the_ops() -> None:
    x = torch.randn(4, 64, device="cuda")
    for of_rows in (False, True):
        assert nvfp4_ops.kernels.why_no_global_scale(x, of_rows) is None
        reason = nvfp4_ops.kernels.why_no_global_scale(x[:3, :60], of_rows)
        assert "multiple of 16" in str(reason)
    assert nvfp4_ops.global_scale(x[0, 0]) == reference.global_scale(x[0, 0].cpu())
    served = nvfp4_ops.backend_info()
    for op in OPS:
        assert served[op]["cuda"].startswith("CuTe DSL")
