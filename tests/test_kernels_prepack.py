"""The prepack kernels: their arithmetic on the host, compiled anywhere, run on a GPU."""

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_bytes_equal
from torch import Tensor

import nvfp4_ops
from nvfp4_ops import kernels

if not torch.cuda.is_available():
    os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")
pytest.importorskip("cutlass")
pytest.importorskip("tvm_ffi")

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint32
from cutlass.cute.runtime import from_dlpack
from kernel_checks import frames_and_registers

from nvfp4_ops.kernels import prepack_kernel_sm90 as kernel
from nvfp4_ops.kernels import prepack_sm90
from nvfp4_ops.kernels.launch.prepack_kernel_sm90 import (
    PrepackConfig,
    launch_prepack,
    launch_unpack,
)

CONFIGS = [
    PrepackConfig(direction, gated, sf_words)
    for direction in ("prepack", "unpack")
    for gated in (False, True)
    for sf_words in (False, True)
]


def weights(num_experts: int, n: int, k: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Every code; every e4m3 byte: zeros, negative ones and NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (num_experts, n, k // 2), dtype=torch.uint8, generator=generator)
    sf = torch.randint(0, 256, (num_experts, n, k // 16), dtype=torch.uint8, generator=generator)
    return codes, sf.view(torch.float8_e4m3fn)


# --- On the host ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gated", "digest"),
    [(False, "306b2f1e384fdb0b"), (True, "98aa0d1c2c1e7038")],
)
def test_prepack_layout_has_a_number_of_its_own(gated: bool, digest: str) -> None:
    """Saved programs hold it beside their weights: other bytes, another number, other digests."""
    num_experts, n, k = 2, 160, 272
    codes = torch.arange(num_experts * n * k // 2) * 40503 // 64 % 256
    sf = torch.arange(num_experts * n * k // 16) * 40503 // 64 % 256
    packed = prepack_sm90.prepack(
        codes.byte().view(num_experts, n, k // 2),
        sf.byte().view(torch.float8_e4m3fn).view(num_experts, n, k // 16),
        gated=gated,
    )
    assert prepack_sm90.LAYOUT == 2
    assert hashlib.sha256(packed.numpy().tobytes()).hexdigest()[:16] == digest


@cute.jit
def _pack_on_host(pairs: cute.Tensor, sf: cute.Tensor, words: cute.Tensor, count: Int32):
    """pairs (count, rh, kh), sf (count, rh) -> words (count, 4)."""
    for i in cutlass.range(count):
        signed = []
        for rh in cutlass.range_constexpr(2):
            row = []
            for kh in cutlass.range_constexpr(2):
                row.append(kernel.sign_codes(Uint32(pairs[i, rh, kh]), Uint32(sf[i, rh])))
            signed.append(row)
        packed = kernel.pack_words(signed)
        for j in cutlass.range_constexpr(4):
            words[i, j] = Int32(packed[j])


@cute.jit
def _unpack_on_host(words: cute.Tensor, pairs: cute.Tensor, count: Int32):
    for i in cutlass.range(count):
        unpacked = kernel.unpack_words([Uint32(words[i, j]) for j in range(4)])
        for rh in cutlass.range_constexpr(2):
            for kh in cutlass.range_constexpr(2):
                pairs[i, rh, kh] = Int32(unpacked[rh][kh])


@cute.jit
def _scales_on_host(sf: cute.Tensor, encoded: cute.Tensor, decoded: cute.Tensor, count: Int32):
    for i in cutlass.range(count):
        word = kernel.encode_scales(Uint32(sf[i]))
        encoded[i] = Int32(word)
        decoded[i] = Int32(kernel.decode_scales(word))


def as_words(parts: Tensor) -> Tensor:
    """(..., 4) bytes to (...) int32."""
    return parts.contiguous().view(torch.int32).squeeze(-1)


def lane_pairs(rows: Tensor) -> Tensor:
    """(64, 64) code bytes of a block -> what each lane packs: (sub, warp, lane, rh, kh, byte j)."""
    # Row 16 w + 8 rh + g, byte 32 sub + 8 j + 4 kh + q; lane 4 g + q.
    parts = rows.view(4, 2, 8, 2, 4, 2, 4)  # w, rh, g, sub, j, kh, q
    return parts.permute(3, 0, 2, 6, 1, 5, 4).flatten(2, 3)


def lane_scales(sf: Tensor) -> Tensor:
    """(64, 8) scale bytes of a block -> (sub, warp, lane, rh, byte j)."""
    parts = sf.view(4, 2, 8, 2, 4).permute(3, 0, 2, 1, 4)  # sub, w, g, rh, j
    return parts.repeat_interleave(4, dim=2)


def test_prepack_words_equal_the_layout_and_come_back() -> None:
    codes, sf = weights(1, 64, 128)
    expected = prepack_sm90.prepack(codes, sf)[0, 0, 0, : prepack_sm90.CODE_BYTES]
    pairs = as_words(lane_pairs(codes[0])).flatten(0, 2)
    scales = as_words(lane_scales(sf[0].view(torch.uint8))).flatten(0, 2)
    count = pairs.shape[0]
    words = torch.empty(count, 4, dtype=torch.int32)
    tensors = (from_dlpack(x.contiguous()) for x in (pairs, scales, words))
    _pack_on_host(*tensors, Int32(count))
    assert_bytes_equal(words.view(torch.uint8).flatten(), expected)
    back = torch.empty(count, 2, 2, dtype=torch.int32)
    _unpack_on_host(from_dlpack(words), from_dlpack(back), Int32(count))
    unpacked, _ = prepack_sm90.unpack(prepack_sm90.prepack(codes, sf), 64, 128)
    assert_bytes_equal(back, as_words(lane_pairs(unpacked[0])).flatten(0, 2))


def test_prepack_scales_equal_the_layout_and_come_back() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    # All positions in a word.
    sf = torch.cat([every.roll(shift) for shift in range(4)])
    words, encoded, decoded = as_words(sf.view(-1, 4)), *torch.empty(2, 256, dtype=torch.int32)
    _scales_on_host(*map(from_dlpack, (words, encoded, decoded)), Int32(256))
    a0, b0, a1, b1 = prepack_sm90._encode_scales(sf).view(-1, 4).long().unbind(-1)
    # ``w & 0x0FF00FF0`` is a0 << 4 | a1 << 20, and of w rotated by 8 it is b0 << 4 | b1 << 20.
    second = b0 << 4 | b1 << 20
    placed = a0 << 4 | a1 << 20 | second >> 8 | (second & 0xF0) << 24
    assert_bytes_equal(encoded, placed.int())
    # The sign goes to the codes.
    assert_bytes_equal(decoded.view(torch.uint8), sf & 0x7F)


def permute_bytes(low: list[int], high: list[int], selector: int) -> list[int]:
    """PTX's prmt of bytes."""
    both = low + high
    return [both[(selector >> (4 * byte)) & 7] for byte in range(4)]


def test_prepack_quads_transpose_their_bytes() -> None:
    words = [[10 * lane + byte for byte in range(4)] for lane in range(4)]
    for step, selectors in enumerate(kernel.TRANSPOSE_SELECTORS):
        others = [words[lane ^ (1 << step)] for lane in range(4)]
        words = [
            permute_bytes(words[lane], others[lane], selectors[(lane >> step) & 1])
            for lane in range(4)
        ]
    assert words == [[10 * byte + lane for byte in range(4)] for lane in range(4)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests compile and run them")
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_prepack_kernels_compile_to_wide_accesses_in_registers(
    config: PrepackConfig, tmp_path: Path
) -> None:
    compiled = kernel.build(config, f"--keep-ptx --keep-cubin --dump-dir {tmp_path}")
    ptx = compiled.__ptx__
    frames, _ = frames_and_registers(tmp_path)
    assert frames
    assert not any(frames)
    assert ".local" not in ptx
    assert "griddepcontrol" not in ptx
    to_packed, to_codes = ("st", "ld") if config.direction == "prepack" else ("ld", "st")
    assert ptx.count(f"{to_packed}.global.v4.b32") == 2 * kernel.BLOCKS_PER_WARP
    assert ptx.count(f"{to_codes}.global.v2.b32") == 4 * kernel.BLOCKS_PER_WARP
    if config == PrepackConfig("prepack", config.gated, sf_words=True):
        assert ptx.count("ld.global.b32") == 4 * kernel.BLOCKS_PER_WARP


def test_prepack_config_has_two_directions() -> None:
    with pytest.raises(ValueError, match="direction: must be prepack or unpack, got pack"):
        kernel.PrepackSm90(PrepackConfig("pack", gated=False, sf_words=True))  # type: ignore[arg-type]


# --- Run on a GPU -----------------------------------------------------------------------------

get_compiled = cache(kernel.build)

GPU_SHAPES = [
    (1, 32, 16),
    (3, 64, 128),
    (2, 96, 112),
    (4, 128, 2880),
    (5, 160, 1408),
    (2, 320, 704),
    (1, 2048, 2048),
    (300, 32, 48),
]


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_prepack_kernels_equal_the_reference(shape: tuple[int, int, int], gated: bool) -> None:
    _, n, k = shape
    codes, sf = weights(*shape)
    expected = prepack_sm90.prepack(codes, sf, gated=gated)
    packed = torch.full_like(expected, 0xAA, device="cuda")
    launch_prepack(
        codes=codes.cuda(), block_scale=sf.cuda(), packed=packed, get_compiled=get_compiled
    )
    assert_bytes_equal(packed.cpu(), expected)
    back, back_sf = torch.full_like(codes, 0xAA, device="cuda"), sf.cuda()
    back_sf.view(torch.uint8).fill_(0xAA)
    launch_unpack(packed=packed, codes=back, block_scale=back_sf, get_compiled=get_compiled)
    expected_codes, expected_sf = prepack_sm90.unpack(expected, n, k)
    assert_bytes_equal(back.cpu(), expected_codes)
    assert_bytes_equal(back_sf.cpu().view(torch.uint8), expected_sf.view(torch.uint8))


@pytest.mark.gpu
def test_prepack_on_a_gpu_takes_any_strides_and_no_experts() -> None:
    codes, sf = weights(2, 64, 96)
    expected = nvfp4_ops.prepack_weight(codes, sf)
    strided = codes.cuda().transpose(0, 1).contiguous().transpose(0, 1)
    flat = torch.empty(codes.numel() + 1, dtype=torch.uint8, device="cuda")
    unaligned = flat[1:].view(codes.shape).copy_(codes)
    for moved in (strided, unaligned):
        assert_bytes_equal(nvfp4_ops.prepack_weight(moved, sf.cuda()).cpu(), expected)
    none = nvfp4_ops.prepack_weight(codes[:0].cuda(), sf[:0].cuda())
    assert none.shape == (0, 1, 1, 4608)


def test_unpack_takes_no_experts() -> None:
    codes, sf = weights(2, 64, 96)
    none = nvfp4_ops.prepack_weight(codes[:0], sf[:0])
    for got, wanted in zip(kernels.unpack(none, 64, 96), (codes[:0], sf[:0]), strict=True):
        assert_bytes_equal(got, wanted)


@pytest.mark.gpu
def test_prepack_on_a_gpu_reaches_past_2_to_31_bytes() -> None:
    num_experts, n, k = 65, 8192, 8192
    codes = torch.randint(0, 256, (num_experts, n, k // 2), dtype=torch.uint8, device="cuda")
    sf = torch.randint(1, 127, (num_experts, n, k // 16), dtype=torch.uint8, device="cuda")
    packed = nvfp4_ops.prepack_weight(codes, sf.view(torch.float8_e4m3fn))
    last = prepack_sm90.prepack(codes[-1:], sf[-1:].view(torch.float8_e4m3fn))
    assert torch.equal(packed[-1:], last)
    back, back_sf = kernels.unpack(packed, n, k)
    assert torch.equal(back, codes)
    assert torch.equal(back_sf.view(torch.uint8), sf)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_prepack_on_a_gpu_holds_one_copy_of_the_weights(gated: bool) -> None:
    codes, sf = (x.cuda() for x in weights(16, 512, 1024))
    nvfp4_ops.prepack_weight(codes, sf, gated=gated)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    packed: Any = nvfp4_ops.prepack_weight(codes, sf, gated=gated)
    grown = torch.cuda.max_memory_allocated() - before
    assert grown <= packed.numel() + (1 << 20)
