"""Grouped mm of Hopper: prepacked NVFP4 weights times bf16 rows, decoded in registers.

The weight is wgmma's register (A) operand, tokens are its N dimension: D^T = W X^T. See
prepack_sm90 for the layout that makes decoding four integer operations and four multiplications a
word of eight codes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cuda.bindings.driver as cuda_driver
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32
from cutlass.cute import AddressSpace
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

from nvfp4_ops.kernels.limits import MAX_EXPERTS
from nvfp4_ops.kernels.prepack_sm90 import (
    BLOCK_BYTES,
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    CODE_BYTES,
    DECODE_EXPONENT,
)

WARP = 32
WARPGROUP = 128
# A staged output line: 64 rows of bf16, and 16 bytes so that lines start in different banks.
LINE_BYTES = BLOCK_ROWS * 2 + 16
EVICT_FIRST = 0x12F0000000000000


@dataclass(frozen=True)
class GroupedMmConfig:
    """Static configuration of the kernel.

    tile_tokens: token columns of a tile, 8 to 128, a multiple of 8.
    warpgroups: consumer warpgroups; each owns 64 weight rows of a tile.
    stages: depth of the shared-memory pipeline; a stage is 128 columns.
    blocks_per_sm: persistent CTAs on each multiprocessor.
    out_fp32: write fp32 rather than bf16.
    row_scale, bias: whether the epilogue has them.
    """

    tile_tokens: int
    warpgroups: int
    stages: int
    blocks_per_sm: int
    out_fp32: bool = False
    row_scale: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        if self.tile_tokens not in (8, 16, 32, 64, 128):
            raise ValueError(f"tile_tokens: must be 8, 16, 32, 64 or 128, got {self.tile_tokens}")
        if self.warpgroups not in (1, 2, 4):
            raise ValueError(f"warpgroups: must be 1, 2 or 4, got {self.warpgroups}")


# Rows per touched expert up to which a tile is the best (H200, 64 experts of 2048 x 2048: 3.52,
# 3.55, 3.10, 2.65 TB/s at 1, 16, 32, 64 rows, 642 TFLOP/s at 256).
_LADDER = (
    (8, dict(tile_tokens=8, warpgroups=2, stages=8, blocks_per_sm=2)),
    (16, dict(tile_tokens=16, warpgroups=2, stages=6, blocks_per_sm=2)),
    (32, dict(tile_tokens=32, warpgroups=2, stages=5, blocks_per_sm=2)),
    (64, dict(tile_tokens=64, warpgroups=2, stages=3, blocks_per_sm=2)),
    (1 << 30, dict(tile_tokens=128, warpgroups=2, stages=4, blocks_per_sm=1)),
)


def choose_config(
    num_rows: int, num_experts: int, *, out_fp32: bool, row_scale: bool, bias: bool
) -> GroupedMmConfig:
    """Configuration for static sizes: the tile that fits the rows of an evenly loaded expert."""
    rows_per_expert = -(-num_rows // max(1, min(num_experts, num_rows)))
    tile = next(tile for limit, tile in _LADDER if rows_per_expert <= limit)
    if tile["tile_tokens"] == 64 and (out_fp32 or row_scale or bias):
        # Two CTAs leave 85 registers a thread, and this epilogue spills.
        tile = tile | dict(stages=6, blocks_per_sm=1)
    return GroupedMmConfig(**tile, out_fp32=out_fp32, row_scale=row_scale, bias=bias)


def _ptx(code: str, *args):
    return cute.arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=list(args))


def _lop3(a, b, c, table: int):
    return _ptx(f"lop3.b32 {{$w0}}, {{$r0}}, {{$r1}}, {{$r2}}, {table};", a, b, c)


def _register(value: int):
    """A constant that stays in a register, so that one lop3 can take two of them."""
    return _ptx(f"mov.b32 {{$w0}}, {value};")


def _multiply_by_half(a, scales, half: int):
    """bf16x2 a times one half of ``scales``, splatted; ptxas folds the splat into HMUL2."""
    part = "lh"[half]
    return _ptx(
        "{.reg .b16 l,h; .reg .b32 t; mov.b32 {l,h}, {$r1}; "
        f"mov.b32 t, {{{part},{part}}}; "
        "mul.rn.bf16x2 {$w0}, {$r0}, t;}",
        a,
        scales,
    )


def _decode_word(word, scales, out, base: int):
    """Eight codes (four of row g, four of row g + 8) to four bf16x2 operand registers."""
    mask = Uint32(0x81C081C0)
    rotated = _ptx("shf.l.wrap.b32 {$w0}, {$r0}, {$r0}, 28;", word)
    merged = ((word << Uint32(2)) & Uint32(0x80C080C0)) | ((word >> Uint32(6)) & Uint32(0x01000100))
    out[base + 0] = _multiply_by_half(word & mask, scales, 0)
    out[base + 1] = _multiply_by_half((word << Uint32(6)) & mask, scales, 1)
    out[base + 2] = _multiply_by_half(rotated & mask, scales, 0)
    out[base + 3] = _multiply_by_half(merged, scales, 1)


def _load_16_bytes(pointer, out):
    # make_ptr asserts the alignment; Pointer.align would round the address up at run time.
    aligned = cute.make_ptr(Uint32, pointer.toint(), AddressSpace.smem, assumed_align=16)
    cute.autovec_copy(cute.make_tensor(aligned, cute.make_layout(4)), out)


class GroupedMmSm90:
    """out[r, n] = alpha[e, segment(n)] * row_scale[r] * sum_k x[r, k] W[e, n, k] + bias[e, n].

    Persistent CTAs walk the tiles (64 * warpgroups weight rows x tile_tokens rows of one expert);
    the tile list comes from ``offs`` by a scan in shared memory, so that the host never waits.

    Warps 0 .. 4 W - 1: consumers. A warpgroup decodes its 64 x 128 weights of a stage and
    multiplies by wgmma, 64 columns at a time, the other 64 being decoded meanwhile.
    Warp 4 W: producer. One bulk copy a block of weights, two TMA boxes of x.
    full[stage]: 1 arrival (producer) + bytes. empty[stage]: 4 W arrivals (one a consumer warp).

    Limits: E <= 1024; x rows are 16-byte aligned.
    """

    def __init__(self, config: GroupedMmConfig) -> None:
        self.config = config
        self.tile_rows = BLOCK_ROWS * config.warpgroups
        self.weight_bytes = BLOCK_BYTES * config.warpgroups
        self.x_bytes = config.tile_tokens * BLOCK_COLUMNS * 2
        self.num_threads = WARPGROUP * config.warpgroups + WARP

    @cute.jit
    def __call__(
        self,
        weight: cute.Tensor,
        x: cute.Tensor,
        offs: cute.Tensor,
        alpha: cute.Tensor,
        row_scale: cute.Tensor,
        bias: cute.Tensor,
        out: cute.Tensor,
        alpha_stride: Int32,
        segment_rows: Int32,
        grid: Int32,
        stream: cuda_driver.CUstream,
    ):
        config = self.config
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, BFloat16)
        x_layout = cute.tile_to_shape(
            atom, (config.tile_tokens, 64, 2 * config.stages), order=(0, 1, 2)
        )
        tma_x, tma_tensor_x = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(),
            x,
            cute.select(x_layout, mode=[0, 1]),
            (config.tile_tokens, 64),
        )
        op = warpgroup.MmaF16BF16Op(
            BFloat16,
            Float32,
            (BLOCK_ROWS, config.tile_tokens, 16),
            warpgroup.OperandSource.RMEM,
            OperandMajorMode.K,
            OperandMajorMode.K,
        )
        num_experts, row_blocks, column_blocks, _ = weight.shape
        self.kernel(
            cute.make_tiled_mma(op, (1, 1, 1)),
            tma_x,
            tma_tensor_x,
            x_layout,
            weight.iterator,
            offs.iterator,
            alpha.iterator,
            row_scale.iterator,
            bias.iterator,
            out.iterator,
            Int32(x.shape[0]),
            Int32(out.shape[1]),
            Int32(num_experts),
            Int32(row_blocks),
            Int32(column_blocks),
            alpha_stride,
            segment_rows,
        ).launch(
            grid=[grid, 1, 1],
            block=[self.num_threads, 1, 1],
            min_blocks_per_mp=config.blocks_per_sm,
            # Without it the compiler asks a driver for the limit, and there may be none.
            preferred_smem_carveout=100,
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        tiled_mma: cute.TiledMma,
        tma_x: cute.CopyAtom,
        mX: cute.Tensor,
        x_layout: cute.ComposedLayout,
        weight: cute.Pointer,
        offs: cute.Pointer,
        alpha: cute.Pointer,
        row_scale: cute.Pointer,
        bias: cute.Pointer,
        out: cute.Pointer,
        num_rows: Int32,
        num_columns: Int32,
        num_experts: Int32,
        row_blocks: Int32,
        column_blocks: Int32,
        alpha_stride: Int32,
        segment_rows: Int32,
    ):
        config = self.config
        stages = config.stages
        tid, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        smem = cutlass.memory.SmemAllocator()
        sX = smem.allocate_tensor(
            BFloat16, x_layout.outer, byte_alignment=1024, swizzle=x_layout.inner
        )
        sW = smem.allocate_array(Uint8, self.weight_bytes * stages, byte_alignment=128)
        out_bytes = config.warpgroups * config.tile_tokens * LINE_BYTES
        sOut = smem.allocate_array(Uint8, out_bytes, byte_alignment=128)
        full = smem.allocate_array(Int64, stages, byte_alignment=8)
        empty = smem.allocate_array(Int64, stages, byte_alignment=8)
        sEnd = smem.allocate_tensor(Int32, cute.make_layout(MAX_EXPERTS), byte_alignment=16)

        if warp == 0:
            cpasync.prefetch_descriptor(tma_x)
        if tid == 0:
            for stage in cutlass.range_constexpr(stages):
                cute.arch.mbarrier_init(full + stage, 1)
                cute.arch.mbarrier_init(empty + stage, 4 * config.warpgroups)
            cute.arch.mbarrier_init_fence()
        mOffs = cute.make_tensor(offs, cute.make_layout(MAX_EXPERTS))
        row_tiles = row_blocks // config.warpgroups
        expert_groups = (num_experts + WARP - 1) // WARP
        if warp == 0:
            self._scan_tiles(mOffs, sEnd, num_experts, expert_groups, row_tiles)
        cute.arch.sync_threads()
        num_tiles = sEnd[expert_groups * WARP - 1]

        if warp == 4 * config.warpgroups:
            self._produce(
                tma_x, mX, sX, sW, full, empty, weight, mOffs, sEnd,
                num_tiles, expert_groups, row_blocks, column_blocks,
            )  # fmt: skip
        else:
            self._consume(
                tiled_mma, sX, sW, sOut, full, empty, mOffs, sEnd, alpha, row_scale, bias, out,
                num_tiles, expert_groups, row_tiles, column_blocks, num_columns,
                alpha_stride, segment_rows,
            )  # fmt: skip
        self._zero_tail(out, mOffs[num_experts - 1], num_rows, num_columns)

    @cute.jit
    def _scan_tiles(self, mOffs, sEnd, num_experts, expert_groups, row_tiles):
        """sEnd[e] = tiles of experts 0 .. e; one warp, 32 experts a step."""
        lane = cute.arch.lane_idx()
        before = Int32(0)
        for group in cutlass.range(expert_groups, unroll=1):
            expert = group * WARP + lane
            count = Int32(0)
            if expert < num_experts:
                start = Int32(0)
                if expert > 0:
                    start = mOffs[expert - 1]
                tokens = mOffs[expert] - start
                token_tiles = (tokens + (self.config.tile_tokens - 1)) // self.config.tile_tokens
                count = token_tiles * row_tiles
            for step in cutlass.range_constexpr(5):
                below = cute.arch.shuffle_sync_up(count, 1 << step, mask_and_clamp=0)
                if lane >= (1 << step):
                    count = count + below
            count = count + before
            sEnd[expert] = count
            before = cute.arch.shuffle_sync(count, WARP - 1)

    @cute.jit
    def _locate(self, tile, mOffs, sEnd, expert_groups):
        """Expert of a tile, the tile's index inside it, its first row and its number of rows."""
        lane = cute.arch.lane_idx()
        expert = Int32(0)
        for group in cutlass.range(expert_groups, unroll=1):
            passed = cute.arch.vote_ballot_sync(sEnd[group * WARP + lane] <= tile)
            expert = expert + cute.arch.popc(passed)
        first_tile, first_row = Int32(0), Int32(0)
        if expert > 0:
            first_tile = sEnd[expert - 1]
            first_row = mOffs[expert - 1]
        return expert, tile - first_tile, first_row, mOffs[expert] - first_row

    @cute.jit
    def _produce(
        self, tma_x, mX, sX, sW, full, empty, weight, mOffs, sEnd,
        num_tiles, expert_groups, row_blocks, column_blocks,
    ):  # fmt: skip
        config = self.config
        tokens = config.tile_tokens
        tile, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        tile = Int32(tile)
        stage, phase = Int32(0), Int32(1)
        while tile < num_tiles:
            expert, rest, first_row, num_tokens = self._locate(tile, mOffs, sEnd, expert_groups)
            token_tiles = (num_tokens + (tokens - 1)) // tokens
            row_tile = rest // token_tiles
            token_tile = rest - row_tile * token_tiles
            gX = cute.local_tile(
                cute.domain_offset((first_row + token_tile * tokens, 0), mX),
                (tokens, 64),
                (0, None),
            )
            tXsX, tXgX = cpasync.tma_partition(
                tma_x,
                0,
                cute.make_layout(1),
                cute.group_modes(sX, 0, 2),
                cute.group_modes(gX, 0, 2),
            )
            block_row = Int64(expert) * Int64(row_blocks) + Int64(row_tile * config.warpgroups)
            block_stride = Int64(column_blocks) * BLOCK_BYTES
            base = weight.toint() + block_row * block_stride
            for column in cutlass.range(column_blocks, unroll=1):
                cute.arch.mbarrier_wait(empty + stage, phase)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(
                        full + stage, self.weight_bytes + self.x_bytes
                    )
                    for block in cutlass.range_constexpr(config.warpgroups):
                        cute.arch.inline_ptx(
                            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                            ".L2::cache_hint [{$r0}], [{$r1}], {$r2}, [{$r3}], {$r4};",
                            read_only_args=[
                                (sW + stage * self.weight_bytes + block * BLOCK_BYTES).toint(),
                                base + block * block_stride + Int64(column) * BLOCK_BYTES,
                                Int32(BLOCK_BYTES),
                                (full + stage).toint(),
                                Int64(EVICT_FIRST),
                            ],
                        )
                for half in cutlass.range_constexpr(2):
                    cute.copy(
                        tma_x,
                        tXgX[None, 2 * column + half],
                        tXsX[None, 2 * stage + half],
                        tma_bar_ptr=full + stage,
                    )
                stage = stage + 1
                if stage == config.stages:
                    stage = Int32(0)
                    phase = phase ^ 1
            tile = tile + grid

    @cute.jit
    def _consume(
        self, tiled_mma, sX, sW, sOut, full, empty, mOffs, sEnd, alpha, row_scale, bias, out,
        num_tiles, expert_groups, row_tiles, column_blocks, num_columns,
        alpha_stride, segment_rows,
    ):  # fmt: skip
        config = self.config
        tokens = config.tile_tokens
        tid, _, _ = cute.arch.thread_idx()
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        group, group_warp, thread = warp // 4, warp % 4, tid % WARPGROUP
        acc = cute.make_rmem_tensor(tiled_mma.partition_shape_C((BLOCK_ROWS, tokens)), Float32)
        fragments, registers, words = [], [], []
        for _ in cutlass.range_constexpr(2):
            fragment = cute.make_rmem_tensor(
                tiled_mma.partition_shape_A((BLOCK_ROWS, 64)), BFloat16
            )
            fragments.append(fragment)
            raw = cute.recast_tensor(fragment, Uint32).iterator
            registers.append(cute.make_tensor(raw, cute.make_layout(16)))
            words.append(cute.make_rmem_tensor(cute.make_layout(4), Uint32))
        scale_words = cute.make_rmem_tensor(cute.make_layout(4), Uint32)
        fX = tiled_mma.make_fragment_B(tiled_mma.get_slice(thread).partition_B(sX))
        exponent, byte_mask = _register(0x70007000), _register(0x0FF00FF0)
        tiled_mma.set(warpgroup.Field.ACCUMULATE, True)
        tile, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        tile = Int32(tile)
        stage, phase = Int32(0), Int32(0)
        while tile < num_tiles:
            expert, rest, first_row, num_tokens = self._locate(tile, mOffs, sEnd, expert_groups)
            token_tiles = (num_tokens + (tokens - 1)) // tokens
            row_tile = rest // token_tiles
            token_tile = rest - row_tile * token_tiles
            acc.fill(0.0)
            previous = Int32(0)
            for column in cutlass.range(column_blocks, unroll=1):
                cute.arch.mbarrier_wait(full + stage, phase)
                block = sW + stage * self.weight_bytes + group * BLOCK_BYTES
                _load_16_bytes(block + thread * 16, words[0])
                _load_16_bytes(block + CODE_BYTES + (group_warp * 8 + lane // 4) * 16, scale_words)
                _load_16_bytes(block + CODE_BYTES // 2 + thread * 16, words[1])
                for half in cutlass.range_constexpr(2):
                    for j in cutlass.range_constexpr(4):
                        s = scale_words[2 * half + j // 2]
                        shifted = (s << Uint32(4)) if j % 2 == 0 else (s >> Uint32(4))
                        scales = _lop3(shifted, byte_mask, exponent, 0xEA)
                        _decode_word(words[half][j], scales, registers[half], 4 * j)
                    warpgroup.fence()
                    for j in cutlass.range_constexpr(4):
                        cute.gemm(
                            tiled_mma,
                            acc,
                            fragments[half][None, None, j],
                            fX[None, None, j, 2 * stage + half],
                            acc,
                        )
                    warpgroup.commit_group()
                    # All but this half are done: its predecessor's registers are free, and after
                    # the first half so is the stage before.
                    warpgroup.wait_group(1)
                    if cutlass.const_expr(half == 0):
                        if column > 0:
                            if lane == 0:
                                cute.arch.mbarrier_arrive(empty + previous)
                previous = stage
                stage = stage + 1
                if stage == config.stages:
                    stage = Int32(0)
                    phase = phase ^ 1
            warpgroup.wait_group(0)
            if lane == 0:
                cute.arch.mbarrier_arrive(empty + previous)
            block_row = row_tile * self.tile_rows + group * BLOCK_ROWS
            self._scale(
                acc, alpha, row_scale, bias, expert, block_row + group_warp * 16 + lane // 4,
                first_row + token_tile * tokens, num_tokens - token_tile * tokens,
                num_columns, alpha_stride, segment_rows,
            )  # fmt: skip
            if cutlass.const_expr(config.out_fp32):
                self._store_fp32(
                    acc, out, block_row + group_warp * 16 + lane // 4,
                    first_row + token_tile * tokens, num_tokens - token_tile * tokens, num_columns,
                )  # fmt: skip
            else:
                self._store_bf16(
                    acc, sOut + group * (tokens * LINE_BYTES), out, group, block_row,
                    first_row + token_tile * tokens, num_tokens - token_tile * tokens, num_columns,
                )  # fmt: skip
            tile = tile + grid

    @cute.jit
    def _scale(
        self, acc, alpha, row_scale, bias, expert, row, first_token, num_left,
        num_columns, alpha_stride, segment_rows,
    ):  # fmt: skip
        """acc = acc * alpha * row_scale + bias, in place.

        A thread holds rows ``row`` and ``row + 8`` of the weight, and of each eight tokens the two
        from (lane % 4) * 2.
        """
        config = self.config
        lane = cute.arch.lane_idx()
        mAlpha = cute.make_tensor(alpha, cute.make_layout(2 * MAX_EXPERTS))
        values = cute.make_tensor(acc.iterator, cute.make_layout(config.tile_tokens // 2))
        for r in cutlass.range_constexpr(2):
            index = expert * alpha_stride
            if row + 8 * r >= segment_rows:
                index = index + 1
            scale = mAlpha[index] * Float32(2.0**DECODE_EXPONENT)
            offset = Float32(0.0)
            if cutlass.const_expr(config.bias):
                if row + 8 * r < num_columns:
                    address = (
                        bias.toint() + (Int64(expert) * Int64(num_columns) + Int64(row + 8 * r)) * 4
                    )
                    pointer = cute.make_ptr(Float32, address, AddressSpace.gmem, assumed_align=4)
                    offset = cute.make_tensor(pointer, cute.make_layout(1))[0]
            for eight in cutlass.range_constexpr(config.tile_tokens // 8):
                for c in cutlass.range_constexpr(2):
                    i = eight * 4 + r * 2 + c
                    value = values[i] * scale
                    if cutlass.const_expr(config.row_scale):
                        token = eight * 8 + (lane % 4) * 2 + c
                        factor = Float32(1.0)
                        if token < num_left:
                            address = row_scale.toint() + Int64(first_token + token) * 4
                            pointer = cute.make_ptr(
                                Float32, address, AddressSpace.gmem, assumed_align=4
                            )
                            factor = cute.make_tensor(pointer, cute.make_layout(1))[0]
                        value = value * factor
                    values[i] = value + offset

    @cute.jit
    def _store_fp32(self, acc, out, row, first_token, num_left, num_columns):
        config = self.config
        lane = cute.arch.lane_idx()
        values = cute.make_tensor(acc.iterator, cute.make_layout(config.tile_tokens // 2))
        for eight in cutlass.range_constexpr(config.tile_tokens // 8):
            for c in cutlass.range_constexpr(2):
                token = eight * 8 + (lane % 4) * 2 + c
                for r in cutlass.range_constexpr(2):
                    if token < num_left and row + 8 * r < num_columns:
                        element = Int64(first_token + token) * Int64(num_columns) + Int64(
                            row + 8 * r
                        )
                        pointer = cute.make_ptr(
                            Float32, out.toint() + element * 4, AddressSpace.gmem, assumed_align=4
                        )
                        cute.make_tensor(pointer, cute.make_layout(1))[0] = values[
                            eight * 4 + r * 2 + c
                        ]

    @cute.jit
    def _store_bf16(self, acc, lines, out, group, block_row, first_token, num_left, num_columns):
        """Through shared memory, transposed: a token's 64 columns leave as eight 16-byte stores."""
        tokens = self.config.tile_tokens
        tid, _, _ = cute.arch.thread_idx()
        lane = cute.arch.lane_idx()
        thread, group_warp = tid % WARPGROUP, (tid % WARPGROUP) // WARP
        values = cute.make_tensor(acc.iterator, cute.make_layout(tokens // 2))
        eights = 2 if tokens >= 16 else 1
        for pair in cutlass.range_constexpr((tokens + 15) // 16):
            packed = []
            for eight in cutlass.range_constexpr(eights):
                for r in cutlass.range_constexpr(2):
                    i = (pair * 2 + eight) * 4 + r * 2
                    packed.append(
                        _ptx("cvt.rn.bf16x2.f32 {$w0}, {$r0}, {$r1};", values[i + 1], values[i])
                    )
            token = pair * 16 + (lane // 16) * 8 + lane % 8
            if cutlass.const_expr(eights == 1):
                token = lane % 8
            line = (lines + token * LINE_BYTES + ((lane // 8) % 2) * 16 + group_warp * 32).toint()
            if cutlass.const_expr(eights == 2):
                cute.arch.inline_ptx(
                    "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [{$r0}], "
                    "{{$r1}, {$r2}, {$r3}, {$r4}};",
                    read_only_args=[line, *packed],
                )
            else:
                cute.arch.inline_ptx(
                    "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [{$r0}], {{$r1}, {$r2}};",
                    read_only_args=[line, *packed],
                )
        cute.arch.barrier(barrier_id=1 + group, number_of_threads=WARPGROUP)
        column = block_row + (thread % 8) * 8
        for part in cutlass.range_constexpr((tokens + 15) // 16):
            token = part * 16 + thread // 8
            if token < num_left and token < tokens and column < num_columns:
                chunk = cute.make_rmem_tensor(cute.make_layout(4), Uint32)
                _load_16_bytes(lines + token * LINE_BYTES + (thread % 8) * 16, chunk)
                element = Int64(first_token + token) * Int64(num_columns) + Int64(column)
                pointer = cute.make_ptr(
                    Uint32, out.toint() + element * 2, AddressSpace.gmem, assumed_align=16
                )
                cute.autovec_copy(chunk, cute.make_tensor(pointer, cute.make_layout(4)))
        cute.arch.barrier(barrier_id=1 + group, number_of_threads=WARPGROUP)

    @cute.jit
    def _zero_tail(self, out, end, num_rows, num_columns):
        """Rows past the last expert's are zero, whatever was there."""
        tid, _, _ = cute.arch.thread_idx()
        bid, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        columns_per_chunk = 4 if self.config.out_fp32 else 8
        chunk = Int64(end) * Int64(num_columns // columns_per_chunk)
        last = Int64(num_rows) * Int64(num_columns // columns_per_chunk)
        chunk = chunk + Int64(bid * self.num_threads + tid)
        zeros = cute.make_rmem_tensor(cute.make_layout(4), Uint32)
        for i in cutlass.range_constexpr(4):
            zeros[i] = Uint32(0)
        while chunk < last:
            pointer = cute.make_ptr(
                Uint32, out.toint() + chunk * 16, AddressSpace.gmem, assumed_align=16
            )
            cute.autovec_copy(zeros, cute.make_tensor(pointer, cute.make_layout(4)))
            chunk = chunk + Int64(grid * self.num_threads)


def build(config: GroupedMmConfig, options: str = "") -> Callable[..., None]:
    """Compile for torch tensors and the current stream; needs no GPU."""
    from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

    size = cute.sym_int32
    experts, row_blocks, column_blocks, rows = size(), size(), size(), size()
    columns, k = size(divisibility=16), size(divisibility=16)
    out_type = Float32 if config.out_fp32 else BFloat16
    return cute.compile(
        GroupedMmSm90(config),
        make_fake_compact_tensor(
            Uint8,
            (experts, row_blocks, column_blocks, BLOCK_BYTES),
            stride_order=(3, 2, 1, 0),
            assumed_align=128,
        ),
        make_fake_tensor(BFloat16, (rows, k), (k, 1), assumed_align=16),
        make_fake_compact_tensor(Int32, (experts,)),
        make_fake_compact_tensor(Float32, (size(),)),
        make_fake_compact_tensor(Float32, (size(),)),
        make_fake_compact_tensor(Float32, (size(),)),
        make_fake_tensor(out_type, (rows, columns), (columns, 1), assumed_align=16),
        Int32(1),
        Int32(1),
        Int32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi --gpu-arch sm_90a {options}",
    )
