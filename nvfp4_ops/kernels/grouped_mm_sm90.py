"""Grouped mm of Hopper: prepacked NVFP4 weights times bf16 rows, decoded in registers.

The weight is wgmma's register (A) operand, tokens are its N dimension: D^T = W X^T. See
prepack_sm90 for the layout that makes decoding eight integer operations and four multiplications a
word of eight codes, and grouped_mm_mainloop_sm90 for where that happens.
"""

from collections.abc import Callable
from typing import NamedTuple

import cuda.bindings.driver as cuda_driver
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint8
from cutlass.cute.nvgpu import cpasync

from nvfp4_ops.kernels.grouped_mm_config import GroupedMmConfig
from nvfp4_ops.kernels.grouped_mm_epilogue_sm90 import (
    WARPGROUP,
    Epilogue,
    EpilogueArguments,
    SplitReduction,
    TileOfExpert,
    columns_of_block,
    staging_bytes,
    zero_tail,
)
from nvfp4_ops.kernels.grouped_mm_mainloop_sm90 import MainLoop
from nvfp4_ops.kernels.grouped_mm_stage_sm90 import (
    BOX_COLUMNS,
    BOXES_OF_BLOCK,
    StageRecord,
    barrier,
)
from nvfp4_ops.kernels.launch.tensors import VECTOR_BYTES, WARP
from nvfp4_ops.kernels.limits import MAX_EXPERTS
from nvfp4_ops.kernels.memory import follow_previous_kernel
from nvfp4_ops.kernels.prepack_sm90 import BLOCK_BYTES
from nvfp4_ops.kernels.ragged_tile_list import RaggedTileList

EVICT_FIRST = 0x12F0000000000000
# Shared memory of a multiprocessor, and what the system takes of it for each CTA.
_SHARED_BYTES, _RESERVED_SHARED_BYTES = 228 << 10, 1 << 10
_ALIGNMENT = 128


class WeightSource(NamedTuple):
    """Prepacked weights in global memory: blocks of 64 rows x 128 columns."""

    pointer: cute.Pointer
    row_blocks: Int32
    used_blocks: Int32
    column_blocks: Int32

    @property
    def block_stride(self) -> Int64:
        """Bytes from a block to the one of the next 64 rows."""
        return Int64(self.column_blocks) * BLOCK_BYTES

    def address(self, expert: Int32, block: Int32) -> Int64:
        first = Int64(expert) * Int64(self.row_blocks) + Int64(block)
        return self.pointer.toint() + first * self.block_stride


