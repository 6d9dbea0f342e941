"""From accumulators of the Hopper grouped mm to rows of the output.

A warpgroup holds 64 weight rows x ``width`` tokens: of a thread's accumulators, number
4 * eight + 2 * r + c is weight row 16 * warp + lane / 4 + 8 r, token 8 * eight + 2 (lane % 4) + c.
In gated weights r = 0 is a gate row and r = 1 the up row that belongs to it.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32
from cutlass.cute import AddressSpace

from nvfp4_ops.kernels import activation
from nvfp4_ops.kernels.grouped_mm_config import GroupedMmConfig
from nvfp4_ops.kernels.launch.tensors import VECTOR_BYTES, WARP
from nvfp4_ops.kernels.limits import MAX_EXPERTS
from nvfp4_ops.kernels.memory import ptx, vector_at
from nvfp4_ops.kernels.prepack_sm90 import BLOCK_ROWS, DECODE_EXPONENT

WARPGROUP = 4 * WARP
MATRIX_ROWS = 8


class EpilogueArguments(NamedTuple):
    """What every tile shares.

    alpha: fp32, ``alpha_stride`` an expert, the second for columns from ``segment_columns`` on, or
    for the up projection. row_scale: (R,) fp32. bias: (E, N) fp32. out: (R, num_columns).
    """

    alpha: cute.Pointer
    row_scale: cute.Pointer
    bias: cute.Pointer
    out: cute.Pointer
    num_columns: Int32
    alpha_stride: Int32
    segment_columns: Int32


class TileOfExpert(NamedTuple):
    """Block of 64 weight rows, first row of the output and rows of the expert left from there."""

    expert: Int32
    block: Int32
    first_row: Int32
    num_left: Int32


def load_16_bytes(address, out):
    """From shared memory into four registers."""
    # make_ptr asserts the alignment; Pointer.align would round the address up at run time.
    aligned = cute.make_ptr(Uint32, address, AddressSpace.smem, assumed_align=VECTOR_BYTES)
    cute.autovec_copy(cute.make_tensor(aligned, cute.make_layout(4)), out)


def _float_at(base: cute.Pointer, index: Int64):
    pointer = cute.make_ptr(Float32, base.toint() + index * 4, AddressSpace.gmem, assumed_align=4)
    return cute.make_tensor(pointer, cute.make_layout(1))


def columns_of_block(config: GroupedMmConfig) -> int:
    """Output columns of 64 weight rows."""
    return BLOCK_ROWS // 2 if config.gated else BLOCK_ROWS


def _line_bytes(config: GroupedMmConfig) -> int:
    """A token's columns, and 16 bytes so that lines start in different banks."""
    return columns_of_block(config) * 2 + VECTOR_BYTES


def staged_tokens(config: GroupedMmConfig) -> int:
    """Tokens that are transposed at once: large tiles leave no room for all of theirs."""
    return config.tile_tokens if config.tile_tokens <= 144 else 80


def staging_bytes(config: GroupedMmConfig) -> int:
    """Shared memory in which a warpgroup transposes its part of the output."""
    return 0 if config.out_fp32 else staged_tokens(config) * _line_bytes(config)


