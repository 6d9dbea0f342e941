"""Prepacked weights and the Hopper grouped mm: the layout on any machine, the kernel on a GPU."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_bytes_equal
from torch import Tensor

import nvfp4_ops
from nvfp4_ops import Activation, kernels
from nvfp4_ops.kernels import prepack_sm90
from nvfp4_ops.kernels.grouped_mm_config import (
    GroupedMmConfig,
    choose_config,
    tokens_of_every_config,
)

SHAPES = [(128, 128), (16, 16), (192, 112), (96, 2880), (320, 256)]
GATED_SHAPES = [(128, 128), (32, 16), (192, 112), (96, 2880), (320, 256)]


def random_weights(num_experts: int, n: int, k: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Every code and every finite positive e4m3 scale."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (num_experts, n, k // 2), dtype=torch.uint8, generator=generator)
    sf = torch.randint(1, 0x7F, (num_experts, n, k // 16), dtype=torch.uint8, generator=generator)
    return codes, sf.view(torch.float8_e4m3fn)


def decode(codes: Tensor, sf: Tensor) -> Tensor:
    return nvfp4_ops.dequantize_nvfp4(codes, sf, torch.ones((), device=codes.device))


LAYOUTS = [(False, *shape) for shape in SHAPES] + [(True, *shape) for shape in GATED_SHAPES]


@pytest.mark.parametrize(("gated", "n", "k"), LAYOUTS, ids=str)
def test_prepack_recovers_every_byte(gated: bool, n: int, k: int) -> None:
    codes, sf = random_weights(3, n, k)
    packed = nvfp4_ops.prepack_weight(codes, sf, gated=gated)
    assert packed.ndim == (5 if gated else 4)
    assert packed.shape[:1] == (3,)
    rows = 128 if gated else 64
    assert packed.numel() == 3 * -(-n // rows) * rows * -(-k // 128) * 128 * 9 // 16
    unpacked, unpacked_sf = kernels.unpack(packed, n, k)
    assert_bytes_equal(unpacked, codes)
    assert_bytes_equal(unpacked_sf.view(torch.uint8), sf.view(torch.uint8))


@pytest.mark.parametrize("f", [16, 48, 64, 80, 128], ids=str)
def test_prepack_gated_pairs_gate_and_up_rows(f: int) -> None:
    """A gated block is the plain block of its rows in this order; pads are rows of zeros."""
    codes, sf = random_weights(2, 2 * f, 48)
    padded_f = -(-f // 64) * 64
    ordered = codes.new_zeros(2, 2 * padded_f, 24)
    ordered_sf = codes.new_zeros(2, 2 * padded_f, 3)
    for block in range(padded_f // 32):
        for warp in range(4):
            for g in range(8):
                gate = 32 * block + 8 * warp + g
                if gate < f:
                    packed_row = 64 * block + 16 * warp + g
                    ordered[:, packed_row], ordered[:, packed_row + 8] = (
                        codes[:, gate],
                        codes[:, f + gate],
                    )
                    sf_bytes = sf.view(torch.uint8)
                    ordered_sf[:, packed_row] = sf_bytes[:, gate]
                    ordered_sf[:, packed_row + 8] = sf_bytes[:, f + gate]
    plain = nvfp4_ops.prepack_weight(ordered, ordered_sf.view(torch.float8_e4m3fn))
    gated = nvfp4_ops.prepack_weight(codes, sf, gated=True)
    assert gated.shape == (2, padded_f // 64, 2, 1, 4608)
    assert_bytes_equal(gated.flatten(1, 2), plain)


@pytest.mark.parametrize(
    ("n", "gated", "message"),
    [
        (24, False, "codes: N must be a multiple of 16, got 24"),
        (48, True, "codes: N, F gate and F up rows, must be a multiple of 32, got 48"),
    ],
    ids=["plain", "gated"],
)
def test_prepack_rejects_sizes(n: int, gated: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nvfp4_ops.prepack_weight(*random_weights(1, n, 32), gated=gated)


def test_prepack_keeps_values_of_zero_negative_and_nan_scales() -> None:
    codes, sf = random_weights(1, 32, 64)
    sf.view(torch.uint8)[0, :, 0] = 0
    sf.view(torch.uint8)[0, :, 1] |= 0x80
    sf.view(torch.uint8)[0, 5, 2] = 0x7F
    sf.view(torch.uint8)[0, 6, 2] = 0x80
    actual = decode(*kernels.unpack(nvfp4_ops.prepack_weight(codes, sf), 32, 64))
    expected = decode(codes, sf)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert expected.isnan().any()


def test_prepack_scale_bytes_are_bf16_after_a_shift() -> None:
    """(B << 4) | 0x7000 as bf16 is the scale times 2^119: what the kernel relies on."""
    e4m3 = torch.arange(1, 0x7F, dtype=torch.uint8)
    bits = (prepack_sm90._encode_scales(e4m3).int() << 4) | 0x7000
    as_bf16 = bits.to(torch.int16).view(torch.bfloat16).double()
    assert torch.equal(as_bf16 * 2.0**-119, e4m3.view(torch.float8_e4m3fn).double())
    nan = (prepack_sm90._encode_scales(torch.tensor([0x7F], dtype=torch.uint8)).int() << 4) | 0x7000
    assert nan.to(torch.int16).view(torch.bfloat16).isnan().all()


def rotated(words: Tensor, left: int) -> Tensor:
    return (words << left | words >> (32 - left)) & 0xFFFFFFFF


def bf16_pair(words: Tensor) -> Tensor:
    """(..., 2), the low half first."""
    return words.to(torch.int32).view(torch.bfloat16).unflatten(-1, (-1, 2)).double()


def test_prepacked_words_decode_to_operands_of_wgmma() -> None:
    """By the operations of the kernel, in 64-bit integers: value * 2^-7 in each register."""
    pytest.importorskip("cutlass")
    from nvfp4_ops.kernels import grouped_mm_mainloop_sm90 as main_loop

    codes, sf = random_weights(1, 64, 128)
    packed = nvfp4_ops.prepack_weight(codes, sf).view(-1)
    values = decode(codes, sf)[0].double()
    shifts = torch.arange(4) * 8
    words = (packed[:4096].view(2, 4, 32, 4, 4).long() << shifts).sum(-1)  # sub, warp, lane, j
    scale_words = (packed[4096:].view(4, 8, 4, 4).long() << shifts).sum(-1)  # warp, g, group
    mask, scale_mask = main_loop._CODE_MASK, main_loop._SCALE_MASK
    rest = ((words & main_loop._REST_MASK) * main_loop._REST_FACTOR) & 0xFFFFFFFF
    registers = [rotated(words, 26), rest, words, rotated(words, 29)]
    lane = torch.arange(32)
    for register, bits in enumerate(registers):
        actual = bf16_pair((bits & mask).flatten()).view(2, 4, 32, 4, 2)
        row = torch.arange(4).view(4, 1) * 16 + lane // 4 + 8 * (register % 2)
        for sub in range(2):
            for j in range(4):
                scales = scale_words[..., 2 * sub + j // 2]
                scales = (rotated(scales, 8) if j % 2 else scales) & scale_mask
                scales = bf16_pair((scales | main_loop._SCALE_EXPONENT).flatten()).view(4, 8, 2)
                scale = scales[:, lane // 4, register % 2]
                column = sub * 64 + j * 16 + 8 * (register // 2) + 2 * (lane % 4)
                for half in range(2):
                    expected = values[row, column + half]
                    assert torch.equal(actual[sub, :, :, j, half] * scale * 2.0**7, expected)


def test_grouped_mm_on_the_cpu_takes_prepacked_weights() -> None:
    codes, sf = random_weights(4, 48, 80)
    x, offs = torch.randn(9, 80).bfloat16(), torch.tensor([2, 2, 7, 8], dtype=torch.int32)
    alpha = torch.rand(4)
    expected = nvfp4_ops.grouped_scaled_mm(x, codes, None, sf, alpha, offs)
    packed = nvfp4_ops.prepack_weight(codes, sf)
    actual = nvfp4_ops.grouped_scaled_mm(x, packed, None, None, alpha, offs, num_columns=48)
    assert_bytes_equal(actual, expected)


def test_grouped_mm_on_the_cpu_takes_gated_prepacked_weights() -> None:
    codes, sf = random_weights(4, 96, 80)
    x, offs = torch.randn(9, 80).bfloat16(), torch.tensor([2, 2, 7, 8], dtype=torch.int32)
    alpha = torch.rand(4, 2) * 1e-3
    expected = nvfp4_ops.grouped_scaled_mm(x, codes, None, sf, alpha, offs, activation="silu_mul")
    for gated in (False, True):
        packed = nvfp4_ops.prepack_weight(codes, sf, gated=gated)
        actual = nvfp4_ops.grouped_scaled_mm(
            x, packed, None, None, alpha, offs, activation="silu_mul", num_columns=96
        )
        assert_bytes_equal(actual, expected)


def check_gated_weights_without_activation(device: str) -> None:
    """Weights prepacked for a gated activation, multiplied without one: columns as ever."""
    codes, sf = (weight.to(device) for weight in random_weights(4, 96, 80))
    x, offs = torch.randn(9, 80).bfloat16().to(device), torch.tensor([2, 2, 7, 8])
    alpha = (torch.rand(4, 2) * 1e-3).to(device)
    plain, gated = (
        nvfp4_ops.grouped_scaled_mm(
            x,
            nvfp4_ops.prepack_weight(codes, sf, gated=gated),
            None,
            None,
            alpha,
            offs.int().to(device),
            activation="relu2",
            num_columns=96,
        )
        for gated in (False, True)
    )
    assert plain.shape == (9, 96)
    assert plain.count_nonzero() > 0
    assert_bytes_equal(gated, plain)


def test_grouped_mm_on_the_cpu_takes_gated_weights_without_activation() -> None:
    check_gated_weights_without_activation("cpu")


@pytest.mark.gpu
def test_grouped_mm_takes_gated_weights_without_activation() -> None:
    check_gated_weights_without_activation("cuda")


PREPACKED_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "scales": ({"sf_b": "linear"}, "sf_b: must be None with prepacked b"),
    "columns": ({"num_columns": None}, "num_columns: must be given with prepacked b"),
    "odd": ({"num_columns": 40}, "num_columns: N must be a multiple of 16, got 40"),
    "other": ({"num_columns": 480}, r"b: must be weights prepacked from N = 480 and the K = 80"),
    "canonical": ({"b": "codes", "sf_b": "linear"}, "num_columns: goes with prepacked b only"),
    "gated_plain": (
        {"b": "gated", "num_columns": 192, "activation": "silu_mul"},
        r"b: must be weights prepacked from N = 192 and the K = 80",
    ),
    "gated_odd": (
        {"b": "gated", "num_columns": 48, "activation": "silu_mul"},
        "num_columns: N must be a multiple of 32, got 48",
    ),
    "no_scales": ({"b": "codes", "num_columns": None}, "sf_b: must be given with canonical b"),
}


@pytest.mark.parametrize(
    ("change", "message"), PREPACKED_ERRORS.values(), ids=PREPACKED_ERRORS.keys()
)
def test_grouped_mm_rejects_mixed_up_prepacked(change: dict[str, Any], message: str) -> None:
    codes, sf = random_weights(4, 48, 80)
    gated = nvfp4_ops.prepack_weight(*random_weights(4, 96, 80), gated=True)
    arguments = {
        "b": nvfp4_ops.prepack_weight(codes, sf),
        "sf_b": None,
        "num_columns": 48,
    } | {k: {"linear": sf, "codes": codes, "gated": gated}.get(v, v) for k, v in change.items()}
    offs = torch.tensor([2, 2, 7, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        nvfp4_ops.grouped_scaled_mm(
            torch.ones(9, 80).bfloat16(), sf_a=None, alpha=torch.ones(4), offs=offs, **arguments
        )


# Instruction WARPGROUP.DEPBAR, without the word that says for how many.
WGMMA_WAIT = (0x00008000000079C5).to_bytes(8, "little")

PLAIN: dict[str, Any] = {"out_fp32": False, "row_scale": False, "bias": False}
EPILOGUES: list[dict[str, Any]] = [
    PLAIN,
    PLAIN | {"row_scale": True, "early_weights": True},
    PLAIN | {"out_fp32": True},
    {"out_fp32": True, "row_scale": True, "bias": True},
    {"row_scale": True, "bias": True, "activation": "relu2"},
    {"activation": "silu_mul", "gated": True, "limit": 7.0, "early_weights": True},
    {"row_scale": True, "bias": True, "activation": "gelu_tanh_mul", "gated": True},
]


def shipped_configs() -> list[Any]:
    """Every tile that is ever chosen with every kind of epilogue."""
    tiles = {}
    for rows in (4, 10, 23, 36, 50, 76, 105, 115, 128, 200):
        for blocks in (1, 600, 2000):
            for columns in (4, 16):
                for epilogue in EPILOGUES:
                    config = choose_config(rows, 1, blocks, columns, **epilogue)
                    tiles[str(config)] = config
    return list(tiles.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests compile and run them")
@pytest.mark.parametrize("config", shipped_configs(), ids=str)
def test_grouped_mm_compiles_to_register_operands_without_spills(
    config: Any, tmp_path: Path
) -> None:
    pytest.importorskip("tvm_ffi")
    from kernel_checks import frames_and_registers

    from nvfp4_ops.kernels import grouped_mm_sm90

    compiled = grouped_mm_sm90.build(config, f"--keep-ptx --keep-cubin --dump-dir {tmp_path}")
    ptx = compiled.__ptx__
    (cubin,) = (path.read_bytes() for path in tmp_path.glob("*.cubin"))
    frames, _ = frames_and_registers(tmp_path)
    assert frames
    assert not any(frames)
    assert ".local" not in ptx
    # Of each width eight products of 16 columns; their first operand is a list of registers.
    products = re.findall(r"wgmma\.mma_async[^;]*;", ptx)
    assert len(products) == 8 * len(config.widths)
    for width in config.widths:
        assert sum(f".m64n{width}k16." in product for product in products) == 8
    assert all(product.count("{") == 2 for product in products)
    # One wait after each 64 columns and one after the loop: where ptxas can not follow which
    # registers are in use it waits after every product instead.
    assert cubin.count(WGMMA_WAIT) == 3 * len(config.widths)


def test_grouped_mm_says_when_its_ctas_do_not_fit_a_multiprocessor() -> None:
    pytest.importorskip("cutlass")
    from nvfp4_ops.kernels.grouped_mm_sm90 import GroupedMmSm90

    config = choose_config(64 * 64, 64, 600, 16)
    GroupedMmSm90(config)
    with pytest.raises(ValueError, match=r"2 times \d+ bytes of shared memory are more than the"):
        GroupedMmSm90(replace(config, blocks_per_sm=2))


# ---- on a GPU

GPU_CASES: dict[str, dict[str, Any]] = {
    "one_row": {"counts": [1]},
    "ragged": {"counts": [0, 1, 7, 8, 9, 0, 33]},
    "boundary_rows": {"counts": [127, 128, 129, 1]},
    "one_expert_has_all": {"counts": [0, 0, 500, 0]},
    "tail": {"counts": [3, 0, 5], "tail": 11},
    "no_rows_at_all": {"counts": [0, 0, 0], "tail": 6},
    "many_experts": {"counts": [i % 5 for i in range(300)], "n": 64, "k": 128},
    "odd_sizes": {"counts": [5, 20, 2], "n": 192, "k": 112},
    "long_k": {"counts": [4, 40], "n": 128, "k": 2880},
    "two_alphas": {"counts": [5, 9, 30], "n": 96, "segments": 2},
    "row_scale": {"counts": [17, 0, 3], "row_scale": True},
    "bias": {"counts": [17, 70, 3], "bias": True, "n": 48},
    "fp32": {"counts": [9, 70, 3], "out_dtype": torch.float32, "n": 144},
    "silu_mul": {"counts": [9, 20, 3], "activation": "silu_mul", "segments": 2, "bias": True},
    "silu_mul_odd_columns": {"counts": [3, 150, 40], "activation": "silu_mul", "n": 224},
    "swiglu_oai": {"counts": [9, 70, 3], "activation": "swiglu_oai", "segments": 2, "bias": True},
    "gelu_tanh_mul_fp32": {
        "counts": [40, 20, 3],
        "activation": "gelu_tanh_mul",
        "row_scale": True,
        "out_dtype": torch.float32,
    },
    "relu2": {"counts": [9, 20, 140], "activation": "relu2", "bias": True, "n": 80},
    "one_block": {"counts": [40, 0, 90, 200], "n": 48},
    "three_blocks": {"counts": [40, 0, 90, 200], "n": 192},
    "all_experts": {"counts": [i % 3 for i in range(1024)], "n": 64, "k": 64},
    "w4a4": {"counts": [9, 20, 3], "w4a4": True, "row_scale": True},
    "large_tile": {"counts": [300, 200, 411], "n": 256, "k": 256, "row_scale": True, "bias": True},
}


def gpu_arguments(
    counts: list[int],
    *,
    n: int = 128,
    k: int = 256,
    tail: int = 0,
    segments: int = 1,
    row_scale: bool = False,
    bias: bool = False,
    w4a4: bool = False,
    **options: Any,
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """CPU arguments without the weight; canonical codes and scales."""
    num_experts, rows = len(counts), sum(counts) + tail
    offs = torch.tensor(counts).cumsum(0).int()
    x = torch.randn(rows, k)
    arguments: dict[str, Any] = {
        "alpha": torch.rand(num_experts, segments).squeeze(1) * 0.01 + 0.001,
        "offs": offs,
        **options,
    }
    if w4a4:
        arguments["a"], arguments["sf_a"] = nvfp4_ops.quantize_nvfp4(x, torch.full((), 1e-3))
    else:
        x[sum(counts) :] = torch.nan
        arguments["a"], arguments["sf_a"] = x.bfloat16(), None
    if row_scale:
        arguments["row_scale"] = torch.rand(rows, 1) + 0.5
    if bias:
        arguments["bias"] = torch.randn(num_experts, n)
    return arguments, *random_weights(num_experts, n, k)


def on_gpu(arguments: dict[str, Any], codes: Tensor, sf: Tensor) -> Tensor:
    moved = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    gated = Activation(arguments.get("activation", "none")).gated
    packed = nvfp4_ops.prepack_weight(codes.cuda(), sf.cuda(), gated=gated)
    return nvfp4_ops.grouped_scaled_mm(
        b=packed, sf_b=None, num_columns=codes.shape[1], **moved
    ).cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES.values(), ids=GPU_CASES.keys())
def test_grouped_mm_kernel_equals_the_reference(case: dict[str, Any]) -> None:
    arguments, codes, sf = gpu_arguments(**case)
    expected = nvfp4_ops.grouped_scaled_mm(b=codes, sf_b=sf, **arguments).double()
    actual = on_gpu(arguments, codes, sf).double()
    error = (actual - expected).abs()
    scale = expected.abs().mean() + 1e-30
    # Both are rounded to bf16 once: near a tie they may fall one ulp apart, 2^-7 at most.
    fp32 = case.get("out_dtype") == torch.float32
    bound = (2**-16 if fp32 else 2**-7) * (expected.abs() + scale)
    assert (error <= bound).all(), f"worst {(error / (expected.abs() + scale)).max():.2e}"
    assert (actual[int(arguments["offs"][-1]) :] == 0).all()
    again = on_gpu(arguments | {"early_weights": True}, codes, sf)
    assert_bytes_equal(again.double(), actual)


@pytest.mark.gpu
@pytest.mark.parametrize("rows_each", [1, 8, 16, 20, 30, 48, 60, 90, 128, 150])
def test_grouped_mm_kernel_decodes_every_weight_exactly(rows_each: int) -> None:
    """One-hot rows read single weights: no rounding, so bits must be equal, for every tile."""
    num_experts, n, k = 4, 256, 256
    codes, sf = random_weights(num_experts, n, k, seed=3)
    sf.view(torch.uint8)[1, :, 3] = 0
    rows = num_experts * rows_each
    x = torch.zeros(rows, k)
    x[torch.arange(rows), torch.randint(0, k, (rows,))] = 1
    arguments = {
        "a": x.bfloat16(),
        "sf_a": None,
        "alpha": torch.ones(num_experts),
        "offs": (torch.arange(num_experts) + 1).int() * rows_each,
    }
    weights = decode(codes, sf)
    expert = torch.arange(rows) // rows_each
    expected = weights[expert, :, x.argmax(dim=1)].bfloat16()
    actual = on_gpu(arguments, codes, sf)
    assert torch.equal(actual.double(), expected.double())


@pytest.mark.gpu
def test_grouped_mm_kernel_nan_row_stays_alone() -> None:
    arguments, codes, sf = gpu_arguments([20, 30])
    clean = on_gpu(arguments, codes, sf)
    arguments["a"][7, 3] = torch.nan
    poisoned = on_gpu(arguments, codes, sf)
    others = torch.arange(50) != 7
    assert poisoned[7].isnan().all()
    assert_bytes_equal(poisoned[others].view(torch.int16), clean[others].view(torch.int16))


def at_offset(tensor: Tensor, offset: int) -> Tensor:
    """A copy on the GPU, ``offset`` bytes behind a multiple of 256."""
    content = tensor.contiguous().cuda().view(-1).view(torch.uint8)
    buffer = torch.empty(content.numel() + offset, dtype=torch.uint8, device="cuda")
    buffer[offset:] = content
    return buffer[offset:].view(tensor.dtype).view(tensor.shape)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", [None, "silu_mul"])
@pytest.mark.parametrize("offset", [64, 16, 2])
def test_grouped_mm_kernel_takes_any_address(offset: int, activation: str | None) -> None:
    """AOTInductor, say, puts constants at multiples of 64 bytes."""
    arguments, codes, sf = gpu_arguments([5, 0, 40], activation=activation)
    moved = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    packed = nvfp4_ops.prepack_weight(codes.cuda(), sf.cuda(), gated=activation is not None)
    call = {**moved, "sf_b": None, "num_columns": codes.shape[1]}
    expected = nvfp4_ops.grouped_scaled_mm(b=packed, **call)
    for name in ("b", "a"):
        shifted = {"b": packed, **call}
        shifted[name] = at_offset(shifted[name], offset)
        assert shifted[name].data_ptr() % 128 == offset
        for early_weights in (False, True):
            actual = nvfp4_ops.grouped_scaled_mm(**shifted, early_weights=early_weights)
            assert_bytes_equal(actual.view(torch.int16), expected.view(torch.int16))
    size = codes.shape[1], call["a"].shape[1]
    unpacked = kernels.unpack(at_offset(packed, offset), *size)
    for actual, wanted in zip(unpacked, kernels.unpack(packed, *size), strict=True):
        assert_bytes_equal(actual, wanted)


@pytest.mark.gpu
def test_grouped_mm_kernel_replays_with_new_offs_and_rows() -> None:
    arguments, codes, sf = gpu_arguments([5, 0, 11, 4])
    static = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    packed = nvfp4_ops.prepack_weight(codes.cuda(), sf.cuda())
    call = {"b": packed, "sf_b": None, "num_columns": codes.shape[1]}
    nvfp4_ops.grouped_scaled_mm(**call, **static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = nvfp4_ops.grouped_scaled_mm(**call, **static)
    for offs in ([5, 5, 16, 20], [0, 20, 20, 20], [1, 2, 3, 4]):
        arguments["offs"] = torch.tensor(offs, dtype=torch.int32)
        arguments["a"] = torch.randn(20, 256).bfloat16()
        static["offs"].copy_(arguments["offs"])
        static["a"].copy_(arguments["a"])
        graph.replay()
        torch.cuda.synchronize()
        assert_bytes_equal(
            out.cpu().view(torch.int16), on_gpu(arguments, codes, sf).view(torch.int16)
        )


@pytest.mark.gpu
def test_grouped_mm_kernel_packs_canonical_weights_on_the_fly() -> None:
    arguments, codes, sf = gpu_arguments([5, 9, 30], segments=2, n=96)
    moved = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    actual = nvfp4_ops.grouped_scaled_mm(b=codes.cuda(), sf_b=sf.cuda(), **moved).cpu()
    assert_bytes_equal(actual.view(torch.int16), on_gpu(arguments, codes, sf).view(torch.int16))


def test_choose_config_takes_the_tile_that_holds_most_experts() -> None:
    def tokens(rows: int, experts: int, **epilogue: Any) -> int:
        return choose_config(rows, experts, 32, 16, **epilogue).tile_tokens

    assert tokens(1, 128) == 8
    assert tokens(1024, 128) == 16
    assert tokens(2048, 128) == 32
    assert tokens(64 * 128, 128) == 96
    # 128 on average are often more; three times 160 are 480 and no padding.
    assert tokens(128 * 128, 128) == 144
    assert tokens(480 * 64 - 64 * 20, 64) == 160
    assert tokens(3 * 8192, 8, out_fp32=True, row_scale=True) == 128
    plain = choose_config(1, 1, 32, 16)
    assert choose_config(1, 1, 32, 16, bias=True) == replace(plain, bias=True)


@pytest.mark.parametrize(
    ("max_tokens", "top_k", "num_experts"), [(8192, 8, 128), (300, 2, 8), (5, 1, 256), (4096, 2, 7)]
)
def test_tokens_of_every_config_meet_every_config(
    max_tokens: int, top_k: int, num_experts: int
) -> None:
    sizes = [(24, 16), (32, 6), (90, 23), (448, 32)]

    def configs(tokens: int) -> set[GroupedMmConfig]:
        return {choose_config(tokens * top_k, num_experts, *size) for size in sizes}

    met = tokens_of_every_config(max_tokens, top_k, num_experts, sizes)
    assert max(met) <= max_tokens
    every = set.union(*(configs(tokens) for tokens in range(1, max_tokens + 1)))
    assert set.union(*map(configs, met)) == every


def test_choose_config_fills_the_last_wave() -> None:
    """Tiles of 256 rows leave most multiprocessors idle at the end of the first two."""
    chosen = {
        shape: choose_config(slots, experts, *shape).warpgroups
        for slots, experts, shape in [
            (32, 128, (90, 23)),
            (64, 32, (64, 56)),
            (64, 32, (112, 16)),
            (256, 256, (64, 32)),
        ]
    }
    assert chosen == {(90, 23): 3, (64, 56): 3, (112, 16): 4, (64, 32): 4}


def test_choose_config_splits_k_where_tiles_are_few_and_columns_many() -> None:
    few, many, short = (choose_config(8, 8, *s) for s in ((24, 16), (2000, 16), (24, 6)))
    assert few.split_k
    assert few.row_blocks == 1
    assert (few.warpgroups, few.blocks_per_sm) == (2, 2)
    assert choose_config(8, 8, 112, 16).warpgroups == 3
    assert choose_config(2, 2, 64, 112).warpgroups == 4
    assert not many.split_k
    assert many.row_blocks == 4
    assert not short.split_k
    assert short.row_blocks == 1
    assert choose_config(64, 8, 24, 16).split_k
    assert not choose_config(64, 8, 100, 16).split_k


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile_tokens": 24}, "tile_tokens: must be 8 or a multiple of 16 up to 160, got 24"),
        ({"tile_tokens": 176}, "tile_tokens: must be 8 or a multiple of 16 up to 160, got 176"),
        ({"warpgroups": 8}, "warpgroups: must be 1 to 7, got 8"),
        ({"cluster": 3}, "cluster: must be 1 or 2, and 1 for 8 tokens, got 3"),
        ({"split_k": True, "cluster": 2}, "split_k: needs several warpgroups and no cluster"),
        ({"split_k": True, "warpgroups": 1}, "split_k: needs several warpgroups and no cluster"),
        ({"tile_tokens": 8, "cluster": 2}, "cluster: must be 1 or 2, and 1 for 8 tokens, got 2"),
    ],
)
def test_grouped_mm_config_rejects(changes: dict[str, Any], message: str) -> None:
    sizes = {"tile_tokens": 16, "warpgroups": 2, "stages": 4, "blocks_per_sm": 1}
    with pytest.raises(ValueError, match=message):
        GroupedMmConfig(**(sizes | changes))


@pytest.mark.parametrize("rows", [1, 7, 130, 5000])
@pytest.mark.parametrize("blocks", [1, 5, 32])
def test_grouped_mm_grid_covers_every_tile_in_whole_clusters(rows: int, blocks: int) -> None:
    """Against the tiles of the worst routing: one row each, the rest on one expert."""
    config = GroupedMmConfig(16, warpgroups=2, stages=4, blocks_per_sm=1, cluster=2)
    experts = 8
    touched = min(experts, rows)
    worst = touched - 1 + -(-(rows - touched + 1) // 16)
    grid = config.grid(rows, experts, blocks, num_multiprocessors=132)
    assert grid % 2 == 0
    assert 2 <= grid <= 132
    assert grid >= min(132, 2 * worst * -(-blocks // 4))
