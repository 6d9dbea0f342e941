"""The tiles of a grouped mm, listed on the device from the end row of each expert.

Worked example, tiles of 8 rows and 2 row tiles of the weight, rows per expert [2, 0, 9]:
``offs`` [2, 2, 11], tiles per expert [1 * 2, 0, 2 * 2], ``sTileEnd`` [2, 2, 6]. Tile 4 is expert
2's third: row tile 1, token tile 0.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from nvfp4_ops.kernels.launch.tensors import WARP
from nvfp4_ops.kernels.limits import MAX_EXPERTS
from nvfp4_ops.kernels.ragged import warp_prefix_sum


class RaggedTileList:
    """``sRowEnd[e]``: end row of expert e (``offs``). ``sTileEnd[e]``: tiles of experts 0 .. e.

    Both are padded to whole warps of experts, which have no tiles.
    """

    def __init__(self, tile_tokens: int, num_threads: int) -> None:
        self.tile_tokens = tile_tokens
        self.num_threads = num_threads
        self.num_bytes = 2 * MAX_EXPERTS * 4

    @cute.jit
    def allocate(self, smem: cutlass.memory.SmemAllocator):
        layout = cute.make_layout(MAX_EXPERTS)
        sRowEnd = smem.allocate_tensor(Int32, layout, byte_alignment=16)
        sTileEnd = smem.allocate_tensor(Int32, layout, byte_alignment=16)
        return sRowEnd, sTileEnd

    @cute.jit
    def scan(self, mOffs, sRowEnd, sTileEnd, num_experts, row_tiles):
        """Collective of all threads. Returns the number of tiles."""
        tid, _, _ = cute.arch.thread_idx()
        groups = (num_experts + (WARP - 1)) // WARP
        # All loads at once: one latency, however many experts.
        for expert in cutlass.range(tid, groups * WARP, self.num_threads, unroll=1):
            sRowEnd[expert] = mOffs[cutlass.min(expert, num_experts - 1)]
        cute.arch.sync_threads()
        if tid < WARP:
            before = Int32(0)
            for group in cutlass.range(groups, unroll=1):
                expert = group * WARP + tid
                start = Int32(0)
                if expert > 0:
                    start = sRowEnd[expert - 1]
                tokens = sRowEnd[expert] - start
                count = (tokens + (self.tile_tokens - 1)) // self.tile_tokens * row_tiles
                count = warp_prefix_sum(count, tid) + before
                sTileEnd[expert] = count
                before = cute.arch.shuffle_sync(count, WARP - 1)
        cute.arch.sync_threads()
        return sTileEnd[groups * WARP - 1]

    @cute.jit
    def locate(self, tile, group, sRowEnd, sTileEnd):
        """Where a tile is; ``group`` is the one returned for an earlier tile, 0 at first.

        Returns (group, expert, row tile, first row of x, rows left from there).
        """
        lane = cute.arch.lane_idx()
        while sTileEnd[group * WARP + (WARP - 1)] <= tile:
            group = group + 1
        passed = cute.arch.vote_ballot_sync(sTileEnd[group * WARP + lane] <= tile)
        expert = group * WARP + cute.arch.popc(passed)
        first_tile, first_row = Int32(0), Int32(0)
        if expert > 0:
            first_tile = sTileEnd[expert - 1]
            first_row = sRowEnd[expert - 1]
        tokens = sRowEnd[expert] - first_row
        token_tiles = (tokens + (self.tile_tokens - 1)) // self.tile_tokens
        row_tile = (tile - first_tile) // token_tiles
        token_tile = tile - first_tile - row_tile * token_tiles
        first_token = token_tile * self.tile_tokens
        return group, expert, row_tile, first_row + first_token, tokens - first_token
