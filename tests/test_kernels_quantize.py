"""The quantize and swizzle kernels: compiled anywhere, run and compared on a GPU."""

import os
import re
import struct
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from compare import assert_bytes_equal
from kernel_checks import (
    INF,
    NAN,
    POISON,
    assert_follows_previous_kernel,
    config_id,
    frames_and_registers,
    hard_values,
    offs_of,
    poisoned,
)
from ptx_machine import Kernel, Memory

import nvfp4_ops
from nvfp4_ops import format as nvfp4
from nvfp4_ops import reference

if not torch.cuda.is_available():
    os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")
pytest.importorskip("cutlass")
pytest.importorskip("tvm_ffi")

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32
from cutlass.cute.runtime import from_dlpack

from nvfp4_ops.kernels import blocks
from nvfp4_ops.kernels import quantize_rows as quantize
from nvfp4_ops.kernels import swizzle_sf as swizzle
from nvfp4_ops.kernels.launch.quantize_rows import (
    QuantizeConfig,
    choose_col_warps,
    choose_grid,
    prepare_quantize,
    prepare_round,
)
from nvfp4_ops.kernels.launch.swizzle_sf import SwizzleConfig, prepare_swizzle

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

QUANTIZE_CONFIGS = [
    QuantizeConfig(dtype, scale, swizzled, ragged)
    for dtype in DTYPES
    for scale in ("tensor", "row", "expert")
    for swizzled in (False, True)
    for ragged in (False, True)
    if ragged or scale != "expert"
]
ROUND_CONFIGS = [
    QuantizeConfig(dtype, scale, False, ragged, values=True, gather=gather)
    for dtype in DTYPES
    for scale, ragged in (("tensor", False), ("row", True), ("expert", True))
    for gather in (False, True)
]
SWIZZLE_CONFIGS = [
    SwizzleConfig(direction, ragged, row_align, threads)
    for direction in ("swizzle", "unswizzle")
    for ragged in (False, True)
    for row_align in (1, 4, 16)
    for threads in (128, 512)
]


# --- Compiled without a GPU -------------------------------------------------------------------


