"""A stage of the Hopper grouped mm's pipeline in shared memory, as its two sides see it."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Int32, Int64
from cutlass.cute.nvgpu import warpgroup

from nvfp4_ops.format import ceil_div
from nvfp4_ops.kernels.grouped_mm_config import GroupedMmConfig
from nvfp4_ops.kernels.prepack_sm90 import BLOCK_BYTES, BLOCK_COLUMNS

# A box of x: the 128 bytes of a row that a swizzle pattern spans.
BOX_COLUMNS = 64
BOXES_OF_BLOCK = BLOCK_COLUMNS // BOX_COLUMNS
_BARRIER_BYTES = 8
# Rows of x lie in groups of eight, of which the tensor cores want each at a multiple of this.
_ALIGNMENT = 1024


class StageRecord:
    """x, weights and two barriers side by side, so that one address leads to all of them.

    x: boxes of 64 columns, two a 128-column block: ``tile_tokens`` rows of 128 bytes, swizzled.
    weights: a block for each warpgroup.
    full: 1 arrival (producer) + bytes, x from every CTA of the cluster.
    empty: 4 W arrivals (one a consumer warp) from every CTA of the cluster, as its producer
    overwrites x in all of them.
    nobody: one more barrier, behind the last stage; like ``empty``, but nobody waits for it.
    """

    def __init__(self, config: GroupedMmConfig) -> None:
        self.config = config
        # 128-column blocks of a stage.
        self.column_blocks = config.warpgroups if config.split_k else 1
        self.num_boxes = BOXES_OF_BLOCK * self.column_blocks
        self.box_bytes = config.tile_tokens * BOX_COLUMNS * 2
        self.weights = self.num_boxes * self.box_bytes
        self.full = self.weights + BLOCK_BYTES * config.warpgroups
        self.empty = self.full + _BARRIER_BYTES
        self.num_bytes = ceil_div(self.empty + _BARRIER_BYTES, _ALIGNMENT) * _ALIGNMENT
        self.arrivals = 4 * config.warpgroups * config.cluster

    @property
    def end(self) -> int:
        """Offset from the first stage of the barrier ``nobody``."""
        return self.num_bytes * self.config.stages

    @property
    def total_bytes(self) -> int:
        return self.end + _BARRIER_BYTES

    def allocate(self, smem: cutlass.memory.SmemAllocator) -> cute.Pointer:
        """All stages, and behind them ``nobody``."""
        return smem.allocate_array(cutlass.Uint8, self.total_bytes, byte_alignment=_ALIGNMENT)

    @cute.jit
    def initialize(self, first):
        """By one thread."""
        for stage in cutlass.range_constexpr(self.config.stages):
            record = first + stage * self.num_bytes
            cute.arch.mbarrier_init(barrier(record + self.full), 1)
            cute.arch.mbarrier_init(barrier(record + self.empty), self.arrivals)
        cute.arch.mbarrier_init(barrier(first + self.end), self.arrivals)
        cute.arch.mbarrier_init_fence()

    def box_layout(self) -> cute.ComposedLayout:
        """(tokens, columns) of a box."""
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, BFloat16)
        return cute.tile_to_shape(atom, (self.config.tile_tokens, BOX_COLUMNS), order=(0, 1))

    def x_tensor(self, stages: cute.Pointer) -> cute.Tensor:
        """(tokens, columns, boxes, stages)."""
        box = self.box_layout()
        boxes = cute.make_layout(
            (self.num_boxes, self.config.stages),
            stride=(self.box_bytes // 2, self.num_bytes // 2),
        )
        layout = cute.append(cute.append(box.outer, boxes[0]), boxes[1])
        return cute.make_tensor(cute.recast_ptr(stages, box.inner, dtype=BFloat16), layout)


def barrier(address: Int32) -> cute.Pointer:
    return cute.make_ptr(Int64, address, cute.AddressSpace.smem, assumed_align=_BARRIER_BYTES)