class GroupedMmSm90:
    """out[r, n] = act(alpha[e, segment(n)] * row_scale[r] * sum_k x[r, k] W[e, n, k] + bias[e, n]).

    Persistent clusters walk the tiles of ``RaggedTileList`` (64 * warpgroups * cluster weight rows
    x tile_tokens rows of one expert). The CTAs of a cluster take weight rows side by side and share
    x: each loads its part of a tile's rows and multicasts it.

    Warps 0 .. 4 W - 1: consumers. A warpgroup decodes its 64 x 128 weights of a stage and
    multiplies by wgmma, 64 columns at a time, the other 64 being decoded meanwhile (``MainLoop``).
    Warp 4 W: producer. One bulk copy a block of weights, two TMA boxes of x (``StageRecord``).
    Three more warps that do nothing where registers move from its warpgroup to the consumers.

    The last tile of rows may have fewer blocks than warpgroups: the others compute on what is
    there and store nothing. Nothing is read or written for good before the kernel ahead is complete
    (griddepcontrol), so that this one's launch and set-up overlap with it; but for ``offs`` and
    weights with ``early_weights``.

    Limits: E <= 1024; x rows are 16-byte aligned.
    """

    def __init__(self, config: GroupedMmConfig) -> None:
        self.config = config
        self.stage = StageRecord(config)
        self.main_loop = MainLoop(config, self.stage)
        # Registers are given and taken by whole warpgroups.
        producers = WARP if config.registers is None else WARPGROUP
        self.num_threads = WARPGROUP * config.warpgroups + producers
        self.tiles = RaggedTileList(config.tile_tokens, self.num_threads)
        self.staging_bytes = config.row_blocks * staging_bytes(config)
        self.out_bytes = max(
            _ALIGNMENT,
            self.staging_bytes + SplitReduction(config, config.tile_tokens).num_bytes,
        )
        parts = self.stage.total_bytes, self.out_bytes, self.tiles.num_bytes
        shared_bytes = sum(parts) + _ALIGNMENT + _RESERVED_SHARED_BYTES
        if config.blocks_per_sm * shared_bytes > _SHARED_BYTES:
            raise ValueError(
                f"{config}: {config.blocks_per_sm} times {shared_bytes} bytes of shared memory are "
                f"more than the {_SHARED_BYTES} of a multiprocessor"
            )
        self.columns = columns_of_block(config)

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
        segment_columns: Int32,
        grid: Int32,
        stream: cuda_driver.CUstream,
    ):
        config = self.config
        if cutlass.const_expr(config.cluster == 1):
            copy = cpasync.CopyBulkTensorTileG2SOp()
        else:
            copy = cpasync.CopyBulkTensorTileG2SMulticastOp()
        tma_x, tma_tensor_x = cpasync.make_tiled_tma_atom(
            copy,
            x,
            self.stage.box_layout(),
            (config.tile_tokens, BOX_COLUMNS),
            num_multicast=config.cluster,
        )
        num_experts, row_blocks, column_blocks, _ = weight.shape
        self.kernel(
            tma_x,
            tma_tensor_x,
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
            segment_columns,
        ).launch(
            grid=[grid, 1, 1],
            block=[self.num_threads, 1, 1],
            cluster=[config.cluster, 1, 1],
            min_blocks_per_mp=config.blocks_per_sm,
            # Without it the compiler asks a driver for the limit, and there may be none.
            preferred_smem_carveout=100,
            use_pdl=True,
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        tma_x: cute.CopyAtom,
        mX: cute.Tensor,
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
        segment_columns: Int32,
    ):
        config = self.config
        tid, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        smem = cutlass.memory.SmemAllocator()
        sStages = self.stage.allocate(smem)
        sX = self.stage.x_tensor(sStages)
        first = sStages.toint()
        sOut = smem.allocate_array(Uint8, self.out_bytes, byte_alignment=_ALIGNMENT)
        sRowEnd, sTileEnd = self.tiles.allocate(smem)

        if warp == 0:
            cpasync.prefetch_descriptor(tma_x)
        if tid == 0:
            self.stage.initialize(first)
        if cutlass.const_expr(config.cluster > 1):
            # The other CTAs may not multicast here before the barriers are there.
            cute.arch.cluster_arrive()
        mOffs = cute.make_tensor(offs, cute.make_layout(MAX_EXPERTS))
        tile_blocks = config.row_blocks * config.cluster
        # Blocks of padding alone are not worth reading.
        used_blocks = (num_columns + (self.columns - 1)) // self.columns
        row_tiles = (used_blocks + (tile_blocks - 1)) // tile_blocks
        num_tiles = self.tiles.scan(mOffs, sRowEnd, sTileEnd, num_experts, row_tiles)
        weights = WeightSource(weight, row_blocks, used_blocks, column_blocks)
        first_producer = 4 * config.warpgroups
        producer = warp == first_producer
        if cutlass.const_expr(config.early_weights):
            if producer:
                self._load_first_weights(first, weights, sRowEnd, sTileEnd, num_tiles)
            follow_previous_kernel()
        else:
            if warp == 0:
                self._prefetch(weights, sRowEnd, sTileEnd, num_tiles, num_experts, row_tiles)
            follow_previous_kernel()
            # Warp 0 may still read the tables that are written anew now.
            cute.arch.sync_threads()
            num_tiles = self.tiles.scan(mOffs, sRowEnd, sTileEnd, num_experts, row_tiles)
        if cutlass.const_expr(config.cluster > 1):
            cute.arch.cluster_wait()

        if cutlass.const_expr(config.registers is not None):
            if warp >= first_producer:
                cute.arch.setmaxregister_decrease(config.registers[0])
        if producer:
            self._produce(tma_x, mX, sX, first, weights, sRowEnd, sTileEnd, num_tiles)
        if warp < first_producer:
            if cutlass.const_expr(config.registers is not None):
                cute.arch.setmaxregister_increase(config.registers[1])
            self._consume(
                first, sOut, sRowEnd, sTileEnd,
                EpilogueArguments(
                    alpha, row_scale, bias, out, num_columns, alpha_stride, segment_columns
                ),
                num_tiles, column_blocks,
            )  # fmt: skip
        zero_tail(
            out, sRowEnd[num_experts - 1], num_rows, num_columns, config.out_fp32, self.num_threads
        )
        if cutlass.const_expr(config.cluster > 1):
            # A CTA that is gone can be neither written nor signalled to.
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    @cute.jit
    def _first_tile(self):
        """Tile and stride of this CTA's cluster, and the CTA's rank in it."""
        bid, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        if cutlass.const_expr(self.config.cluster == 1):
            return Int32(bid), Int32(grid), Int32(0)
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
        return Int32(bid) // self.config.cluster, Int32(grid) // self.config.cluster, rank

    def _blocks_of_tile(self, weights, expert, row_tile, rank):
        """Address of a tile's first block of weights, and how many blocks below it there are."""
        config = self.config
        first = (row_tile * config.cluster + rank) * config.row_blocks
        address = weights.address(expert, first)
        return address, cutlass.min(cutlass.max(weights.used_blocks - first, 0), config.row_blocks)

    @cute.jit
    def _prefetch(self, weights, sRowEnd, sTileEnd, num_tiles, num_experts, row_tiles):
        """Bring the first tile's first stages to the L2 cache while the kernel ahead still runs.

        Of what that kernel writes nothing can be relied on, least of all ``offs``: a stale one
        costs some bandwidth, and the weights are read again later. Hence L2, and hence the bounds.
        """
        tile, _, rank = self._first_tile()
        lane = cute.arch.lane_idx()
        if tile < num_tiles:
            _, expert, row_tile, _, _ = self.tiles.locate(tile, Int32(0), sRowEnd, sTileEnd)
            expert = cutlass.min(expert, num_experts - 1)
            row_tile = cutlass.max(cutlass.min(row_tile, row_tiles - 1), 0)
            address, num_blocks = self._blocks_of_tile(weights, expert, row_tile, rank)
            if lane < num_blocks:
                stages = self.config.stages * self.stage.column_blocks
                cute.arch.inline_ptx(
                    "cp.async.bulk.prefetch.L2.global [{$r0}], {$r1};",
                    read_only_args=[
                        address + Int64(lane) * weights.block_stride,
                        cutlass.min(weights.column_blocks, stages) * BLOCK_BYTES,
                    ],
                )

    @cute.jit
    def _load_first_weights(self, first, weights, sRowEnd, sTileEnd, num_tiles):
        """Load the first tile's first stages of weights while the kernel ahead still runs."""
        config = self.config
        tile, _, rank = self._first_tile()
        if tile < num_tiles:
            _, expert, row_tile, _, _ = self.tiles.locate(tile, Int32(0), sRowEnd, sTileEnd)
            address, num_blocks = self._blocks_of_tile(weights, expert, row_tile, rank)
            for stage in cutlass.range_constexpr(config.stages):
                column = stage * self.stage.column_blocks
                if column < weights.column_blocks:
                    num_columns = self._columns_of_stage(weights, column)
                    with cute.arch.elect_one():
                        num_bytes = num_columns * num_blocks * BLOCK_BYTES
                        record = first + stage * self.stage.num_bytes
                        full = barrier(record + self.stage.full)
                        cute.arch.mbarrier_expect_tx(full, num_bytes)
                        self._copy_weights(
                            record, weights, address, num_blocks, Int32(column), num_columns
                        )

    @cute.jit
    def _columns_of_stage(self, weights, column):
        """128-column blocks of the stage that starts at one."""
        num_columns = Int32(1)
        if cutlass.const_expr(self.config.split_k):
            num_columns = cutlass.min(weights.column_blocks - column, self.stage.column_blocks)
        return num_columns

    @cute.jit
    def _produce(self, tma_x, mX, sX, first, weights, sRowEnd, sTileEnd, num_tiles):
        config = self.config
        tile, stride, rank = self._first_tile()
        stage, phase, group = Int32(0), Int32(1), Int32(0)
        # From here on, stages of the first tile whose weights are on their way already.
        num_early = Int32(config.stages if config.early_weights else 0)
        while tile < num_tiles:
            group, expert, row_tile, first_row, _ = self.tiles.locate(
                tile, group, sRowEnd, sTileEnd
            )
            gX = cute.local_tile(
                cute.domain_offset((first_row, 0), mX),
                (config.tile_tokens, BOX_COLUMNS),
                (0, None),
            )
            tXsX, tXgX = cpasync.tma_partition(
                tma_x,
                rank,
                cute.make_layout(config.cluster),
                cute.group_modes(sX, 0, 2),
                cute.group_modes(gX, 0, 2),
            )
            address, num_blocks = self._blocks_of_tile(weights, expert, row_tile, rank)
            for column in cutlass.range(
                0, weights.column_blocks, self.stage.column_blocks, unroll=1
            ):
                record = first + stage * self.stage.num_bytes
                full = barrier(record + self.stage.full)
                cute.arch.mbarrier_wait(barrier(record + self.stage.empty), phase)
                num_columns = self._columns_of_stage(weights, column)
                num_bytes = num_columns * (BOXES_OF_BLOCK * self.stage.box_bytes)
                if num_early == 0:
                    num_bytes = num_bytes + num_columns * num_blocks * BLOCK_BYTES
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(full, num_bytes)
                    if num_early == 0:
                        self._copy_weights(
                            record, weights, address, num_blocks, column, num_columns
                        )
                num_early = cutlass.max(num_early - 1, 0)
                for box in cutlass.range_constexpr(self.stage.num_boxes):
                    if box // BOXES_OF_BLOCK < num_columns:
                        self._copy_x(
                            tma_x,
                            tXgX[None, BOXES_OF_BLOCK * column + box],
                            tXsX[None, box, stage],
                            full,
                        )
                stage, phase = self._next(stage, phase)
            num_early = Int32(0)
            tile = tile + stride
        # Consumers look one stage ahead, past the last tile too.
        record = first + stage * self.stage.num_bytes
        cute.arch.mbarrier_wait(barrier(record + self.stage.empty), phase)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(barrier(record + self.stage.full))

    @cute.jit
    def _next(self, stage, phase):
        stage = stage + 1
        if stage == self.config.stages:
            stage = Int32(0)
            phase = phase ^ 1
        return stage, phase

    @cute.jit
    def _copy_weights(self, record, weights, address, num_blocks, column, num_columns):
        """One stage of a tile's weights, by one thread."""
        for block in cutlass.range_constexpr(self.config.row_blocks):
            if block < num_blocks:
                self._copy_blocks(
                    record + (self.stage.weights + block * BLOCK_BYTES),
                    address + block * weights.block_stride + Int64(column) * BLOCK_BYTES,
                    num_columns * BLOCK_BYTES,
                    record + self.stage.full,
                )

    @cute.jit
    def _copy_x(self, tma_x, source, target, full):
        if cutlass.const_expr(self.config.cluster == 1):
            cute.copy(tma_x, source, target, tma_bar_ptr=full)
        else:
            everyone = cutlass.Int16((1 << self.config.cluster) - 1)
            cute.copy(tma_x, source, target, tma_bar_ptr=full, mcast_mask=everyone)

    def _copy_blocks(self, target, source, num_bytes, full):
        """A bulk copy; weights are read once, so they leave the L2 cache first."""
        cute.arch.inline_ptx(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
            ".L2::cache_hint [{$r0}], [{$r1}], {$r2}, [{$r3}], {$r4};",
            read_only_args=[
                target,
                source,
                num_bytes,
                full,
                Int64(EVICT_FIRST),
            ],
        )

    @cute.jit
    def _consume(
        self, first, sOut, sRowEnd, sTileEnd, arguments: EpilogueArguments,
        num_tiles, column_blocks,
    ):  # fmt: skip
        config = self.config
        group = cute.arch.make_warp_uniform(cute.arch.warp_idx()) // 4
        tile, stride, rank = self._first_tile()
        record, phase, expert_group = first, Int32(0), Int32(0)
        self.main_loop.enter(record, phase)
        while tile < num_tiles:
            expert_group, expert, row_tile, first_row, num_left = self.tiles.locate(
                tile, expert_group, sRowEnd, sTileEnd
            )
            block = (row_tile * config.cluster + rank) * config.row_blocks
            if cutlass.const_expr(not config.split_k):
                block = block + group
            record, phase = self._compute_tile(
                0, TileOfExpert(expert, block, first_row, num_left), arguments,
                sOut, first, record, phase, column_blocks,
            )  # fmt: skip
            tile = tile + stride

    @cute.jit
    def _compute_tile(
        self, i: cutlass.Constexpr[int], tile, arguments, sOut, first,
        record, phase, column_blocks,
    ):  # fmt: skip
        """A tile by the first width from number i on that holds its tokens.

        Every width has a loop and an epilogue of its own: where accumulators of several loops meet,
        ptxas waits for every product.
        """
        width = self.config.widths[i]
        if cutlass.const_expr(i + 1 == len(self.config.widths)):
            record, phase = self._compute_width(
                width, tile, arguments, sOut, first, record, phase, column_blocks
            )
        else:
            if tile.num_left <= width:
                record, phase = self._compute_width(
                    width, tile, arguments, sOut, first,
                    record, phase, column_blocks,
                )  # fmt: skip
            else:
                record, phase = self._compute_tile(
                    i + 1, tile, arguments, sOut, first,
                    record, phase, column_blocks,
                )  # fmt: skip
        return record, phase

    @cute.jit
    def _compute_width(
        self, width: cutlass.Constexpr[int], tile, arguments, sOut, first,
        record, phase, column_blocks,
    ):  # fmt: skip
        group = cute.arch.thread_idx()[0] // WARPGROUP
        acc = cute.make_rmem_tensor(cute.make_layout(width // 2), Float32)
        acc.fill(0.0)
        # Loaded here, their latency passes under the products.
        scales, offsets = Epilogue(self.config, width).load_scales(tile, arguments)
        record, phase = self.main_loop.multiply(acc, first, record, phase, column_blocks)
        if cutlass.const_expr(self.config.split_k):
            SplitReduction(self.config, width).add(acc, sOut + self.staging_bytes)
            if group == 0:
                Epilogue(self.config, width).run(acc, scales, offsets, tile, arguments, sOut, 1)
        else:
            lines = sOut + group * staging_bytes(self.config)
            Epilogue(self.config, width).run(
                acc, scales, offsets, tile, arguments, lines, 1 + group
            )
        return record, phase


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
            # All that bulk copies need: AOTInductor gives constants multiples of 64.
            assumed_align=VECTOR_BYTES,
        ),
        make_fake_tensor(BFloat16, (rows, k), (k, 1), assumed_align=VECTOR_BYTES),
        make_fake_compact_tensor(Int32, (experts,)),
        make_fake_compact_tensor(Float32, (size(),)),
        make_fake_compact_tensor(Float32, (size(),)),
        make_fake_compact_tensor(Float32, (size(),)),
        make_fake_tensor(out_type, (rows, columns), (columns, 1), assumed_align=VECTOR_BYTES),
        Int32(1),
        Int32(1),
        Int32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi --gpu-arch sm_90a {options}",
    )
