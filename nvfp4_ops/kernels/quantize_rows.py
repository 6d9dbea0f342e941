"""Rows of activations to NVFP4 codes and block scales.

Portable CuTe DSL (sm_89 and later: e4m3 is rounded by ``cvt``). The kernel is bound by memory;
e2m1, which has no ``cvt`` before sm_100, is rounded by ``magnitude_word``. The meaning of every bit
is ``nvfp4_ops.reference``'s. Not for weights, which are quantized by another rule.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cuda.bindings.driver as cuda_driver
import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, Uint8, Uint32
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor
from torch import Tensor

from nvfp4_ops import format as nvfp4
from nvfp4_ops.kernels.limits import num_multiprocessors
from nvfp4_ops.kernels.swizzle_sf import (
    ROW_GROUPS,
    VECTOR_BYTES,
    WARP,
    WORD_BYTES,
    GetCompiled,
    RaggedTiles,
    bytes_at,
    check_num_experts,
    entry_before,
    fake_offs,
    fake_swizzled,
    locate_ragged_tile,
    locate_tile,
    tiles_view,
    upper_bound,
    vector_at,
)

FP32_MAX = torch.finfo(torch.float32).max
_DTYPES = {
    torch.bfloat16: cutlass.BFloat16,
    torch.float16: cutlass.Float16,
    torch.float32: cutlass.Float32,
}
# PTX's name of two packed elements.
_PACKED_NAME = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}
_FP32_EXPONENT, _FP32_ABS, _PACKED_ABS = 0x7F800000, 0x7FFFFFFF, 0x7FFF7FFF

# Blocks that a lane has in flight: more bytes under way, fewer loop instructions.
BLOCKS_PER_LANE = 2
BLOCKS_PER_STEP = BLOCKS_PER_LANE * WARP
# At most this many CTAs for each multiprocessor where a CTA has a prologue to amortise.
CTAS_PER_SM = 8

# magnitude_word: m * GRID has units of half of m in its last place, and the two units on top make
# the sum's low byte the code itself.
_GRID = 2.0**22 + 1.0
_CODE_SHIFT = 22
_WORD_CODES = 8
_EVEN_SIGNS, _ODD_SIGNS = 0x08080808, 0x80808080


def _ptx(code: str, result: type, *args: Any) -> Any:
    return cute.arch.inline_ptx(code, write_only_types=[result], read_only_args=list(args))


def _reciprocal(value: Float32) -> Float32:
    """1 / value, correctly rounded, subnormals kept."""
    return _ptx("rcp.rn.f32 {$w0}, {$r0};", Float32, value)


def _min_or_nan(value: Float32, limit: float) -> Float32:
    return cute.arch.fmin(value, limit, nan=True)


def _permute_bytes(low: Uint32, high: Uint32, selector: int) -> Uint32:
    """Bytes 0..3 of ``low`` and 4..7 of ``high`` chosen by the nibbles of ``selector``."""
    return _ptx(f"prmt.b32 {{$w0}}, {{$r0}}, {{$r1}}, {selector:#06x};", Uint32, low, high)


class DeviceOps:
    """What ``magnitude_word`` is made of; tests run it on the host with operators instead."""

    minimum = staticmethod(cute.arch.fmin)
    maximum = staticmethod(cute.arch.fmax)
    permute_bytes = staticmethod(_permute_bytes)

    @staticmethod
    def add_shifted(first: Uint32, second: Uint32) -> Uint32:
        """first + 16 * second; opaque, or the compiler splits it in three."""
        return _ptx("mad.lo.u32 {$w0}, {$r1}, 16, {$r0};", Uint32, first, second)


def magnitude_word(values: Sequence[Float32], ops: type[DeviceOps] = DeviceOps) -> Uint32:
    """e2m1 codes 0..7 of eight fp32 values >= 0 as a word; NaN is code 7.

    To nearest, ties to even, saturating: with a = min(v, 6) and m the power of two below max(a, 1),
    e2m1 has a spacing of m / 2 around a. So does fp32 around m * 2^22, where one fused operation
    m * 2^22 + a rounds a to n units of m / 2. The code is n + 2 log2(m), and 2 log2(m) stands,
    biased, in the exponent bits of m.
    """
    pairs = []
    for i in range(0, _WORD_CODES, 2):
        sums, powers = [], []
        for value in values[i : i + 2]:
            # The minimum of NaN and 6 is 6.
            clamped = ops.minimum(value, nvfp4.E2M1_MAX)
            power = ops.maximum(clamped, 1.0).bitcast(Uint32) & Uint32(_FP32_EXPONENT)
            rounded = power.bitcast(Float32) * _GRID + clamped
            sums.append(rounded.bitcast(Uint32))
            powers.append(power)
        exponents = ops.add_shifted(*powers) >> _CODE_SHIFT
        pairs.append(ops.add_shifted(*sums) + exponents)
    low = ops.permute_bytes(pairs[0], pairs[1], 0x0040)
    high = ops.permute_bytes(pairs[2], pairs[3], 0x0040)
    return ops.permute_bytes(low, high, 0x5410)


class BlockReader:
    """Base of the kernels: a block of 16 elements in registers, its magnitudes, amax and signs."""

    def __init__(self, dtype: torch.dtype) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype: must be one of {list(_DTYPES)}, got {dtype}")
        self.dtype = dtype
        self.packed = dtype in _PACKED_NAME
        self.element_bytes = dtype.itemsize
        self.block_bytes = nvfp4.BLOCK_SIZE * dtype.itemsize
        self.num_words = self.block_bytes // WORD_BYTES

    @cute.jit
    def load(self, address: Int64) -> cute.Tensor:
        rX = cute.make_rmem_tensor(cute.make_layout(self.num_words), Uint32)
        cute.autovec_copy(vector_at(address, self.num_words), rX)
        return rX

    def absolute(self, rX: cute.Tensor) -> list[Uint32]:
        mask = _PACKED_ABS if self.packed else _FP32_ABS
        return [rX[i] & Uint32(mask) for i in range(self.num_words)]

    def _unpack(self, word: Uint32) -> tuple[Float32, Float32]:
        if self.dtype == torch.bfloat16:
            return (word << 16).bitcast(Float32), (word & Uint32(0xFFFF0000)).bitcast(Float32)
        code = "{.reg .b16 low, high; mov.b32 {low, high}, {$r0}; cvt.f32.f16 {$w0}, HALF;}"
        low, high = (_ptx(code.replace("HALF", half), Float32, word) for half in ("low", "high"))
        return low, high

    def magnitudes(self, words: Sequence[Uint32]) -> list[Float32]:
        if not self.packed:
            return [word.bitcast(Float32) for word in words]
        return [value for word in words for value in self._unpack(word)]

    def amax(self, words: Sequence[Uint32]) -> Float32:
        """Largest magnitude; NaN where there is one."""
        words = list(words)
        while len(words) > 1:
            words = [self._larger(*words[i : i + 2]) for i in range(0, len(words), 2)]
        if not self.packed:
            return words[0].bitcast(Float32)
        low, high = self._unpack(words[0])
        return cute.arch.fmax(low, high, nan=True)

    def _larger(self, first: Uint32, second: Uint32) -> Uint32:
        if not self.packed:
            # Magnitudes are ordered like their bits, NaN last.
            return cutlass.max(first, second)
        code = f"max.NaN.{_PACKED_NAME[self.dtype]} {{$w0}}, {{$r0}}, {{$r1}};"
        return _ptx(code, Uint32, first, second)

    def signs(self, rX: cute.Tensor, word: int) -> Uint32:
        """Sign bits of eight elements at bit 3 of their codes."""
        if self.packed:
            words = [rX[4 * word + i] for i in range(4)]
            low = _permute_bytes(words[0], words[1], 0x7351)
            high = _permute_bytes(words[2], words[3], 0x7351)
            even, odd = _permute_bytes(low, high, 0x5410), _permute_bytes(low, high, 0x7632)
        else:
            even, odd = (
                _permute_bytes(
                    _permute_bytes(rX[8 * word + i], rX[8 * word + i + 2], 0x0073),
                    _permute_bytes(rX[8 * word + i + 4], rX[8 * word + i + 6], 0x0073),
                    0x5410,
                )
                for i in range(2)
            )
        return ((even >> 4) & Uint32(_EVEN_SIGNS)) | (odd & Uint32(_ODD_SIGNS))


@dataclass(frozen=True)
class QuantizeConfig:
    dtype: torch.dtype
    scale: Literal["tensor", "row", "expert"]
    swizzled: bool
    ragged: bool
    threads: int = 256


class QuantizeKernel(BlockReader):
    """codes, block_scale = quantize_nvfp4(x, global_scale, offs, swizzled).

    A warp quantizes a row, a lane a block: it loads the 16 elements with 16-byte loads and stores 8
    bytes of codes and a scale byte, so a warp's loads and stores are contiguous. Rows are spread
    over the first dimension of the grid, steps of 64 blocks over the second. Swizzled, the same
    warps then zero the pad rows of partly filled and empty row tiles; pad columns are zeroed with
    their row. Rows of no expert are not read.

    Limits: rows of x start at multiples of 16 bytes; at most ``MAX_EXPERTS`` experts; the global
    scale is positive.
    """

    def __init__(self, config: QuantizeConfig) -> None:
        if config.threads % WARP or not WARP <= config.threads <= WARP * WARP:
            raise ValueError(f"threads: must be whole warps, up to 1024, got {config.threads}")
        if config.scale not in ("tensor", "row", "expert"):
            raise ValueError(f"scale: must be tensor, row or expert, got {config.scale}")
        if config.scale == "expert" and not config.ragged:
            raise ValueError("scale: one per expert needs ragged rows")
        self.config = config
        super().__init__(config.dtype)
        self.ragged_tiles = RaggedTiles(config.threads)

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,
        mScale: cute.Tensor,
        mOffs: cute.Tensor | None,
        mCodes: cute.Tensor,
        mSf: cute.Tensor,
        grid_rows: Int32,
        grid_steps: Int32,
        stream: cuda_driver.CUstream,
    ):
        self.kernel(mX, mScale, mOffs, mCodes, mSf).launch(
            grid=[grid_rows, grid_steps, 1], block=[self.config.threads, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mX: cute.Tensor,
        mScale: cute.Tensor,
        mOffs: cute.Tensor | None,
        mCodes: cute.Tensor,
        mSf: cute.Tensor,
    ):
        config = self.config
        warps = config.threads // WARP
        num_rows = Int32(mX.shape[0])
        first = cute.arch.block_idx()[0] * warps + cute.arch.make_warp_uniform(cute.arch.warp_idx())
        stride = cute.arch.grid_dim()[0] * warps
        num_experts, end_row = Int32(0), num_rows
        sEnd, sTileEnd = None, None
        if cutlass.const_expr(config.ragged):
            num_experts = Int32(mOffs.shape[0])
            end_row = Int32(mOffs[num_experts - 1])
            if cutlass.const_expr(config.swizzled):
                sEnd, sTileEnd = self.ragged_tiles.scan(mOffs, num_experts)
        scales = (Float32(1.0), Float32(1.0))
        if cutlass.const_expr(config.scale == "tensor"):
            scales = self._encode_scales(Float32(mScale[0]))
        for row in cutlass.range(first, num_rows, stride, unroll=1):
            if row < end_row:
                sf_row = row
                expert = Int32(0)
                if cutlass.const_expr(config.ragged and config.swizzled):
                    expert = upper_bound(sEnd, num_experts, row)
                    sf_row = (
                        entry_before(sTileEnd, expert) * nvfp4.SWIZZLE_TILE_ROWS
                        + row
                        - entry_before(sEnd, expert)
                    )
                elif cutlass.const_expr(config.scale == "expert"):
                    expert = upper_bound(mOffs, num_experts, row)
                row_scales = scales
                if cutlass.const_expr(config.scale == "row"):
                    row_scales = self._encode_scales(Float32(mScale[row]))
                elif cutlass.const_expr(config.scale == "expert"):
                    row_scales = self._encode_scales(Float32(mScale[expert]))
                self._quantize_row(mX, mCodes, mSf, row, sf_row, row_scales)
            else:
                self._zero_row(mCodes, mSf, row)
        if cutlass.const_expr(config.swizzled):
            row_tiles = Int32(mSf.shape[0])
            for tile in cutlass.range(first, row_tiles, stride, unroll=1):
                if cutlass.const_expr(config.ragged):
                    _, num_valid = locate_ragged_tile(sEnd, sTileEnd, num_experts, tile)
                else:
                    _, num_valid = locate_tile(num_rows, tile)
                self._zero_pad_rows(mSf, tile, num_valid)

    @cute.jit
    def _encode_scales(self, global_scale: Float32):
        """G, fl(G / 6) and 1 / G."""
        encode = _min_or_nan(_reciprocal(global_scale), FP32_MAX)
        return encode * Float32(1.0 / nvfp4.E2M1_MAX), _reciprocal(encode)

    @cute.jit
    def _quantize_row(
        self,
        mX: cute.Tensor,
        mCodes: cute.Tensor,
        mSf: cute.Tensor,
        row: Int32,
        sf_row: Int32,
        scales: tuple,
    ):
        num_cols = Int32(mX.shape[1]) // nvfp4.BLOCK_SIZE
        lane = cute.arch.lane_idx()
        first_step, num_steps = cute.arch.block_idx()[1], self._num_steps(mX, mSf)
        block_bytes = self.block_bytes
        x_row = mX.iterator.toint() + Int64(row) * (mX.stride[0] * self.element_bytes)
        codes_row = mCodes.iterator.toint() + Int64(row) * Int64(mCodes.shape[1])
        sf_base = self._sf_row_address(mSf, sf_row, num_cols)
        for step in cutlass.range(first_step, num_steps, cute.arch.grid_dim()[1], unroll=1):
            first_col = step * BLOCKS_PER_STEP + lane
            blocks = []
            for i in cutlass.range_constexpr(BLOCKS_PER_LANE):
                # Lanes past the end load the last block again: no branch between the loads.
                col = cutlass.min(first_col + i * WARP, num_cols - 1)
                blocks.append(self.load(x_row + Int64(col) * block_bytes))
            for i in cutlass.range_constexpr(BLOCKS_PER_LANE):
                col = first_col + i * WARP
                words, sf = self._quantize_block(blocks[i], scales)
                if col < num_cols:
                    rCodes = cute.make_rmem_tensor(cute.make_layout(len(words)), Uint32)
                    for j in cutlass.range_constexpr(len(words)):
                        rCodes[j] = words[j]
                    num_bytes = nvfp4.packed_size(nvfp4.BLOCK_SIZE)
                    gCodes = vector_at(codes_row + Int64(col) * num_bytes, len(words), num_bytes)
                    cute.autovec_copy(rCodes, gCodes)
                else:
                    sf = Uint32(0)
                if col < self._num_sf_cols(mSf, num_cols):
                    gSf = bytes_at(sf_base + self._sf_col_offset(col), 1)
                    gSf[0] = Uint8(sf)

    @cute.jit
    def _quantize_block(self, rX: cute.Tensor, scales: tuple):
        """Two words of codes and the scale byte."""
        sixth_of_encode, inv_encode = scales
        absolute = self.absolute(rX)
        sf, block_scale = cute.arch.inline_ptx(
            "{.reg .b16 sf, low, high; .reg .b32 both;"
            " cvt.rn.satfinite.e4m3x2.f32 sf, 0f00000000, {$r0};"
            " cvt.u32.u16 {$w0}, sf; cvt.rn.f16x2.e4m3x2 both, sf;"
            " mov.b32 {low, high}, both; cvt.f32.f16 {$w1}, low;}",
            write_only_types=[Uint32, Float32],
            read_only_args=[self.amax(absolute) * sixth_of_encode],
        )
        decode = block_scale * inv_encode
        inv_scale = _min_or_nan(_reciprocal(decode), FP32_MAX)
        if block_scale == 0.0:
            inv_scale = Float32(0.0)
        # A NaN value has code 7 without a sign. Where the scale is NaN all values are; where decode
        # is Inf, inv_scale is 0, so those of Inf are and all others have code 0 or 8.
        nan_signs = Uint32(_EVEN_SIGNS | _ODD_SIGNS)
        if decode < Float32(float("inf")):
            nan_signs = Uint32(0)
        values = [value * inv_scale for value in self.magnitudes(absolute)]
        words = []
        for i in cutlass.range_constexpr(nvfp4.BLOCK_SIZE // _WORD_CODES):
            magnitudes = magnitude_word(values[i * _WORD_CODES : (i + 1) * _WORD_CODES])
            words.append(magnitudes | (self.signs(rX, i) & ~((magnitudes << 1) & nan_signs)))
        return words, sf

    @cute.jit
    def _zero_row(self, mCodes: cute.Tensor, mSf: cute.Tensor, row: Int32):
        """Codes, and linear scales, of a row of no expert."""
        num_bytes = nvfp4.packed_size(nvfp4.BLOCK_SIZE)
        num_cols = Int32(mCodes.shape[1]) // num_bytes
        codes_row = mCodes.iterator.toint() + Int64(row) * Int64(mCodes.shape[1])
        first = cute.arch.block_idx()[1] * WARP + cute.arch.lane_idx()
        rZero = cute.make_rmem_tensor(cute.make_layout(num_bytes // WORD_BYTES), Uint32)
        rZero.fill(0)
        for col in cutlass.range(first, num_cols, cute.arch.grid_dim()[1] * WARP, unroll=1):
            address = codes_row + Int64(col) * num_bytes
            cute.autovec_copy(rZero, vector_at(address, num_bytes // WORD_BYTES, num_bytes))
            if cutlass.const_expr(not self.config.swizzled):
                gSf = bytes_at(self._sf_row_address(mSf, row, num_cols) + Int64(col), 1)
                gSf[0] = Uint8(0)

    @cute.jit
    def _zero_pad_rows(self, mSf: cute.Tensor, tile: Int32, num_valid: Int32):
        """Rows of a row tile from ``num_valid`` on; a lane has one line, that is four rows."""
        line, col_tiles = cute.arch.lane_idx(), Int32(mSf.shape[1])
        if num_valid < nvfp4.SWIZZLE_TILE_ROWS:
            rZero = cute.make_rmem_tensor(cute.make_layout(ROW_GROUPS), Uint32)
            rZero.fill(0)
            first, stride = cute.arch.block_idx()[1], cute.arch.grid_dim()[1]
            for col_tile in cutlass.range(first, col_tiles, stride, unroll=1):
                address = mSf.iterator.toint() + (
                    (Int64(tile) * Int64(col_tiles) + Int64(col_tile)) * nvfp4.SWIZZLE_TILE_BYTES
                    + Int64(line) * nvfp4.SWIZZLE_LINE_BYTES
                )
                if line >= num_valid:
                    cute.autovec_copy(rZero, vector_at(address, ROW_GROUPS))
                else:
                    for group in cutlass.range_constexpr(1, ROW_GROUPS):
                        if line + group * nvfp4.SWIZZLE_LINES >= num_valid:
                            gWord = vector_at(address + group * WORD_BYTES, 1, WORD_BYTES)
                            gWord[0] = Uint32(0)

    @cute.jit
    def _sf_row_address(self, mSf: cute.Tensor, row: Int32, num_cols: Int32) -> Int64:
        if cutlass.const_expr(not self.config.swizzled):
            return mSf.iterator.toint() + Int64(row) * Int64(num_cols)
        tile, row_in_tile = row // nvfp4.SWIZZLE_TILE_ROWS, row % nvfp4.SWIZZLE_TILE_ROWS
        return mSf.iterator.toint() + (
            Int64(tile) * Int64(mSf.shape[1]) * nvfp4.SWIZZLE_TILE_BYTES
            + Int64(row_in_tile % nvfp4.SWIZZLE_LINES) * nvfp4.SWIZZLE_LINE_BYTES
            + Int64(row_in_tile // nvfp4.SWIZZLE_LINES) * nvfp4.SWIZZLE_TILE_COLS
        )

    @cute.jit
    def _sf_col_offset(self, col: Int32) -> Int64:
        if cutlass.const_expr(not self.config.swizzled):
            return Int64(col)
        tile, col_in_tile = col // nvfp4.SWIZZLE_TILE_COLS, col % nvfp4.SWIZZLE_TILE_COLS
        return Int64(tile) * nvfp4.SWIZZLE_TILE_BYTES + Int64(col_in_tile)

    @cute.jit
    def _num_sf_cols(self, mSf: cute.Tensor, num_cols: Int32) -> Int32:
        """Scales in a row, pads included."""
        if cutlass.const_expr(not self.config.swizzled):
            return num_cols
        return Int32(mSf.shape[1]) * nvfp4.SWIZZLE_TILE_COLS

    @cute.jit
    def _num_steps(self, mX: cute.Tensor, mSf: cute.Tensor) -> Int32:
        cols = self._num_sf_cols(mSf, Int32(mX.shape[1]) // nvfp4.BLOCK_SIZE)
        return (cols + (BLOCKS_PER_STEP - 1)) // BLOCKS_PER_STEP

    def compile(self, options: str = "") -> Callable[..., None]:
        config = self.config
        rows, cols = cute.sym_int32(), cute.sym_int32()
        if config.swizzled:
            block_scale = fake_swizzled(cute.sym_int32(), cute.sym_int32())
        else:
            block_scale = make_fake_compact_tensor(Uint8, (rows, cols), stride_order=(1, 0))
        codes_align = nvfp4.packed_size(nvfp4.BLOCK_SIZE)
        packed_k = cute.sym_int32(divisibility=codes_align)
        return cute.compile(
            self,
            _fake_rows(config.dtype, rows),
            make_fake_compact_tensor(Float32, (cute.sym_int32(),), assumed_align=WORD_BYTES),
            fake_offs() if config.ragged else None,
            make_fake_compact_tensor(
                Uint8, (rows, packed_k), stride_order=(1, 0), assumed_align=codes_align
            ),
            block_scale,
            Int32(1),
            Int32(1),
            make_fake_stream(use_tvm_ffi_env_stream=True),
            options=f"--enable-tvm-ffi {options}",
        )


def _fake_rows(dtype: torch.dtype, rows: cute.SymInt) -> cute.Tensor:
    # No divisibility: the stride of a single row means nothing. ``why_no_rows`` checks.
    row_stride = cute.sym_int64()
    k = cute.sym_int32(divisibility=nvfp4.BLOCK_SIZE)
    return make_fake_tensor(_DTYPES[dtype], (rows, k), (row_stride, 1), assumed_align=VECTOR_BYTES)


def build(config: QuantizeConfig, options: str = "") -> Callable[..., None]:
    """Compile for ``CUTE_DSL_ARCH`` or the present GPU; called with torch tensors."""
    return QuantizeKernel(config).compile(options)


def why_no_rows(x: Tensor) -> str | None:
    """Why the kernels can not read the rows of x (R, K), or None where they can."""
    if x.shape[1] % nvfp4.BLOCK_SIZE:
        return f"K must be a multiple of {nvfp4.BLOCK_SIZE}, got {x.shape[1]}"
    if x.stride(1) != 1:
        return "elements of a row must be contiguous"
    row_stride = x.stride(0) if x.shape[0] > 1 else 0
    if x.data_ptr() % VECTOR_BYTES or row_stride * x.itemsize % VECTOR_BYTES:
        return f"rows must start at multiples of {VECTOR_BYTES} bytes"
    return None


def launch_quantize(
    *,
    x: Tensor,
    global_scale: Tensor,
    offs: Tensor | None,
    codes: Tensor,
    block_scale: Tensor,
    get_compiled: GetCompiled,
) -> None:
    """codes, block_scale = quantize_nvfp4(x, global_scale, offs), every byte of both written.

    x: (R, K) with ``why_no_rows(x)`` None. global_scale: fp32 () or (1,), with offs (E,), else
    (R,) or (R, 1), contiguous. offs: (E,) int32 or None. codes: (R, K / 2) uint8, contiguous.
    block_scale: one byte elements, contiguous; rank 2 is linear, rank 4 swizzled.
    get_compiled: from a ``QuantizeConfig`` to what ``build`` returns for it.
    """
    check_num_experts(offs)
    reason = why_no_rows(x)
    if reason is not None:
        raise ValueError(f"x: {reason}")
    swizzled = block_scale.ndim == 4
    if block_scale.numel() == 0:
        return
    scale: Literal["tensor", "row", "expert"] = "row"
    if global_scale.ndim == 0:
        scale = "tensor"
    elif global_scale.ndim == 1 and offs is not None:
        scale = "expert"
    config = QuantizeConfig(x.dtype, scale, swizzled, offs is not None)
    warps = config.threads // WARP
    sf = tiles_view(block_scale) if swizzled else block_scale.view(torch.uint8)
    ctas = num_multiprocessors(x.device) * CTAS_PER_SM
    row_ctas = nvfp4.ceil_div(max(x.shape[0], sf.shape[0] if swizzled else 0), warps)
    # A row's steps go to CTAs of their own while there are multiprocessors to spare.
    num_steps = nvfp4.ceil_div(nvfp4.num_blocks(x.shape[1]), BLOCKS_PER_STEP)
    grid_steps = min(num_steps, nvfp4.ceil_div(ctas, row_ctas))
    if swizzled:
        row_ctas = min(row_ctas, nvfp4.ceil_div(ctas, grid_steps))
    get_compiled(config)(x, global_scale.view(-1), offs, codes, sf, row_ctas, grid_steps)
