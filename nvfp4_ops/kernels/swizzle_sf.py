"""Block scales to and from the 128x4 layout of tensor cores.

Portable CuTe DSL. Not for computing scales: ``quantize_rows`` writes this layout itself.
"""

from collections.abc import Callable

import cuda.bindings.driver as cuda_driver
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8, Uint32
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from nvfp4_ops import format as nvfp4
from nvfp4_ops.kernels.launch.swizzle_sf import LANES_ACROSS, SwizzleConfig
from nvfp4_ops.kernels.launch.tensors import ROW_GROUPS, VECTOR_BYTES, WARP, WORD_BYTES
from nvfp4_ops.kernels.memory import (
    bytes_at,
    fake_offs,
    fake_swizzled,
    follow_previous_kernel,
    vector_at,
)
from nvfp4_ops.kernels.ragged import locate_ragged_tile, locate_tile

COL_TILES_PER_LANE = VECTOR_BYTES // nvfp4.SWIZZLE_TILE_COLS
LINES_PER_WARP = WARP // LANES_ACROSS
WARPS_PER_TILE = nvfp4.SWIZZLE_LINES // LINES_PER_WARP


class SwizzleKernel:
    """swizzled[tile_row(r), c] = linear[r, c], zero elsewhere; or the inverse.

    Four warps each move one row tile x 16 column tiles, a lane one line of four of them: it reads
    up to 16 bytes of each of its four rows and writes four times 16 bytes (or the other way round).
    A CTA has up to four such groups side by side (``choose_threads``). Pads are zeroed by the same
    stores. Unswizzling has further CTAs for the rows of no expert. No limits on sizes but
    ``MAX_EXPERTS`` where ragged.
    """

    def __init__(self, config: SwizzleConfig) -> None:
        warps = config.threads // WARP
        if config.threads % (WARPS_PER_TILE * WARP) or not 0 < warps <= WARP:
            raise ValueError(f"threads: must be a multiple of 128, to 1024, got {config.threads}")
        if config.direction not in ("swizzle", "unswizzle") or config.row_align not in (1, 4, 16):
            raise ValueError(f"not a swizzle config: {config}")
        self.config = config
        self.lanes_across = warps // WARPS_PER_TILE * LANES_ACROSS

    @cute.jit
    def __call__(
        self,
        mLinear: cute.Tensor,
        mSwizzled: cute.Tensor,
        mOffs: cute.Tensor | None,
        rows_per_expert: Int32,
        stream: cuda_driver.CUstream,
    ):
        row_tiles, col_tiles, _ = mSwizzled.shape
        col_tiles_per_cta = self.lanes_across * COL_TILES_PER_LANE
        grid_rows = Int32(row_tiles)
        if cutlass.const_expr(self.config.ragged and self.config.direction == "unswizzle"):
            num_rows = Int32(mLinear.shape[0])
            grid_rows = grid_rows + cute.ceil_div(num_rows, nvfp4.SWIZZLE_TILE_ROWS)
        self.kernel(mLinear, mSwizzled, mOffs, rows_per_expert).launch(
            grid=[grid_rows, cute.ceil_div(Int32(col_tiles), col_tiles_per_cta), 1],
            block=[self.config.threads, 1, 1],
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        mLinear: cute.Tensor,
        mSwizzled: cute.Tensor,
        mOffs: cute.Tensor | None,
        rows_per_expert: Int32,
    ):
        config = self.config
        tile, cta_y, _ = cute.arch.block_idx()
        lane, warp = cute.arch.lane_idx(), cute.arch.make_warp_uniform(cute.arch.warp_idx())
        line = warp % WARPS_PER_TILE * LINES_PER_WARP + lane // LANES_ACROSS
        across = warp // WARPS_PER_TILE * LANES_ACROSS + lane % LANES_ACROSS
        num_rows, num_cols = Int32(mLinear.shape[0]), Int32(mLinear.shape[1])
        row_tiles, col_tiles = Int32(mSwizzled.shape[0]), Int32(mSwizzled.shape[1])
        first_col_tile = (cta_y * self.lanes_across + across) * COL_TILES_PER_LANE
        # False in the CTAs that zero the rows of no expert.
        in_tiles = tile < row_tiles
        follow_previous_kernel()
        if cutlass.const_expr(config.ragged):
            num_experts = Int32(mOffs.shape[0])
            _, first_row, num_valid = locate_ragged_tile(mOffs, num_experts, tile)
            if not in_tiles:
                num_dropped_before = (tile - row_tiles) * nvfp4.SWIZZLE_TILE_ROWS
                first_row = Int32(mOffs[num_experts - 1]) + num_dropped_before
                num_valid = num_rows - first_row
        else:
            _, first_row, num_valid = locate_tile(rows_per_expert, tile)

        # rLines[g, j]: word of row group g and column tile first_col_tile + j.
        rLines = cute.make_rmem_tensor(cute.make_layout((ROW_GROUPS, COL_TILES_PER_LANE)), Uint32)
        rLines.fill(0)
        tile_base = mSwizzled.iterator.toint() + (
            (Int64(tile) * Int64(col_tiles) + Int64(first_col_tile)) * nvfp4.SWIZZLE_TILE_BYTES
            + Int64(line) * nvfp4.SWIZZLE_LINE_BYTES
        )
        row_base = (
            mLinear.iterator.toint()
            + Int64(first_row + line) * Int64(num_cols)
            + Int64(first_col_tile) * nvfp4.SWIZZLE_TILE_COLS
        )
        if cutlass.const_expr(config.direction == "swizzle"):
            self._move_rows(rLines, row_base, line, num_valid, first_col_tile, num_cols, load=True)
            self._move_tiles(rLines, tile_base, first_col_tile, col_tiles, load=False)
        else:
            if in_tiles:
                self._move_tiles(rLines, tile_base, first_col_tile, col_tiles, load=True)
            self._move_rows(rLines, row_base, line, num_valid, first_col_tile, num_cols, load=False)

    @cute.jit
    def _move_tiles(
        self,
        rLines: cute.Tensor,
        base: Int64,
        first_col_tile: Int32,
        col_tiles: Int32,
        load: cutlass.Constexpr[bool],
    ):
        """One line of 16 bytes of each column tile."""
        for j in cutlass.range_constexpr(COL_TILES_PER_LANE):
            if first_col_tile + j < col_tiles:
                gLine = vector_at(base + j * nvfp4.SWIZZLE_TILE_BYTES, ROW_GROUPS)
                rLine = rLines[None, j]
                if cutlass.const_expr(load):
                    cute.autovec_copy(gLine, rLine)
                else:
                    cute.autovec_copy(rLine, gLine)

    @cute.jit
    def _move_rows(
        self,
        rLines: cute.Tensor,
        base: Int64,
        line: Int32,
        num_valid: Int32,
        first_col_tile: Int32,
        num_cols: Int32,
        load: cutlass.Constexpr[bool],
    ):
        """Up to 16 bytes of each of the four rows line, line + 32, line + 64, line + 96."""
        width = self.config.row_align
        first_col = first_col_tile * nvfp4.SWIZZLE_TILE_COLS
        for group in cutlass.range_constexpr(ROW_GROUPS):
            address = base + Int64(group * nvfp4.SWIZZLE_LINES) * Int64(num_cols)
            if line + group * nvfp4.SWIZZLE_LINES < num_valid:
                if cutlass.const_expr(width == VECTOR_BYTES):
                    rRow = cute.make_rmem_tensor(cute.make_layout(COL_TILES_PER_LANE), Uint32)
                    if first_col < num_cols:
                        gRow = vector_at(address, COL_TILES_PER_LANE)
                        if cutlass.const_expr(load):
                            cute.autovec_copy(gRow, rRow)
                            for j in cutlass.range_constexpr(COL_TILES_PER_LANE):
                                rLines[group, j] = rRow[j]
                        else:
                            for j in cutlass.range_constexpr(COL_TILES_PER_LANE):
                                rRow[j] = rLines[group, j]
                            cute.autovec_copy(rRow, gRow)
                else:
                    for j in cutlass.range_constexpr(COL_TILES_PER_LANE):
                        col = first_col + j * WORD_BYTES
                        if cutlass.const_expr(width == WORD_BYTES):
                            if col < num_cols:
                                gWord = vector_at(address + j * WORD_BYTES, 1, WORD_BYTES)
                                if cutlass.const_expr(load):
                                    rLines[group, j] = Uint32(gWord[0])
                                else:
                                    gWord[0] = rLines[group, j]
                        else:
                            gBytes = bytes_at(address + j * WORD_BYTES, WORD_BYTES)
                            for byte in cutlass.range_constexpr(WORD_BYTES):
                                if col + byte < num_cols:
                                    if cutlass.const_expr(load):
                                        part = Uint32(Uint8(gBytes[byte])) << (8 * byte)
                                        rLines[group, j] = rLines[group, j] | part
                                    else:
                                        gBytes[byte] = Uint8(rLines[group, j] >> (8 * byte))

    def compile(self, options: str = "") -> Callable[..., None]:
        rows, cols = cute.sym_int32(), cute.sym_int32(divisibility=self.config.row_align)
        row_tiles, col_tiles = cute.sym_int32(), cute.sym_int32()
        return cute.compile(
            self,
            make_fake_compact_tensor(
                Uint8, (rows, cols), stride_order=(1, 0), assumed_align=self.config.row_align
            ),
            fake_swizzled(row_tiles, col_tiles),
            fake_offs() if self.config.ragged else None,
            Int32(1),
            make_fake_stream(use_tvm_ffi_env_stream=True),
            options=f"--enable-tvm-ffi {options}",
        )


def build(config: SwizzleConfig, options: str = "") -> Callable[..., None]:
    """Compile for ``CUTE_DSL_ARCH`` or the present GPU; called with torch tensors."""
    return SwizzleKernel(config).compile(options)
