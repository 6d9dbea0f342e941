"""NVFP4 codes and block scales to rows of floats: for a bf16 grouped mm, and for inspection.

CuTe DSL for sm_90 and later (bf16x2 multiplication). Bound by memory. Every product of an e2m1 and
an e4m3 number is exact in bf16; a global scale is multiplied in fp32 and rounded once.
"""

from collections.abc import Callable

import cuda.bindings.driver as cuda_driver
import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, Uint8, Uint16, Uint32
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from nvfp4_ops import format as nvfp4
from nvfp4_ops.kernels.blocks import FloatWords
from nvfp4_ops.kernels.launch.decode import (
    LINES_PER_UNIT,
    THREADS,
    UNITS_PER_TILE,
    VECTORS_PER_LANE,
    WARPS,
    DecodeConfig,
)
from nvfp4_ops.kernels.launch.tensors import CODE_BYTES, VECTOR_BYTES, WARP, WORD_BYTES
from nvfp4_ops.kernels.memory import (
    bytes_at,
    fake_codes,
    fake_offs,
    fake_rows,
    fake_swizzled,
    fake_vector,
    follow_previous_kernel,
    ptx,
    store_words,
    vector_at,
)
from nvfp4_ops.kernels.ragged import locate_ragged_tile, locate_tile, warp_upper_bound

# The magnitude of a code in a bf16 word's lowest exponent bits and highest mantissa bit is 2^-126
# times its value, subnormal codes included.
_MAGNITUDE_MASK, _SIGN_MASK = 0x01C001C0, 0x80008000
_MAGNITUDE_SHIFT, _SIGN_SHIFT = 6, 12
_TWO_TO_126 = 0x7E807E80


def spread_byte(code_byte: Uint32) -> Uint32:
    """Two codes in a byte to bf16x2, the low nibble first: each 2^-126 times its value."""
    # Nibbles at bits 0 and 16; what else the product holds is masked.
    both = code_byte * Uint32(0x1001)
    magnitudes = (both << _MAGNITUDE_SHIFT) & Uint32(_MAGNITUDE_MASK)
    return magnitudes | ((both << _SIGN_SHIFT) & Uint32(_SIGN_MASK))


def _multiply_pairs(first: Uint32, second: Uint32) -> Uint32:
    # The instruction takes no immediate.
    code = "{.reg .b32 second; mov.b32 second, {$r1}; mul.rn.bf16x2 {$w0}, {$r0}, second;}"
    return ptx(code, Uint32, first, second)


def _decode_sf(sf: Uint32) -> Uint32:
    """An e4m3 byte to bf16, twice in a word."""
    code = (
        "{.reg .b16 sf, low, high; .reg .b32 both, single; cvt.u16.u32 sf, {$r0};"
        " cvt.rn.f16x2.e4m3x2 both, sf; mov.b32 {low, high}, both;"
        " cvt.f32.f16 single, low; prmt.b32 {$w0}, single, single, 0x3232;}"
    )
    return ptx(code, Uint32, sf)


