"""Rows to NVFP4 with a global scale of each row, found and used in one pass over memory.

To codes and block scales, or to the values these stand for, in bf16. Portable CuTe DSL. A row stays
in the registers of its warps between its maximum and its codes, so rows are limited; ``amax`` and
``quantize_rows`` do any row in two passes.
"""

from collections.abc import Callable

import cuda.bindings.driver as cuda_driver
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, Uint32
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from nvfp4_ops import format as nvfp4
from nvfp4_ops.kernels.amax import global_scale_of, warps_amax
from nvfp4_ops.kernels.blocks import BlockQuantizer, encode_scales
from nvfp4_ops.kernels.launch.per_token import MAX_WARPS, PerTokenConfig
from nvfp4_ops.kernels.launch.tensors import CODE_BYTES, VALUE_BYTES, WARP, WORD_BYTES
from nvfp4_ops.kernels.memory import (
    bytes_at,
    fake_codes,
    fake_offs,
    fake_rows,
    fake_values,
    fake_vector,
    follow_previous_kernel,
    store_block,
)


class PerTokenKernel:
    """scale[r] = global_scale(act(x[r])); codes, block_scale = quantize_nvfp4(act(x), scale).

    With ``values``: out, scale = round_per_token_nvfp4(act(x), offs, token_of_row) instead.

    ``row_warps`` warps load a row, all its blocks at once, reduce its maximum by shuffles and in
    shared memory, and quantize what they hold. Rows of no expert are not read; their codes and
    block scales are zero, their scale is 1.

    Limits: rows of x start at multiples of 16 bytes and fit the registers (``choose_config``).
    """

    def __init__(self, config: PerTokenConfig) -> None:
        if not 0 < config.row_warps <= MAX_WARPS or MAX_WARPS % config.row_warps:
            raise ValueError(f"row_warps: must divide {MAX_WARPS}, got {config.row_warps}")
        if config.gather and not config.values:
            raise ValueError("gather: only of values")
        self.config = config
        # A block in mOut: its elements, two codes to one, and its bytes.
        self.out_size = nvfp4.BLOCK_SIZE if config.values else CODE_BYTES
        self.out_bytes = VALUE_BYTES if config.values else CODE_BYTES
        self.rows_per_cta = config.warps // config.row_warps
        self.blocks = BlockQuantizer(config.dtype, config.activation, config.limit)

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,
        mOffs: cute.Tensor | None,
        mTokenOfRow: cute.Tensor | None,
        mOut: cute.Tensor,
        mSf: cute.Tensor | None,
        mScale: cute.Tensor,
        stream: cuda_driver.CUstream,
    ):
        self.kernel(mX, mOffs, mTokenOfRow, mOut, mSf, mScale).launch(
            grid=[cute.ceil_div(Int32(mOut.shape[0]), self.rows_per_cta), 1, 1],
            block=[self.config.warps * WARP, 1, 1],
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        mX: cute.Tensor,
        mOffs: cute.Tensor | None,
        mTokenOfRow: cute.Tensor | None,
        mOut: cute.Tensor,
        mSf: cute.Tensor | None,
        mScale: cute.Tensor,
    ):
        row_warps = self.config.row_warps
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        row = cute.arch.block_idx()[0] * self.rows_per_cta + warp // row_warps
        first_col = warp % row_warps * WARP + cute.arch.lane_idx()
        num_rows = end_row = Int32(mOut.shape[0])
        follow_previous_kernel()
        if cutlass.const_expr(self.config.ragged):
            end_row = Int32(mOffs[Int32(mOffs.shape[0]) - 1])
        num_words = self.blocks.num_words
        rWords = cute.make_rmem_tensor(
            cute.make_layout((num_words, self.config.blocks_per_lane)), Uint32
        )
        rWords.fill(0)
        amax = Float32(0.0)
        x_row = row
        if cutlass.const_expr(self.config.gather):
            x_row = Int32(-1)
            if row < num_rows:
                x_row = Int32(mTokenOfRow[row])
        inside = row < end_row and x_row >= 0
        if inside:
            self._load_row(mX, mOut, x_row, first_col, rWords)
            for i in cutlass.range_constexpr(self.config.blocks_per_lane):
                absolute = self.blocks.absolute([rWords[j, i] for j in range(num_words)])
                amax = cute.arch.fmax(amax, self.blocks.amax(absolute), nan=True)
        # The CTA reduces together, so warps without a row take part.
        amax = warps_amax(amax, row_warps, self.config.warps)
        if row < num_rows:
            global_scale = Float32(1.0)
            if inside:
                global_scale = global_scale_of(amax)
            self._store_row(mOut, mSf, row, first_col, rWords, global_scale, inside)
            if first_col == 0:
                mScale[row] = global_scale

    @cute.jit
    def _load_row(self, mX: cute.Tensor, mOut: cute.Tensor, row: Int32, first_col: Int32, rWords):
        """This lane's blocks of a row of x, activated."""
        num_cols, block_bytes = Int32(mOut.shape[1]) // self.out_size, self.blocks.block_bytes
        x_row = mX.iterator.toint() + Int64(row) * (mX.stride[0] * self.config.dtype.itemsize)
        rX = [self.blocks.registers() for _ in range(self.config.blocks_per_lane)]
        for i in cutlass.range_constexpr(self.config.blocks_per_lane):
            # Past the end the last block is loaded again: no branch between the loads.
            col = cutlass.min(first_col + i * self.config.row_warps * WARP, num_cols - 1)
            self.blocks.load(rX[i], x_row + Int64(col) * block_bytes, Int64(num_cols) * block_bytes)
        for i in cutlass.range_constexpr(self.config.blocks_per_lane):
            words = self.blocks.words(rX[i])
            for j in cutlass.range_constexpr(self.blocks.num_words):
                rWords[j, i] = words[j]

    @cute.jit
    def _store_row(
        self,
        mOut: cute.Tensor,
        mSf: cute.Tensor | None,
        row: Int32,
        first_col: Int32,
        rWords: cute.Tensor,
        global_scale: Float32,
        inside: cutlass.Boolean,
    ):
        """This lane's blocks, zero bytes unless ``inside``."""
        num_cols = Int32(mOut.shape[1]) // self.out_size
        first_block = Int64(row) * Int64(num_cols)
        scales = encode_scales(global_scale)
        for i in cutlass.range_constexpr(self.config.blocks_per_lane):
            col = first_col + i * self.config.row_warps * WARP
            words = [rWords[j, i] for j in range(self.blocks.num_words)]
            if cutlass.const_expr(self.config.values):
                out = self.blocks.round(words, scales)
            else:
                out, sf = self.blocks.quantize(words, scales)
            if col < num_cols:
                if not inside:
                    out = [Uint32(0)] * (self.out_bytes // WORD_BYTES)
                block = first_block + Int64(col)
                store_block(mOut.iterator.toint() + block * self.out_bytes, out)
                if cutlass.const_expr(not self.config.values):
                    if not inside:
                        sf = Uint32(0)
                    gSf = bytes_at(mSf.iterator.toint() + block, 1)
                    gSf[0] = Uint8(sf)

    def compile(self, options: str = "") -> Callable[..., None]:
        config, rows, cols = self.config, cute.sym_int32(), cute.sym_int32()
        block_scale = None
        if not config.values:
            block_scale = make_fake_compact_tensor(Uint8, (rows, cols), stride_order=(1, 0))
        return cute.compile(
            self,
            fake_rows(config.dtype, None if config.gather else rows),
            fake_offs() if config.ragged else None,
            fake_vector(Int32) if config.gather else None,
            fake_values(rows) if config.values else fake_codes(rows),
            block_scale,
            fake_vector(Float32),
            make_fake_stream(use_tvm_ffi_env_stream=True),
            options=f"--enable-tvm-ffi {options}",
        )


def build(config: PerTokenConfig, options: str = "") -> Callable[..., None]:
    """Compile for ``CUTE_DSL_ARCH`` or the present GPU; called with torch tensors."""
    return PerTokenKernel(config).compile(options)