class Epilogue:
    """out = act(alpha * row_scale * acc + bias), converted, transposed and stored.

    One for each width, as the width is a number of registers. ``lines`` are a warpgroup's
    ``staging_bytes``.
    """

    def __init__(self, config: GroupedMmConfig, width: int) -> None:
        self.config = config
        self.width = width
        self.columns = columns_of_block(config)
        self.line_bytes = _line_bytes(config)
        self.staged_tokens = staged_tokens(config)
        self.columns_per_warp = self.columns // 4

    @cute.jit
    def _first_column(self, tile):
        """The thread's column, that of r = 0."""
        lane, group_warp = cute.arch.lane_idx(), cute.arch.warp_idx() % 4
        return tile.block * self.columns + group_warp * self.columns_per_warp + lane // 4

    @cute.jit
    def load_scales(self, tile, arguments):
        """Alpha and bias of the thread's two weight rows."""
        config = self.config
        num_columns = arguments.num_columns
        mAlpha = cute.make_tensor(arguments.alpha, cute.make_layout(2 * MAX_EXPERTS))
        column = self._first_column(tile)
        scales, offsets = [], []
        for r in cutlass.range_constexpr(2):
            index = tile.expert * arguments.alpha_stride
            bias_column = Int64(tile.expert) * Int64(num_columns) + Int64(column)
            if cutlass.const_expr(config.gated):
                index = index + r * (arguments.alpha_stride - 1)
                # The up projection's N / 2 follow the gate's.
                bias_column = bias_column + Int64(tile.expert + r) * Int64(num_columns)
                in_range = column < num_columns
            else:
                if column + 8 * r >= arguments.segment_columns:
                    index = index + 1
                bias_column = bias_column + 8 * r
                in_range = column + 8 * r < num_columns
            scales.append(mAlpha[index] * Float32(2.0**DECODE_EXPONENT))
            offset = Float32(0.0)
            if cutlass.const_expr(config.bias):
                if in_range:
                    offset = _float_at(arguments.bias, bias_column)[0]
            offsets.append(offset)
        return scales, offsets

    @cute.jit
    def run(self, acc, scales, offsets, tile, arguments, lines, barrier):
        """``barrier``: number of a named barrier that is this warpgroup's."""
        self._apply(acc, scales, offsets, tile, arguments)
        if cutlass.const_expr(self.config.out_fp32):
            self._store_fp32(acc, tile, arguments)
        else:
            self._store_bf16(acc, lines, barrier, tile, arguments)

    @cute.jit
    def _apply(self, acc, scales, offsets, tile, arguments):
        """In place; of a gated pair the result replaces r = 0."""
        config = self.config
        lane = cute.arch.lane_idx()
        values = cute.make_tensor(acc.iterator, cute.make_layout(self.width // 2))
        for eight in cutlass.range_constexpr(self.width // 8):
            for c in cutlass.range_constexpr(2):
                factor = Float32(1.0)
                if cutlass.const_expr(config.row_scale):
                    # Tokens past the last are computed, with its scale, and not stored.
                    token = cutlass.min(eight * 8 + (lane % 4) * 2 + c, tile.num_left - 1)
                    row = Int64(tile.first_row + token)
                    factor = _float_at(arguments.row_scale, row)[0]
                scaled = []
                for r in cutlass.range_constexpr(2):
                    value = values[eight * 4 + r * 2 + c] * scales[r]
                    if cutlass.const_expr(config.row_scale):
                        value = value * factor
                    scaled.append(value + offsets[r])
                i = eight * 4 + c
                if cutlass.const_expr(config.gated):
                    values[i] = activation.apply(config.activation, config.limit, *scaled)
                else:
                    for r in cutlass.range_constexpr(2):
                        values[i + 2 * r] = activation.apply(
                            config.activation, config.limit, scaled[r], None
                        )

    @cute.jit
    def _store_fp32(self, acc, tile, arguments):
        lane = cute.arch.lane_idx()
        first_column, num_columns = self._first_column(tile), arguments.num_columns
        values = cute.make_tensor(acc.iterator, cute.make_layout(self.width // 2))
        row = Int64(tile.first_row + (lane % 4) * 2)
        element = row * Int64(num_columns) + Int64(first_column)
        # Stepped from eight to eight: 64 addresses at once would not fit beside the values.
        for eight in cutlass.range_constexpr(self.width // 8):
            for c in cutlass.range_constexpr(2):
                token = eight * 8 + (lane % 4) * 2 + c
                for r in cutlass.range_constexpr(1 if self.config.gated else 2):
                    if token < tile.num_left and first_column + 8 * r < num_columns:
                        target = element + Int64(c * num_columns) + 8 * r
                        _float_at(arguments.out, target)[0] = values[eight * 4 + r * 2 + c]
            element = element + Int64(8 * num_columns)

    def _stage_bf16(self, acc, lines, start: int, stop: int):
        """Tokens start .. stop; 8 of them x 8 columns a matrix, up to four matrices at a time."""
        lane, group_warp = cute.arch.lane_idx(), cute.arch.warp_idx() % 4
        values = cute.make_tensor(acc.iterator, cute.make_layout(self.width // 2))
        rows = 1 if self.config.gated else 2
        first = start // 8
        while first < stop // 8:
            # There are instructions for one, two and four matrices.
            eights = next(n for n in (4 // rows, 2 // rows, 1) if first + n <= stop // 8)
            packed = []
            for eight in range(first, first + eights):
                for r in range(rows):
                    i = eight * 4 + r * 2
                    high_low = values[i + 1], values[i]
                    code = "cvt.rn.bf16x2.f32 {$w0}, {$r0}, {$r1};"
                    packed.append(ptx(code, Uint32, *high_low))
            # Lane 8 m + i gives the address of line i of matrix m; lanes past the last repeat it.
            matrix = (lane // MATRIX_ROWS) % len(packed)
            token = (first + matrix // rows) * 8 + lane % MATRIX_ROWS - start
            offset = token * self.line_bytes + (matrix % rows) * VECTOR_BYTES
            address = (lines + offset + group_warp * (self.columns_per_warp * 2)).toint()
            registers = ", ".join(f"{{$r{i + 1}}}" for i in range(len(packed)))
            cute.arch.inline_ptx(
                f"stmatrix.sync.aligned.m8n8.x{len(packed)}.trans.shared.b16 [{{$r0}}], "
                f"{{{registers}}};",
                read_only_args=[address, *packed],
            )
            first += eights

    @cute.jit
    def _store_bf16(self, acc, lines, barrier, tile, arguments):
        """Through shared memory: a token's columns leave as 16-byte stores side by side."""
        tid, _, _ = cute.arch.thread_idx()
        thread, num_columns = tid % WARPGROUP, arguments.num_columns
        chunks = self.columns * 2 // VECTOR_BYTES
        tokens_at_once = WARPGROUP // chunks
        column = tile.block * self.columns + (thread % chunks) * 8
        for start in cutlass.range_constexpr(0, self.width, self.staged_tokens):
            stop = min(self.width, start + self.staged_tokens)
            self._stage_bf16(acc, lines, start, stop)
            cute.arch.barrier(barrier_id=barrier, number_of_threads=WARPGROUP)
            for first in cutlass.range_constexpr(start, stop, tokens_at_once):
                token = first + thread // chunks
                if token < tile.num_left and token < stop and column < num_columns:
                    chunk = cute.make_rmem_tensor(cute.make_layout(4), Uint32)
                    line = (token - start) * self.line_bytes
                    address = (lines + line + (thread % chunks) * VECTOR_BYTES).toint()
                    load_16_bytes(address, chunk)
                    row = Int64(tile.first_row + token)
                    address = arguments.out.toint() + (row * Int64(num_columns) + Int64(column)) * 2
                    cute.autovec_copy(chunk, vector_at(address, 4))
            # The lines that follow may not overtake these loads.
            cute.arch.barrier(barrier_id=barrier, number_of_threads=WARPGROUP)


@cute.jit
def zero_tail(
    out: cute.Pointer,
    end: Int32,
    num_rows: Int32,
    num_columns: Int32,
    out_fp32: cutlass.Constexpr[bool],
    num_threads: cutlass.Constexpr[int],
):
    """Rows past the last expert's are zero, whatever was there."""
    tid, _, _ = cute.arch.thread_idx()
    bid, _, _ = cute.arch.block_idx()
    grid, _, _ = cute.arch.grid_dim()
    columns_per_chunk = 4 if out_fp32 else 8
    chunk = Int64(end) * Int64(num_columns // columns_per_chunk)
    last = Int64(num_rows) * Int64(num_columns // columns_per_chunk)
    chunk = chunk + Int64(bid * num_threads + tid)
    zeros = cute.make_rmem_tensor(cute.make_layout(4), Uint32)
    zeros.fill(0)
    while chunk < last:
        cute.autovec_copy(zeros, vector_at(out.toint() + chunk * VECTOR_BYTES, 4))
        chunk = chunk + Int64(grid * num_threads)


class SplitReduction:
    """Sums of warpgroups that split K, added to the first one's in the order of the columns."""

    def __init__(self, config: GroupedMmConfig, width: int) -> None:
        self.config = config
        self.num_values = width // 2
        others = config.warpgroups - 1 if config.split_k else 0
        self.num_bytes = others * self.num_values * WARPGROUP * 4

    @cute.jit
    def add(self, acc, buffer):
        """Collective of all consumer warps; only the first warpgroup's ``acc`` is of use after."""
        config = self.config
        tid, _, _ = cute.arch.thread_idx()
        group, thread = tid // WARPGROUP, tid % WARPGROUP
        values = cute.make_tensor(acc.iterator, cute.make_layout(self.num_values))
        pointer = cute.make_ptr(Float32, buffer.toint(), AddressSpace.smem, assumed_align=16)
        shape = (WARPGROUP, self.num_values, config.warpgroups - 1)
        sSums = cute.make_tensor(pointer, cute.make_layout(shape))
        num_consumers = WARPGROUP * config.warpgroups
        if group > 0:
            for i in cutlass.range_constexpr(self.num_values):
                sSums[thread, i, group - 1] = values[i]
        cute.arch.barrier(barrier_id=1 + config.warpgroups, number_of_threads=num_consumers)
        if group == 0:
            for other in cutlass.range_constexpr(config.warpgroups - 1):
                for i in cutlass.range_constexpr(self.num_values):
                    values[i] = values[i] + sSums[thread, i, other]
        cute.arch.barrier(barrier_id=1 + config.warpgroups, number_of_threads=num_consumers)