class DecodeKernel:
    """out[r, k] = e2m1(codes[r, k]) * block_scale[r, k // 16] (* global_scale); 0 of no expert.

    A warp decodes a row, a lane ``VECTORS_PER_LANE`` times 16 bytes of output at once, so that a
    warp's stores are contiguous. A CTA has a step of eight rows: linear, the next ones; swizzled,
    those of two lines.

    Limits: K a multiple of 16; codes at a multiple of 8 bytes; at most ``MAX_EXPERTS`` experts
    where ragged.
    """

    def __init__(self, config: DecodeConfig) -> None:
        if config.scale not in ("none", "tensor", "row", "expert"):
            raise ValueError(f"scale: must be none, tensor, row or expert, got {config.scale}")
        self.config = config
        self.words = FloatWords(config.dtype)
        if config.scale == "none" and config.dtype != torch.bfloat16:
            raise ValueError(f"dtype: without a global scale only bfloat16, got {config.dtype}")
        self.vector_size = VECTOR_BYTES // self.words.element_bytes
        self.code_bytes = nvfp4.packed_size(self.vector_size)

    @cute.jit
    def __call__(
        self,
        mCodes: cute.Tensor,
        mSf: cute.Tensor,
        mScale: cute.Tensor | None,
        mOffs: cute.Tensor | None,
        mOut: cute.Tensor,
        rows_per_expert: Int32,
        grid_rows: Int32,
        grid_steps: Int32,
        stream: cuda_driver.CUstream,
    ):
        self.kernel(mCodes, mSf, mScale, mOffs, mOut, rows_per_expert).launch(
            grid=[grid_rows, grid_steps, 1], block=[THREADS, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(
        self,
        mCodes: cute.Tensor,
        mSf: cute.Tensor,
        mScale: cute.Tensor | None,
        mOffs: cute.Tensor | None,
        mOut: cute.Tensor,
        rows_per_expert: Int32,
    ):
        config = self.config
        cta, warp = cute.arch.block_idx()[0], cute.arch.make_warp_uniform(cute.arch.warp_idx())
        num_rows, num_cols = Int32(mCodes.shape[0]), Int32(mCodes.shape[1]) // CODE_BYTES
        num_experts, end_row = Int32(0), num_rows
        follow_previous_kernel()
        if cutlass.const_expr(config.ragged):
            num_experts = Int32(mOffs.shape[0])
            end_row = Int32(mOffs[num_experts - 1])
        if cutlass.const_expr(config.swizzled):
            tile = cta // UNITS_PER_TILE
            line = cta % UNITS_PER_TILE * LINES_PER_UNIT + warp % LINES_PER_UNIT
            group = warp // LINES_PER_UNIT
            if cutlass.const_expr(config.ragged):
                expert, first_row, num_valid = locate_ragged_tile(mOffs, num_experts, tile)
            else:
                expert, first_row, num_valid = locate_tile(rows_per_expert, tile)
            row_in_tile = line + group * nvfp4.SWIZZLE_LINES
            if row_in_tile < num_valid:
                sf_row = mSf.iterator.toint() + (
                    Int64(tile) * Int64(mSf.shape[1]) * nvfp4.SWIZZLE_TILE_BYTES
                    + Int64(line) * nvfp4.SWIZZLE_LINE_BYTES
                    + Int64(group) * nvfp4.SWIZZLE_TILE_COLS
                )
                self._decode_row(mCodes, mScale, mOut, first_row + row_in_tile, sf_row, expert)
        else:
            row = cta * WARPS + warp
            if row < end_row:
                expert = Int32(0)
                if cutlass.const_expr(config.scale == "expert" and config.ragged):
                    expert = warp_upper_bound(mOffs, num_experts, row)
                elif cutlass.const_expr(config.scale == "expert"):
                    expert = row // rows_per_expert
                sf_row = mSf.iterator.toint() + Int64(row) * Int64(num_cols)
                self._decode_row(mCodes, mScale, mOut, row, sf_row, expert)
        if cutlass.const_expr(config.ragged):
            self._zero_rows_from(mOut, end_row)

    @cute.jit
    def _decode_row(
        self,
        mCodes: cute.Tensor,
        mScale: cute.Tensor | None,
        mOut: cute.Tensor,
        row: Int32,
        sf_row: Int64,
        expert: Int32,
    ):
        """This CTA's step of a row. sf_row: address of the row's first scale."""
        global_scale = Float32(1.0)
        if cutlass.const_expr(self.config.scale != "none"):
            index = {"tensor": Int32(0), "row": row, "expert": expert}[self.config.scale]
            global_scale = Float32(mScale[index])
        codes_row = mCodes.iterator.toint() + Int64(row) * Int64(mCodes.shape[1])
        num_vectors = Int32(mCodes.shape[1]) // self.code_bytes
        first = cute.arch.block_idx()[1] * (WARP * VECTORS_PER_LANE) + cute.arch.lane_idx()
        out_row = mOut.iterator.toint() + Int64(row) * Int64(num_vectors) * VECTOR_BYTES
        codes, sfs = [], []
        for i in cutlass.range_constexpr(VECTORS_PER_LANE):
            # Past the end the last vector is loaded again: no branch between the loads.
            vector = cutlass.min(first + i * WARP, num_vectors - 1)
            codes.append(self._load_codes(codes_row + Int64(vector) * self.code_bytes))
            gSf = bytes_at(sf_row + self._sf_offset(vector), 1)
            sfs.append(Uint32(Uint8(gSf[0])))
        for i in cutlass.range_constexpr(VECTORS_PER_LANE):
            vector = first + i * WARP
            words = self._decode_vector(codes[i], sfs[i], global_scale)
            if vector < num_vectors:
                store_words(out_row + Int64(vector) * VECTOR_BYTES, words)

    def _decode_vector(self, codes: Uint32, sf: Uint32, global_scale: Float32) -> list[Uint32]:
        """16 bytes of output."""
        scales = _decode_sf(sf)
        products = []
        for i in range(self.code_bytes):
            pair = spread_byte((codes >> (8 * i)) & Uint32(0xFF))
            exact = _multiply_pairs(_multiply_pairs(pair, Uint32(_TWO_TO_126)), scales)
            products.append(exact)
        if self.config.scale == "none":
            return products
        values = FloatWords(torch.bfloat16).unpack(products)
        return self.words.pack([value * global_scale for value in values])

    def _load_codes(self, address: Int64) -> Uint32:
        if self.code_bytes == WORD_BYTES:
            return Uint32(vector_at(address, 1, WORD_BYTES)[0])
        pointer = cute.make_ptr(Uint16, address, cute.AddressSpace.gmem, assumed_align=2)
        return Uint32(cute.make_tensor(pointer, cute.make_layout(1))[0])

    def _sf_offset(self, vector: Int32) -> Int64:
        """Bytes from a row's first scale to a vector's."""
        col = vector // (nvfp4.BLOCK_SIZE // self.vector_size)
        if not self.config.swizzled:
            return Int64(col)
        tile, col_in_tile = col // nvfp4.SWIZZLE_TILE_COLS, col % nvfp4.SWIZZLE_TILE_COLS
        return Int64(tile) * nvfp4.SWIZZLE_TILE_BYTES + Int64(col_in_tile)

    @cute.jit
    def _zero_rows_from(self, mOut: cute.Tensor, end_row: Int32):
        """Rows of no expert, by all warps of the grid."""
        num_rows, num_vectors = Int32(mOut.shape[0]), Int32(mOut.shape[1]) // self.vector_size
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        first_row = end_row + cute.arch.block_idx()[0] * WARPS + warp
        row_stride = cute.arch.grid_dim()[0] * WARPS
        first = cute.arch.block_idx()[1] * WARP + cute.arch.lane_idx()
        stride = cute.arch.grid_dim()[1] * WARP
        for row in cutlass.range(first_row, num_rows, row_stride, unroll=1):
            out_row = mOut.iterator.toint() + Int64(row) * Int64(num_vectors) * VECTOR_BYTES
            for vector in cutlass.range(first, num_vectors, stride, unroll=1):
                zero = [Uint32(0)] * (VECTOR_BYTES // WORD_BYTES)
                store_words(out_row + Int64(vector) * VECTOR_BYTES, zero)

    def compile(self, options: str = "") -> Callable[..., None]:
        config, rows, cols = self.config, cute.sym_int32(), cute.sym_int32()
        if config.swizzled:
            block_scale = fake_swizzled(cute.sym_int32(), cute.sym_int32())
        else:
            block_scale = make_fake_compact_tensor(Uint8, (rows, cols), stride_order=(1, 0))
        return cute.compile(
            self,
            fake_codes(rows),
            block_scale,
            None if config.scale == "none" else fake_vector(Float32),
            fake_offs() if config.ragged else None,
            fake_rows(config.dtype, rows),
            Int32(1),
            Int32(1),
            Int32(1),
            make_fake_stream(use_tvm_ffi_env_stream=True),
            options=f"--enable-tvm-ffi {options}",
        )


def build(config: DecodeConfig, options: str = "") -> Callable[..., None]:
    """Compile for ``CUTE_DSL_ARCH`` or the present GPU; called with torch tensors."""
    return DecodeKernel(config).compile(options)