def build(config: Any, options: str = "") -> Any:
    module = swizzle if isinstance(config, SwizzleConfig) else quantize
    return module.build(config, options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests compile and run them")
@pytest.mark.parametrize(
    "config", [*QUANTIZE_CONFIGS, *ROUND_CONFIGS, *SWIZZLE_CONFIGS], ids=config_id
)
def test_kernels_compile_to_exact_arithmetic_in_registers(config: Any, tmp_path: Path) -> None:
    compiled = build(config, f"--keep-ptx --keep-cubin --dump-dir {tmp_path}")
    ptx = compiled.__ptx__
    frames, registers = frames_and_registers(tmp_path)
    assert frames
    assert not any(frames)
    for inexact in (".local", ".ftz", ".approx", "div.full"):
        assert inexact not in ptx
    assert_follows_previous_kernel(ptx)
    if isinstance(config, SwizzleConfig):
        assert "st.global.v4" in ptx or "ld.global.v4" in ptx
        return
    # Each block is loaded before the loop and, for the next step, in it.
    vectors = 2 * config.dtype.itemsize * nvfp4.BLOCK_SIZE // 16
    assert ptx.count("ld.global.v4.b32") == vectors * quantize.BLOCKS_PER_LANE
    # Reciprocals of the global scale, of its reciprocal, and of each block's scale.
    assert ptx.count("rcp.rn.f32") == 2 + quantize.BLOCKS_PER_LANE
    # The only sums are the rounding ones, whose products are exact: contracted or not.
    elements = quantize.BLOCKS_PER_LANE * nvfp4.BLOCK_SIZE
    sums = [len(re.findall(rf"\b{name}(\.rn)?\.f32", ptx)) for name in ("fma", "add", "sub")]
    assert sums == ([0, elements, elements] if config.values else [elements, 0, 0])
    if config.values:
        # Two stores a block, and two of zeros.
        assert ptx.count("st.global.v4") == 2 * quantize.BLOCKS_PER_LANE + 2
        assert "st.global.b8" not in ptx
    # As many CTAs at once as it was compiled for.
    assert registers * config.threads * config.resident_ctas <= 1 << 16


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests compile and run them")
@pytest.mark.parametrize("threads", [128, 256, 512])
@pytest.mark.parametrize("direction", ["swizzle", "unswizzle"])
def test_swizzle_ptx_gives_the_bytes_of_the_reference(
    direction: Literal["swizzle", "unswizzle"], threads: int, tmp_path: Path
) -> None:
    config = SwizzleConfig(direction, False, 16, threads)
    kernel = Kernel(build(config, f"--gpu-arch sm_90a --keep-ptx --dump-dir {tmp_path}").__ptx__)
    for rows, cols in ((300, 16), (129, 272), (260, 528)):
        check_swizzle_ptx(kernel, config, rows, cols, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests compile and run them")
@pytest.mark.parametrize("direction", ["swizzle", "unswizzle"])
def test_swizzle_ptx_finds_the_experts_of_ragged_rows(
    direction: Literal["swizzle", "unswizzle"], tmp_path: Path
) -> None:
    config = SwizzleConfig(direction, True, 16, 128)
    kernel = Kernel(build(config, f"--gpu-arch sm_90a --keep-ptx --dump-dir {tmp_path}").__ptx__)
    for num_experts in (1, 32, 33, 70):
        for offs in (
            offs_of(600, num_experts),
            offs_of(600, num_experts, 1.0),
            torch.full((num_experts,), 600),
            torch.zeros(num_experts),
            # All rows are the last expert's.
            torch.arange(num_experts) // (num_experts - 1 or 1) * 600,
        ):
            check_swizzle_ptx(kernel, config, 600, 16, offs.int())


def check_swizzle_ptx(
    kernel: Kernel, config: SwizzleConfig, rows: int, cols: int, offs: torch.Tensor | None
) -> None:
    scales = torch.randint(0, 127, (rows, cols), dtype=torch.uint8).view(torch.float8_e4m3fn)
    tiles = reference.swizzle_sf(scales, offs)
    linear, swizzled = scales.view(torch.uint8), tiles.view(torch.uint8)
    source, target, grid_rows = linear, swizzled, swizzled.shape[0]
    if config.direction == "unswizzle":
        source, target = swizzled, reference.unswizzle_sf(tiles, (rows, cols), offs)
        target = target.view(torch.uint8)
        grid_rows += 0 if offs is None else nvfp4.ceil_div(rows, nvfp4.SWIZZLE_TILE_ROWS)
    memory = Memory()
    addresses = memory.add(source), memory.add(torch.full_like(target, 0xAA))
    linear_at, swizzled_at = addresses if config.direction == "swizzle" else addresses[::-1]
    row_tiles, col_tiles, *_ = swizzled.shape
    params = [
        struct.pack("<q2i", linear_at, rows, cols),
        struct.pack("<q2i", swizzled_at, row_tiles, col_tiles),
        *([] if offs is None else [struct.pack("<qi4x", memory.add(offs), offs.shape[0])]),
        struct.pack("<i", rows),
    ]
    kernel.launch((grid_rows, nvfp4.ceil_div(col_tiles * 8, config.threads)), params, memory)
    assert torch.equal(memory.get(addresses[1], target), target)
    assert memory.writes(addresses[1], target) == [1]


def test_quantize_config_needs_offs_for_a_scale_per_expert() -> None:
    with pytest.raises(ValueError, match="ragged"):
        quantize.QuantizeKernel(QuantizeConfig(torch.bfloat16, "expert", False, False))
    with pytest.raises(ValueError, match="threads"):
        quantize.QuantizeKernel(QuantizeConfig(torch.bfloat16, "row", False, False, threads=100))
    with pytest.raises(ValueError, match="dtype"):
        quantize.QuantizeKernel(QuantizeConfig(torch.float64, "row", False, False))
    with pytest.raises(ValueError, match="swizzled: values have no block scales"):
        quantize.QuantizeKernel(QuantizeConfig(torch.float16, "row", True, False, values=True))
    with pytest.raises(ValueError, match="gather: only of values"):
        quantize.QuantizeKernel(QuantizeConfig(torch.float16, "row", False, False, gather=True))


@pytest.mark.parametrize("warps", [1, 4, 8])
@pytest.mark.parametrize("cols", [1, 4, 8, 16, 17, 48, 128, 180, 448])
def test_quantize_col_warps_waste_the_fewest_columns(cols: int, warps: int) -> None:
    chosen = choose_col_warps(cols, warps)
    assert warps % chosen == 0
    covered = {
        width: nvfp4.ceil_div(cols, width * quantize.SWIZZLED_COLS) * width
        for width in (1, 2, 4)
        if 2 * width <= warps or width == 1
    }
    assert covered[chosen] == min(covered.values())
    assert chosen == max(width for width, size in covered.items() if size == covered[chosen])


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("rows", [1, 127, 129, 16384])
@pytest.mark.parametrize("cols", [1, 7, 48, 128, 448])
def test_quantize_grid_covers_every_block_once(
    rows: int, cols: int, swizzled: bool, ragged: bool
) -> None:
    """The kernel's index arithmetic, of CTA, warp and lane, in integers on the host."""
    config = QuantizeConfig(torch.bfloat16, "tensor", swizzled, ragged)
    row_tiles = nvfp4.swizzled_shape((rows, cols), 3 if ragged else None)[0]
    grid_rows, grid_steps, col_warps = choose_grid(config, rows, cols, row_tiles, 132)
    warps = config.threads // 32
    assert warps % col_warps == 0
    lanes = quantize.SWIZZLED_LANES if swizzled else quantize.LINEAR_LANES
    cols_per_step = quantize.BLOCKS_PER_LANE * lanes * col_warps
    lane = torch.arange(lanes)
    starts = [
        warp_col * quantize.SWIZZLED_COLS + step * cols_per_step + i * lanes
        for step in range(nvfp4.ceil_div(cols, cols_per_step))
        for warp_col in range(col_warps)
        for i in range(quantize.BLOCKS_PER_LANE)
    ]
    covered = torch.cat([start + lane for start in starts])
    assert torch.equal(covered.sort().values, torch.arange(covered.numel()))
    assert covered.numel() >= cols
    assert 1 <= grid_steps <= nvfp4.ceil_div(cols, cols_per_step)
    units = row_tiles * nvfp4.SWIZZLE_LINES if swizzled else rows
    assert 0 <= grid_rows * (warps // col_warps) - units < warps // col_warps


@cute.jit
def _minimum(value: Float32, limit: cutlass.Constexpr[float]) -> Float32:
    result = Float32(limit)
    # False for NaN: the device's minimum returns the limit for it too.
    if value < limit:
        result = value
    return result


@cute.jit
def _maximum(value: Float32, limit: cutlass.Constexpr[float]) -> Float32:
    result = Float32(limit)
    if value > limit:
        result = value
    return result


class HostOps:
    """``DeviceOps`` of plain operators, which the DSL also compiles for the host."""

    minimum = staticmethod(_minimum)
    maximum = staticmethod(_maximum)

    @staticmethod
    def absolute(value: Float32) -> Float32:
        return (value.bitcast(Uint32) & Uint32(0x7FFFFFFF)).bitcast(Float32)

    @staticmethod
    def permute_bytes(low: Uint32, high: Uint32, selector: int) -> Uint32:
        word = Uint32(0)
        for byte in range(4):
            index = (selector >> (4 * byte)) & 7
            source = low if index < 4 else high
            word = word | (((source >> (8 * (index % 4))) & Uint32(0xFF)) << (8 * byte))
        return word

    @staticmethod
    def add_shifted(first: Uint32, second: Uint32) -> Uint32:
        return first + second * Uint32(16)


@cute.jit
def _encode_on_host(values: cute.Tensor, words: cute.Tensor, count: Int32):
    for i in cutlass.range(count):
        inputs = []
        for j in cutlass.range_constexpr(8):
            inputs.append(Float32(values[8 * i + j]))
        words[i] = Int32(blocks.magnitude_word(inputs, HostOps))


def encode_on_host(values: torch.Tensor) -> torch.Tensor:
    """Codes of fp32 values >= 0 by the kernel's own arithmetic, run on the CPU."""
    words = torch.empty(values.numel() // 8, dtype=torch.int32)
    _encode_on_host(from_dlpack(values), from_dlpack(words), Int32(words.numel()))
    return reference.unpack_codes(words.view(torch.uint8))


@cute.jit
def _round_on_host(values: cute.Tensor, rounded: cute.Tensor, count: Int32):
    for i in cutlass.range(count):
        rounded[i] = blocks.round_e2m1(Float32(values[i]), HostOps)


def hard_magnitudes() -> torch.Tensor:
    """Every bf16 >= 0, and every fp32 within 4096 steps of a value or tie of e2m1."""
    every_bf16 = torch.arange(0x8000, dtype=torch.int32) << 16
    steps = torch.arange(-4096, 4096, dtype=torch.int32)
    values = torch.tensor(nvfp4.E2M1_VALUES)
    centers = torch.cat([values[1:], (values[1:] + values[:-1]) / 2, torch.tensor([7.0, 8.0])])
    near = (centers.view(torch.int32).unsqueeze(-1) + steps).flatten()
    tiny = torch.arange(8192, dtype=torch.int32)
    return torch.cat([every_bf16, near, tiny]).view(torch.float32)


def test_round_e2m1_rounds_like_the_reference() -> None:
    magnitudes = hard_magnitudes()
    # A NaN comes without a sign.
    inputs = torch.cat([magnitudes, -magnitudes[~magnitudes.isnan()]])
    rounded = torch.empty_like(inputs)
    _round_on_host(from_dlpack(inputs), from_dlpack(rounded), Int32(inputs.numel()))
    expected = reference.decode_e2m1(reference.encode_e2m1(inputs))
    assert_bytes_equal(rounded, expected)


def test_magnitude_word_rounds_like_the_reference() -> None:
    inputs = hard_magnitudes()
    # All positions in a word.
    for shift in range(8):
        shifted = inputs.roll(shift)
        assert torch.equal(encode_on_host(shifted), reference.encode_e2m1(shifted) & 7)


# --- Run on a GPU -----------------------------------------------------------------------------

get_compiled = cache(build)


def check_quantize(
    x: torch.Tensor, scale: torch.Tensor, offs: torch.Tensor | None, x_cuda: torch.Tensor
) -> None:
    num_experts = None if offs is None else offs.shape[0]
    offs_cuda = None if offs is None else offs.cuda()
    for swizzled in (False, True):
        codes, sf = reference.quantize_nvfp4(x, scale, offs, swizzled)
        codes_cuda, sf_cuda = poisoned(codes.shape), poisoned(sf.shape)
        args = (x_cuda, scale.cuda(), offs_cuda)
        row_tiles = sf.shape[0] if swizzled else None
        launch = prepare_quantize(*args, get_compiled, row_tiles=row_tiles)
        launch(*args, codes_cuda, sf_cuda.view(torch.float8_e4m3fn))
        assert torch.equal(codes_cuda.cpu(), codes), (swizzled, num_experts)
        assert torch.equal(sf_cuda.cpu(), sf.view(torch.uint8)), (swizzled, num_experts)


SHAPES = [(9, 16), (1, 2880), (127, 112), (128, 64), (129, 1040), (300, 2048), (64, 8192)]


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_kernel_gives_the_bytes_of_the_reference(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    x = hard_values(*shape).to(dtype)
    rows = x.shape[0]
    offs = offs_of(rows, 5)
    per_row = reference.global_scale(x, per_token=True)
    for scale in (torch.tensor(0.01), per_row):
        check_quantize(x, scale, None, x.cuda())
        check_quantize(x, scale, offs, x.cuda())
    check_quantize(x, torch.rand(5) * 0.01 + 1e-4, offs, x.cuda())


def assert_same_values(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Same bytes, but for the payload of NaNs."""
    actual = actual.cpu()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert_bytes_equal(actual.nan_to_num(nan=1.5), expected.nan_to_num(nan=1.5))


def check_round(x: torch.Tensor, scale: torch.Tensor, offs: torch.Tensor | None) -> None:
    offs_cuda = None if offs is None else offs.cuda()
    out = poisoned((x.shape[0], 2 * x.shape[1])).view(torch.bfloat16)
    args = (x.cuda(), scale.cuda(), offs_cuda, None)
    prepare_round(*args, get_compiled)(*args, out)
    assert_same_values(out, reference.round_nvfp4(x, scale, offs))


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_kernel_gives_the_bytes_of_the_reference(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    x = hard_values(*shape).to(dtype)
    offs = offs_of(shape[0], 5)
    for scale in (torch.tensor(0.01), reference.global_scale(x, per_token=True)):
        check_round(x, scale, None)
        check_round(x, scale, offs)
    for ends in (offs, torch.zeros_like(offs), torch.full_like(offs, shape[0])):
        check_round(x, torch.rand(5) * 0.01 + 1e-4, ends)


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("exponent", [-149, -127, -126, -100, 0, 100, 119, 125, 127])
def test_round_kernel_with_extreme_global_scales(dtype: torch.dtype, exponent: int) -> None:
    x = hard_values(40, 256)
    x[20:30] *= 2.0**-130
    x[30:40, ::16] = -INF
    x = x.to(dtype)
    for factor in (1.0, 1.7):
        scale = torch.tensor(factor * 2.0**exponent, dtype=torch.float64).float()
        check_round(x, scale, None)
    for special in (0.0, INF, NAN, torch.finfo(torch.float32).max):
        check_round(x, torch.tensor(special), None)


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("k", [16, 768, 2880, 7168, 20000])
@pytest.mark.parametrize("num_tokens", [1, 9, 131])
def test_round_ops_gather_like_the_reference(dtype: torch.dtype, k: int, num_tokens: int) -> None:
    x, num_rows = hard_values(num_tokens, k).to(dtype), 137
    tokens = torch.randint(-1, num_tokens, (num_rows,), dtype=torch.int32)
    no_rows, scale = torch.zeros(5, dtype=torch.int32), torch.tensor(0.01)
    cases = [
        (None, None),
        (offs_of(num_tokens, 5), None),
        (None, tokens),
        (offs_of(num_rows, 5), tokens),
        (no_rows, tokens),
        (no_rows, tokens[:0]),
    ]
    for case in cases:
        offs_cuda, tokens_cuda = (None if t is None else t.cuda() for t in case)
        actual = nvfp4_ops.round_nvfp4(x.cuda(), scale.cuda(), offs_cuda, token_of_row=tokens_cuda)
        assert_same_values(actual, reference.round_nvfp4(x, scale, *case))
        rows = nvfp4_ops.round_per_token_nvfp4(x.cuda(), offs_cuda, token_of_row=tokens_cuda)
        for got, want in zip(rows, reference.round_per_token_nvfp4(x, *case), strict=True):
            assert_same_values(got, want)


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("exponent", [-149, -127, -126, -100, 0, 100, 119, 125, 127])
def test_quantize_kernel_with_extreme_global_scales(dtype: torch.dtype, exponent: int) -> None:
    x = hard_values(40, 256)
    x[10:20] *= 2.0 ** max(min(exponent, 100), -100)
    x[20:30] *= 2.0**-130
    x[30:40, ::16] = -INF
    x = x.to(dtype)
    for factor in (1.0, 1.7):
        scale = torch.tensor(factor * 2.0**exponent, dtype=torch.float64).float()
        check_quantize(x, scale, None, x.cuda())
    for special in (0.0, INF, NAN, torch.finfo(torch.float32).max):
        check_quantize(x, torch.tensor(special), None, x.cuda())


@pytest.mark.gpu
@pytest.mark.parametrize("num_experts", [1, 3, 70, 257, 1024])
def test_quantize_kernel_with_ragged_rows(num_experts: int) -> None:
    x = hard_values(700, 208).bfloat16()
    ends = torch.arange(1, num_experts + 1)
    cases = [
        offs_of(700, num_experts),
        offs_of(700, num_experts, 1.0),
        torch.full((num_experts,), 700),
        torch.zeros(num_experts),
        ends * 700 // num_experts,
    ]
    for case in cases:
        offs = case.int()
        check_quantize(x, torch.rand(num_experts) * 0.01 + 1e-4, offs, x.cuda())
        check_quantize(x, torch.tensor(0.003), offs, x.cuda())


@pytest.mark.gpu
def test_quantize_op_with_empty_inputs() -> None:
    """No rows still have pads to zero; the op leaves these to the reference."""
    for x, offs in (
        (torch.empty(0, 64, dtype=torch.bfloat16), None),
        (torch.empty(0, 64, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int32)),
        (torch.empty(4, 0, dtype=torch.bfloat16), None),
    ):
        scale = torch.ones(())
        for swizzled in (False, True):
            expected = nvfp4_ops.quantize_nvfp4(x, scale, offs, swizzled=swizzled)
            offs_cuda = None if offs is None else offs.cuda()
            actual = nvfp4_ops.quantize_nvfp4(x.cuda(), scale.cuda(), offs_cuda, swizzled=swizzled)
            for a, e in zip(actual, expected, strict=True):
                assert a.shape == e.shape
                assert torch.equal(a.cpu().view(torch.uint8), e.view(torch.uint8))


@pytest.mark.gpu
@every_dtype
def test_quantize_kernel_with_strided_rows(dtype: torch.dtype) -> None:
    wide = hard_values(200, 400).to(dtype)
    wide_cuda = wide.cuda()
    check_quantize(wide[:, 16:336], torch.tensor(0.01), None, wide_cuda[:, 16:336])
    every_other = wide_cuda[::2, 32:48]
    check_quantize(wide[::2, 32:48], torch.tensor(0.01), None, every_other)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        check_quantize(wide[:, 1:17], torch.tensor(0.01), None, wide_cuda[:, 1:17])


@pytest.mark.gpu
@every_dtype
def test_quantize_kernel_with_many_rows(dtype: torch.dtype) -> None:
    x = hard_values(12000, 2880).to(dtype)
    check_quantize(x, reference.global_scale(x, per_token=True), None, x.cuda())
    check_quantize(x, torch.rand(64) * 0.01 + 1e-4, offs_of(12000, 64), x.cuda())


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [1, 4, 7, 12, 16, 63, 90, 128, 180, 512, 1041])
@pytest.mark.parametrize("rows", [0, 1, 31, 127, 128, 129, 700])
def test_swizzle_kernel_gives_the_bytes_of_the_reference(rows: int, columns: int) -> None:
    sf = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    weights = torch.randint(0, 256, (3, rows, columns), dtype=torch.uint8)
    cases = [(sf, None), (weights, None)]
    cases += [(sf, offs_of(rows, experts)) for experts in (1, 5, 300)]
    cases += [(sf, torch.full((2,), rows, dtype=torch.int32))]
    for linear, offs in cases:
        scales = linear.view(torch.float8_e4m3fn)
        offs_cuda = None if offs is None else offs.cuda()
        expected = reference.swizzle_sf(scales, offs)
        swizzled = poisoned(expected.shape)
        if expected.numel() == 0:
            continue
        launch = prepare_swizzle("swizzle", scales.cuda(), offs_cuda, get_compiled)
        launch(scales.cuda(), swizzled, offs_cuda)
        assert torch.equal(swizzled.cpu(), expected.view(torch.uint8))
        back = poisoned(linear.shape)
        launch = prepare_swizzle("unswizzle", back, offs_cuda, get_compiled)
        launch(back, swizzled, offs_cuda)
        wanted = reference.unswizzle_sf(expected, tuple(linear.shape), offs)
        assert torch.equal(back.cpu(), wanted.view(torch.uint8))


@pytest.mark.gpu
def test_kernels_replay_in_a_cuda_graph_with_new_offs() -> None:
    x = torch.randn(300, 256).bfloat16()
    static_x, offs = x.cuda(), offs_of(300, 6).cuda()
    shape = nvfp4.swizzled_shape((300, 16), 6)
    codes, sf = poisoned((300, 128)), poisoned(shape)
    scale = torch.tensor(0.01)

    scale_cuda = scale.cuda()
    prepared = prepare_quantize(static_x, scale_cuda, offs, get_compiled, row_tiles=shape[0])

    def launch() -> None:
        prepared(static_x, scale_cuda, offs, codes, sf)

    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for _ in range(3):
        new_offs = offs_of(300, 6)
        offs.copy_(new_offs)
        codes.fill_(POISON)
        sf.fill_(POISON)
        graph.replay()
        expected = reference.quantize_nvfp4(x, scale, new_offs, True)
        assert torch.equal(codes.cpu(), expected[0])
        assert torch.equal(sf.cpu(), expected[1].view(torch.uint8))
