"""Rows of activations, or of an activation function's inputs, to NVFP4 codes and block scales.

Or to the values these stand for, in bf16, for tensor cores without FP4. Portable CuTe DSL. The
kernel is bound by memory; ``blocks`` has its arithmetic.
"""

from collections.abc import Callable

import cuda.bindings.driver as cuda_driver
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, Uint32
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from nvfp4_ops import format as nvfp4
from nvfp4_ops.kernels.blocks import BlockQuantizer, encode_scales
from nvfp4_ops.kernels.launch.quantize_rows import (
    BLOCKS_PER_LANE,
    LINEAR_COLS,
    LINEAR_LANES,
    SWIZZLED_COLS,
    SWIZZLED_LANES,
    QuantizeConfig,
)
from nvfp4_ops.kernels.launch.tensors import CODE_BYTES, VALUE_BYTES, VECTOR_BYTES, WARP, WORD_BYTES
from nvfp4_ops.kernels.memory import (
    bytes_at,
    fake_codes,
    fake_offs,
    fake_rows,
    fake_swizzled,
    fake_values,
    fake_vector,
    follow_previous_kernel,
    store_block,
    store_words,
)
from nvfp4_ops.kernels.ragged import locate_ragged_tile, locate_tile, warp_upper_bound


class QuantizeKernel:
    """codes, block_scale = quantize_nvfp4(act(x), global_scale, offs, swizzled).

    With ``values``: out = round_nvfp4(act(x), global_scale, offs, token_of_row) instead.

    A lane quantizes a block at a time: it loads the 16 elements with 16-byte loads and stores 8
    bytes of codes and a scale byte, or 32 bytes of values. Linear, a warp has 64 contiguous blocks
    of a row. Swizzled, it has 16 contiguous blocks of the rows l, l + 32, l + 64, l + 96 of a tile,
    whose scales are whole lines of 16 bytes; pads are zeroed by the same stores.

    Grid: rows x column steps, swizzled lines x column steps. Rows of no expert are not read.

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
        if config.values and config.swizzled:
            raise ValueError("swizzled: values have no block scales")
        if config.gather and not config.values:
            raise ValueError("gather: only of values")
        self.config = config
        self.warps = config.threads // WARP
        self.blocks = BlockQuantizer(config.dtype, config.activation, config.limit)
        # A block in mOut: its elements, two codes to one, and its bytes.
        self.out_size = nvfp4.BLOCK_SIZE if config.values else CODE_BYTES
        self.out_bytes = VALUE_BYTES if config.values else CODE_BYTES

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,
        mScale: cute.Tensor,
        mOffs: cute.Tensor | None,
        mTokenOfRow: cute.Tensor | None,
        mOut: cute.Tensor,
        mSf: cute.Tensor | None,
        grid_rows: Int32,
        grid_steps: Int32,
        col_warps: Int32,
        stream: cuda_driver.CUstream,
    ):
        self.kernel(mX, mScale, mOffs, mTokenOfRow, mOut, mSf, col_warps).launch(
            grid=[grid_rows, grid_steps, 1],
            block=[self.config.threads, 1, 1],
            min_blocks_per_mp=self.config.resident_ctas,
            # The default, said aloud: else the compiler asks a driver, and there may be none.
            preferred_smem_carveout=-1,
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        mX: cute.Tensor,
        mScale: cute.Tensor,
        mOffs: cute.Tensor | None,
        mTokenOfRow: cute.Tensor | None,
        mOut: cute.Tensor,
        mSf: cute.Tensor | None,
        col_warps: Int32,
    ):
        follow_previous_kernel()
        if cutlass.const_expr(self.config.swizzled):
            self._quantize_tiles(mX, mScale, mOffs, mOut, mSf, col_warps)
        else:
            self._quantize_linear(mX, mScale, mOffs, mTokenOfRow, mOut, mSf)

    @cute.jit
    def _quantize_linear(
        self,
        mX: cute.Tensor,
        mScale: cute.Tensor,
        mOffs: cute.Tensor | None,
        mTokenOfRow: cute.Tensor | None,
        mOut: cute.Tensor,
        mSf: cute.Tensor | None,
    ):
        warp, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.lane_idx()
        row = cute.arch.block_idx()[0] * self.warps + warp
        num_rows, num_cols = Int32(mOut.shape[0]), Int32(mOut.shape[1]) // self.out_size
        if row < num_rows:
            end_row = num_rows
            if cutlass.const_expr(self.config.ragged):
                end_row = Int32(mOffs[Int32(mOffs.shape[0]) - 1])
            x_row = row
            if cutlass.const_expr(self.config.gather):
                x_row = Int32(mTokenOfRow[row])
            sf_row = None
            if cutlass.const_expr(not self.config.values):
                sf_row = mSf.iterator.toint() + Int64(row) * Int64(num_cols)
            if row < end_row and x_row >= 0:
                self._quantize_row(
                    mX,
                    mScale,
                    mOffs,
                    mOut,
                    row=row,
                    x_row=x_row,
                    valid=True,
                    sf_row=sf_row,
                    first_col=lane,
                    lanes=LINEAR_LANES,
                    cols_per_step=LINEAR_COLS,
                    expert=None,
                    num_sf_cols=num_cols,
                )
            else:
                first, stride = self._my_columns(lane)
                for col in cutlass.range(first, num_cols, stride, unroll=1):
                    self._zero_block(mOut, row, col)
                    if cutlass.const_expr(not self.config.values):
                        gSf = bytes_at(sf_row + Int64(col), 1)
                        gSf[0] = Uint8(0)

    @cute.jit
    def _quantize_tiles(
        self,
        mX: cute.Tensor,
        mScale: cute.Tensor,
        mOffs: cute.Tensor | None,
        mOut: cute.Tensor,
        mSf: cute.Tensor,
        col_warps: Int32,
    ):
        warp, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.lane_idx()
        num_rows, col_tiles = Int32(mOut.shape[0]), Int32(mSf.shape[1])
        warp_row, warp_col = warp // col_warps, warp % col_warps
        row_warps = self.warps // col_warps
        group, lane_col = lane // SWIZZLED_LANES, lane % SWIZZLED_LANES
        line_index = cute.arch.block_idx()[0] * row_warps + warp_row
        tile, line = line_index // nvfp4.SWIZZLE_LINES, line_index % nvfp4.SWIZZLE_LINES
        # The last CTA may have fewer lines than warps.
        if tile < Int32(mSf.shape[0]):
            if cutlass.const_expr(self.config.ragged):
                num_experts = Int32(mOffs.shape[0])
                expert, first_row, num_valid = locate_ragged_tile(mOffs, num_experts, tile)
            else:
                expert, first_row, num_valid = locate_tile(num_rows, tile)
            line_address = mSf.iterator.toint() + (
                Int64(tile) * Int64(col_tiles) * nvfp4.SWIZZLE_TILE_BYTES
                + Int64(line) * nvfp4.SWIZZLE_LINE_BYTES
            )
            if line < num_valid:
                row_in_tile = line + group * nvfp4.SWIZZLE_LINES
                # A lane without a row loads the first group's, whose lanes load the same bytes.
                row = first_row + line
                if row_in_tile < num_valid:
                    row = first_row + row_in_tile
                self._quantize_row(
                    mX,
                    mScale,
                    mOffs,
                    mOut,
                    row=row,
                    x_row=row,
                    valid=row_in_tile < num_valid,
                    sf_row=line_address + Int64(group) * nvfp4.SWIZZLE_TILE_COLS,
                    first_col=warp_col * SWIZZLED_COLS + lane_col,
                    lanes=SWIZZLED_LANES,
                    cols_per_step=col_warps * SWIZZLED_COLS,
                    expert=expert,
                    num_sf_cols=col_tiles * nvfp4.SWIZZLE_TILE_COLS,
                )
            else:
                first = (cute.arch.block_idx()[1] * col_warps + warp_col) * WARP + lane
                stride = cute.arch.grid_dim()[1] * col_warps * WARP
                for col_tile in cutlass.range(first, col_tiles, stride, unroll=1):
                    address = line_address + Int64(col_tile) * nvfp4.SWIZZLE_TILE_BYTES
                    store_words(address, [Uint32(0)] * (VECTOR_BYTES // WORD_BYTES))
        if cutlass.const_expr(self.config.ragged):
            self._zero_codes_past_the_end(mOffs, mOut)

    @cute.jit
    def _quantize_row(
        self,
        mX: cute.Tensor,
        mScale: cute.Tensor,
        mOffs: cute.Tensor | None,
        mOut: cute.Tensor,
        row: Int32,
        x_row: Int32,
        valid: bool,
        sf_row: Int64 | None,
        first_col: Int32,
        lanes: cutlass.Constexpr[int],
        cols_per_step: Int32,
        expert: Int32 | None,
        num_sf_cols: Int32,
    ):
        """Quantize this lane's blocks of a row: first_col, + lanes, + cols_per_step and so on.

        x_row: its row of x. valid: False where codes are not to be stored and scales are zero.
        sf_row: address of the row's first scale, None of values. expert: of the row, None where it
        is to be looked up.
        """
        num_cols = Int32(mOut.shape[1]) // self.out_size
        block_bytes = self.blocks.block_bytes
        num_steps = (num_sf_cols + cols_per_step - 1) // cols_per_step
        first_step, step_stride = cute.arch.block_idx()[1], cute.arch.grid_dim()[1]
        input_bytes = Int64(num_cols) * block_bytes
        x_address = mX.iterator.toint() + Int64(x_row) * (mX.stride[0] * self.config.dtype.itemsize)
        rX = [self.blocks.registers() for _ in range(BLOCKS_PER_LANE)]
        for i in cutlass.range_constexpr(BLOCKS_PER_LANE):
            # Lanes past the end load the last block again: no branch between the loads.
            col = cutlass.min(first_col + i * lanes + first_step * cols_per_step, num_cols - 1)
            self.blocks.load(rX[i], x_address + Int64(col) * block_bytes, input_bytes)
        scales = self._scales(mScale, mOffs, row, expert)
        for step in cutlass.range(first_step, num_steps, step_stride, unroll=1):
            next_step = step + step_stride
            for i in cutlass.range_constexpr(BLOCKS_PER_LANE):
                col = first_col + i * lanes + step * cols_per_step
                words = self.blocks.words(rX[i])
                if cutlass.const_expr(self.config.values):
                    out = self.blocks.round(words, scales)
                else:
                    out, sf = self.blocks.quantize(words, scales)
                if next_step < num_steps:
                    next_col = cutlass.min(col + step_stride * cols_per_step, num_cols - 1)
                    address = x_address + Int64(next_col) * block_bytes
                    self.blocks.load(rX[i], address, input_bytes)
                if cutlass.const_expr(self.config.values):
                    if col < num_cols:
                        store_block(self._out_address(mOut, row, col), out)
                else:
                    if valid and col < num_cols:
                        store_block(self._out_address(mOut, row, col), out)
                    else:
                        sf = Uint32(0)
                    if col < num_sf_cols:
                        gSf = bytes_at(sf_row + self._sf_offset(col), 1)
                        gSf[0] = Uint8(sf)

    @cute.jit
    def _scales(
        self, mScale: cute.Tensor, mOffs: cute.Tensor | None, row: Int32, expert: Int32 | None
    ):
        """``encode_scales`` of a row, which is the warp's where ``expert`` is None."""
        index = Int32(0)
        if cutlass.const_expr(self.config.scale == "row"):
            index = row
        elif cutlass.const_expr(self.config.scale == "expert"):
            index = expert
            if cutlass.const_expr(expert is None):
                index = warp_upper_bound(mOffs, Int32(mOffs.shape[0]), row)
        return encode_scales(Float32(mScale[index]))

    def _sf_offset(self, col: Int32) -> Int64:
        """Bytes from a row's first scale."""
        if not self.config.swizzled:
            return Int64(col)
        tile, col_in_tile = col // nvfp4.SWIZZLE_TILE_COLS, col % nvfp4.SWIZZLE_TILE_COLS
        return Int64(tile) * nvfp4.SWIZZLE_TILE_BYTES + Int64(col_in_tile)

    def _out_address(self, mOut: cute.Tensor, row: Int32, col: Int32) -> Int64:
        num_cols = Int32(mOut.shape[1]) // self.out_size
        return mOut.iterator.toint() + (Int64(row) * Int64(num_cols) + Int64(col)) * self.out_bytes

    def _zero_block(self, mOut: cute.Tensor, row: Int32, col: Int32) -> None:
        zeros = [Uint32(0)] * (self.out_bytes // WORD_BYTES)
        store_block(self._out_address(mOut, row, col), zeros)

    def _my_columns(self, lane: Int32) -> tuple[Int32, Int32]:
        """First and stride of this lane's columns, where a warp has a row."""
        return cute.arch.block_idx()[1] * WARP + lane, cute.arch.grid_dim()[1] * WARP

    @cute.jit
    def _zero_codes_past_the_end(self, mOffs: cute.Tensor, mOut: cute.Tensor):
        num_rows, num_cols = Int32(mOut.shape[0]), Int32(mOut.shape[1]) // self.out_size
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        first_row = (
            Int32(mOffs[Int32(mOffs.shape[0]) - 1]) + cute.arch.block_idx()[0] * self.warps + warp
        )
        row_stride = cute.arch.grid_dim()[0] * self.warps
        first, stride = self._my_columns(cute.arch.lane_idx())
        for row in cutlass.range(first_row, num_rows, row_stride, unroll=1):
            for col in cutlass.range(first, num_cols, stride, unroll=1):
                self._zero_block(mOut, row, col)

    def compile(self, options: str = "") -> Callable[..., None]:
        config = self.config
        rows, cols = cute.sym_int32(), cute.sym_int32()
        block_scale = None
        if config.swizzled:
            block_scale = fake_swizzled(cute.sym_int32(), cute.sym_int32())
        elif not config.values:
            block_scale = make_fake_compact_tensor(Uint8, (rows, cols), stride_order=(1, 0))
        return cute.compile(
            self,
            fake_rows(config.dtype, None if config.gather else rows),
            fake_vector(Float32),
            fake_offs() if config.ragged else None,
            fake_vector(Int32) if config.gather else None,
            fake_values(rows) if config.values else fake_codes(rows),
            block_scale,
            Int32(1),
            Int32(1),
            Int32(1),
            make_fake_stream(use_tvm_ffi_env_stream=True),
            options=f"--enable-tvm-ffi {options}",
        )


def build(config: QuantizeConfig, options: str = "") -> Callable[..., None]:
    """Compile for ``CUTE_DSL_ARCH`` or the present GPU; called with torch tensors."""
    return QuantizeKernel(config).compile(options)
