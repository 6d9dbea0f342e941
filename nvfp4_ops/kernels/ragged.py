"""Which expert a row belongs to, and where its rows lie in swizzled scales.

Swizzled, each expert starts on a tile of 128 rows of its own.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from nvfp4_ops import format as nvfp4
from nvfp4_ops.kernels.launch.tensors import WARP
from nvfp4_ops.kernels.limits import MAX_EXPERTS


@cute.jit
def upper_bound(table: cute.Tensor, size: Int32, value: Int32) -> Int32:
    """How many entries of a non-decreasing table are <= value."""
    low = Int32(0)
    high = Int32(size)
    while low < high:
        middle = (low + high) >> 1
        if Int32(table[middle]) <= value:
            low = middle + 1
        else:
            high = middle
    return low


@cute.jit
def warp_upper_bound(table: cute.Tensor, size: Int32, value: Int32) -> Int32:
    """The same by a whole warp, for one value, up to 32 * 32 entries: two loads a lane, not ten."""
    lane = cute.arch.lane_idx()
    width = (size + (WARP - 1)) // WARP
    first = lane * width
    passed = False
    if first < size:
        passed = Int32(table[cutlass.min(first + width, size) - 1]) <= value
    first = _count_lanes(passed) * width
    entry = first + lane
    passed = False
    if lane < width and entry < size:
        passed = Int32(table[entry]) <= value
    return cutlass.min(first + _count_lanes(passed), size)


def _count_lanes(predicate: cutlass.Boolean) -> Int32:
    return cute.arch.popc(cute.arch.vote_ballot_sync(predicate))


@cute.jit
def entry_before(table: cute.Tensor, index: Int32) -> Int32:
    """table[index - 1], and 0 before the first."""
    entry = Int32(0)
    if index > 0:
        entry = Int32(table[index - 1])
    return entry


@cute.jit
def tiles_of_expert(mOffs: cute.Tensor, expert: Int32) -> Int32:
    rows = Int32(mOffs[expert]) - entry_before(mOffs, expert)
    return (rows + (nvfp4.SWIZZLE_TILE_ROWS - 1)) // nvfp4.SWIZZLE_TILE_ROWS


class RaggedTiles:
    """Where each expert's rows and tiles end: two tables in shared memory, made by a whole CTA.

    ``sEnd[e]`` is the end row (``offs`` itself), ``sTileEnd[e]`` the end tile:
    rows per expert [2, 0, 130] have end rows [2, 2, 132] and end tiles [1, 1, 3].

    threads: of the CTA, whole warps.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads

    @cute.jit
    def scan(self, mOffs: cute.Tensor, num_experts: Int32):
        """Collective. Returns (sEnd, sTileEnd)."""
        smem = cutlass.memory.SmemAllocator()
        sEnd = smem.allocate_tensor(Int32, cute.make_layout(MAX_EXPERTS), byte_alignment=16)
        sTileEnd = smem.allocate_tensor(Int32, cute.make_layout(MAX_EXPERTS), byte_alignment=16)
        sWarp = smem.allocate_tensor(Int32, cute.make_layout(WARP), byte_alignment=16)
        thread = cute.arch.thread_idx()[0]
        warp, lane = thread // WARP, thread % WARP
        per_thread = (num_experts + (self.threads - 1)) // self.threads
        first = thread * per_thread
        own = Int32(0)
        for i in cutlass.range(per_thread, unroll=1):
            expert = first + i
            if expert < num_experts:
                own = own + tiles_of_expert(mOffs, expert)
        total = own
        for step in cutlass.range_constexpr(5):
            below = cute.arch.shuffle_sync_up(total, 1 << step)
            if lane >= (1 << step):
                total = total + below
        if lane == WARP - 1:
            sWarp[warp] = total
        cute.arch.sync_threads()
        end = total - own
        for other in cutlass.range_constexpr(self.threads // WARP):
            if other < warp:
                end = end + Int32(sWarp[other])
        for i in cutlass.range(per_thread, unroll=1):
            expert = first + i
            if expert < num_experts:
                end = end + tiles_of_expert(mOffs, expert)
                sEnd[expert] = Int32(mOffs[expert])
                sTileEnd[expert] = end
        cute.arch.sync_threads()
        return sEnd, sTileEnd


@cute.jit
def locate_ragged_tile(sEnd: cute.Tensor, sTileEnd: cute.Tensor, num_experts: Int32, tile: Int32):
    """Expert of a row tile, its first linear row, how many rows; none past the last expert."""
    expert = upper_bound(sTileEnd, num_experts, tile)
    first = Int32(0)
    count = Int32(0)
    if expert < num_experts:
        tile_in_expert = tile - entry_before(sTileEnd, expert)
        first = entry_before(sEnd, expert) + tile_in_expert * nvfp4.SWIZZLE_TILE_ROWS
        count = cutlass.min(Int32(sEnd[expert]) - first, Int32(nvfp4.SWIZZLE_TILE_ROWS))
    return expert, first, count


@cute.jit
def locate_tile(rows_per_expert: Int32, tile: Int32):
    """The same where every expert has as many rows."""
    tiles_per_expert = (rows_per_expert + (nvfp4.SWIZZLE_TILE_ROWS - 1)) // nvfp4.SWIZZLE_TILE_ROWS
    expert = tile // tiles_per_expert
    row = (tile - expert * tiles_per_expert) * nvfp4.SWIZZLE_TILE_ROWS
    count = cutlass.min(rows_per_expert - row, Int32(nvfp4.SWIZZLE_TILE_ROWS))
    return expert, expert * rows_per_expert + row, count
