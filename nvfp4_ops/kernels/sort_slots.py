"""Slots to rows: a stable counting sort by expert whose bits no schedule can change.

Portable CuTe DSL. Up to ``WHOLE_SLOTS`` slots, where decoding waits for it, one CTA does it all;
beyond that one kernel counts and a second one places. The meaning of every bit is
``nvfp4_ops.routing.permute``'s. Not for moving rows: ``permute_rows`` does that.
"""

from collections.abc import Callable

import cuda.bindings.driver as cuda_driver
import cutlass
import cutlass.cute as cute
import torch
from cutlass import Int32, Int64, Uint16, Uint32, Uint64
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from nvfp4_ops.kernels.launch.sort_slots import PAIR, SortConfig
from nvfp4_ops.kernels.launch.tensors import VECTOR_BYTES, WARP
from nvfp4_ops.kernels.memory import follow_previous_kernel, ptx
from nvfp4_ops.kernels.permute_rows import divide

FULL_WARP = 0xFFFFFFFF
COUNTER_BITS = 16
COUNTER_MASK = (1 << COUNTER_BITS) - 1
LOADS_IN_FLIGHT = 8
_INDEX_TYPES = {torch.int32: Int32, torch.int64: Int64}
_UNSIGNED_TYPES = {torch.int32: Uint32, torch.int64: Uint64}


class SortKernel:
    """offs, token_of_row, row_of_slot = sort_by_expert(top_k_index, E).

        row(slot) = slots of lower experts + earlier slots of the same expert

    A warp owns consecutive slots and ranks 32 at a time: lanes of the same expert find each other
    by a ballot on each bit of its number, their rank is the number of lower ones, and the lowest
    keeps count in the warp's row of the table. A scan down each column of the table gives what
    earlier warps have of an expert, a scan over the experts where an expert starts. Where there are
    several CTAs each first writes its column sums; the placing CTAs then sum those of all CTAs, and
    of the earlier ones.

    Every sum is of integers in a fixed order and no CTA waits for another one.

    Limits: E <= max_experts; slots <= ``MAX_SLOTS``. An index below 0 is dropped like one from E
    on.
    """

    def __init__(self, config: SortConfig) -> None:
        self.config = config

    @cute.jit
    def __call__(
        self,
        mIndex: cute.Tensor,
        mCounts: cute.Tensor | None,
        mOffs: cute.Tensor | None,
        mTokens: cute.Tensor | None,
        mRows: cute.Tensor | None,
        num_experts: Int32,
        top_k: Int32,
        num_ctas: Int32,
        stream: cuda_driver.CUstream,
    ):
        self.kernel(mIndex, mCounts, mOffs, mTokens, mRows, num_experts, top_k).launch(
            grid=[num_ctas, 1, 1],
            block=[self.config.threads, 1, 1],
            stream=stream,
            use_pdl=True,
            # Else ptxas keeps to 32 registers, and to few loads in flight.
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(
        self,
        mIndex: cute.Tensor,
        mCounts: cute.Tensor | None,
        mOffs: cute.Tensor | None,
        mTokens: cute.Tensor | None,
        mRows: cute.Tensor | None,
        num_experts: Int32,
        top_k: Int32,
    ):
        config = self.config
        thread = cute.arch.thread_idx()[0]
        smem = cutlass.memory.SmemAllocator()
        table = cute.make_layout((config.num_warps, config.num_pairs), stride=(config.num_pairs, 1))
        sPairs = smem.allocate_tensor(Uint32, table, byte_alignment=VECTOR_BYTES)
        # The same table, a counter an expert.
        pointer = cute.make_ptr(
            Uint16, sPairs.iterator.toint(), cute.AddressSpace.smem, assumed_align=VECTOR_BYTES
        )
        sCounts = cute.make_tensor(
            pointer,
            cute.make_layout(
                (config.num_warps, config.max_experts), stride=(config.max_experts, 1)
            ),
        )
        self._zero(sPairs, thread)
        first_token = divide(self._first_slot(), top_k)
        token_step = divide(Int32(WARP), top_k)
        follow_previous_kernel()
        if cutlass.const_expr(config.stage == "place"):
            all_pairs = self._sum_counts(smem, mCounts, thread)
        indices = self._load_indices(mIndex)
        cute.arch.sync_threads()
        experts = self._experts(indices, Int32(mIndex.shape[0]), num_experts)
        ranked = self._rank(sCounts, experts, num_experts)
        cute.arch.sync_threads()
        own = Uint32(0)
        if thread < config.num_pairs:
            own = self._scan_column(sPairs, thread)
        if cutlass.const_expr(config.stage == "count"):
            if thread < config.num_pairs:
                mCounts[cute.arch.block_idx()[0], thread] = Int32(own)
        else:
            counts = (Int32(own & Uint32(COUNTER_MASK)), Int32(own >> COUNTER_BITS))
            all_counts, before = counts, (Int32(0), Int32(0))
            if cutlass.const_expr(config.stage == "place"):
                all_counts, before = all_pairs[:2], all_pairs[2:]
            sums = (all_counts[0] + all_counts[1], counts[0] + counts[1])
            starts, totals = self._scan_experts(smem, sums, thread)
            start, own_start = starts
            per_expert = cute.make_layout(config.max_experts)
            sStart = smem.allocate_tensor(Int32, per_expert)
            sShift = smem.allocate_tensor(Int32, per_expert)
            if thread < config.num_pairs:
                for i in cutlass.range_constexpr(PAIR):
                    expert = PAIR * thread + i
                    sStart[expert] = own_start
                    sShift[expert] = start + before[i] - own_start
                    start = start + all_counts[i]
                    own_start = own_start + counts[i]
                    if cute.arch.block_idx()[0] == 0 and expert < num_experts:
                        mOffs[expert] = start
            cute.arch.sync_threads()
            placed = self._place(sStart, sShift, sCounts, ranked, num_experts)
            tokens = self._tokens(first_token, token_step, top_k)
            self._write(smem, mTokens, mRows, placed, tokens, *totals)

    @cute.jit
    def _first_slot(self) -> Int32:
        """Of this lane; its others follow at steps of a warp."""
        thread, warp_slots = cute.arch.thread_idx()[0], WARP * self.config.slots_per_thread
        first = cute.arch.block_idx()[0] * self.config.num_slots
        return first + thread // WARP * warp_slots + thread % WARP

    @cute.jit
    def _zero(self, sPairs: cute.Tensor, thread: Int32):
        config = self.config
        words = config.num_warps * config.num_pairs
        sWords = cute.make_tensor(sPairs.iterator, cute.make_layout(words))
        for i in cutlass.range_constexpr(words // config.threads):
            sWords[i * config.threads + thread] = Uint32(0)

    @cute.jit
    def _load_indices(self, mIndex: cute.Tensor) -> list:
        """Of the lane's slots, unsigned."""
        unsigned = _UNSIGNED_TYPES[self.config.index_dtype]
        last, first = Int32(mIndex.shape[0]) - 1, self._first_slot()
        indices = []
        for i in cutlass.range_constexpr(self.config.slots_per_thread):
            # Past the end the last slot again: no branch between the loads.
            indices.append(unsigned(mIndex[cutlass.min(first + i * WARP, last)]))
        return indices

    @cute.jit
    def _experts(self, indices: list, num_slots: Int32, num_experts: Int32) -> list:
        """Expert of each of the lane's slots; num_experts where the slot gets no row."""
        unsigned = _UNSIGNED_TYPES[self.config.index_dtype]
        first = self._first_slot()
        experts = []
        for i in cutlass.range_constexpr(self.config.slots_per_thread):
            expert = Int32(num_experts)
            # An index below 0 is far above num_experts here.
            if first + i * WARP < num_slots and indices[i] < unsigned(num_experts):
                expert = Int32(indices[i])
            experts.append(expert)
        return experts

    @cute.jit
    def _sum_counts(self, smem, mCounts: cute.Tensor, thread: Int32) -> tuple:
        """Of the thread's pair: slots of all CTAs (low, high), slots of earlier CTAs (low, high).

        The threads of a pair take every ``parts``-th CTA each.
        """
        config = self.config
        parts = config.threads // config.num_pairs
        cta, num_ctas = cute.arch.block_idx()[0], Int32(mCounts.shape[0])
        pair, part = thread % config.num_pairs, thread // config.num_pairs
        low, high, before_low, before_high = Int32(0), Int32(0), Int32(0), Int32(0)
        for first in cutlass.range(part, num_ctas, parts * LOADS_IN_FLIGHT, unroll=1):
            counts = []
            for i in cutlass.range_constexpr(LOADS_IN_FLIGHT):
                # Past the end the last one again: no branch between the loads.
                other = cutlass.min(first + i * parts, num_ctas - 1)
                counts.append(Uint32(mCounts[other, pair]))
            for i in cutlass.range_constexpr(LOADS_IN_FLIGHT):
                other = first + i * parts
                other_low = Int32(counts[i] & Uint32(COUNTER_MASK))
                other_high = Int32(counts[i] >> COUNTER_BITS)
                if other < num_ctas:
                    low = low + other_low
                    high = high + other_high
                if other < cta:
                    before_low = before_low + other_low
                    before_high = before_high + other_high
        table = cute.make_layout((4, config.threads), stride=(config.threads, 1))
        sSums = smem.allocate_tensor(Int32, table)
        for i, value in enumerate((low, high, before_low, before_high)):
            sSums[i, thread] = value
        cute.arch.sync_threads()
        sums = [Int32(0), Int32(0), Int32(0), Int32(0)]
        for i in cutlass.range_constexpr(4):
            for j in cutlass.range_constexpr(parts):
                sums[i] = sums[i] + Int32(sSums[i, j * config.num_pairs + pair])
        return tuple(sums)

    @cute.jit
    def _rank(self, sCounts: cute.Tensor, experts: list, num_experts: Int32) -> list:
        """Expert and rank (earlier slots of it in this warp) of each slot, and the warp's counts.

        In one word, the rank in the upper half: many slots are many registers.
        """
        warp = cute.arch.thread_idx()[0] // WARP
        peers_of_slot = [self._peers(expert, num_experts) for expert in experts]
        ranked = []
        for i in cutlass.range_constexpr(self.config.slots_per_thread):
            expert, peers = experts[i], peers_of_slot[i]
            rank = Int32(cute.arch.popc(peers & Uint32(cute.arch.lanemask_lt())))
            seen = Int32(0)
            if cutlass.const_expr(i > 0):
                if expert < num_experts:
                    seen = Int32(Uint16(sCounts[warp, expert]))
                cute.arch.sync_warp()
            if expert < num_experts and rank == 0:
                sCounts[warp, expert] = Uint16(seen + Int32(cute.arch.popc(peers)))
            cute.arch.sync_warp()
            ranked.append(Int32(expert | ((seen + rank) << COUNTER_BITS)))
        return ranked

    @cute.jit
    def _peers(self, expert: Int32, num_experts: Int32) -> Uint32:
        """Lanes of the same expert; of no meaning where that is num_experts.

        A ballot a bit takes the same time whatever the experts are. ``match`` takes a step for
        each different one, of which there are up to 32.
        """
        peers = Uint32(cute.arch.vote_ballot_sync(expert < num_experts))
        for bit in cutlass.range_constexpr((self.config.max_experts - 1).bit_length()):
            # From one predicate; LLVM would compute it for the ballot and again for the choice.
            peers = peers & ptx(
                "{\n.reg .pred p;\n.reg .b32 lanes, others;\n"
                f"and.b32 others, {{$r0}}, {1 << bit};\n"
                "setp.ne.b32 p, others, 0;\n"
                f"vote.sync.ballot.b32 lanes, p, {FULL_WARP};\n"
                "selp.b32 others, 0, -1, p;\n"
                "xor.b32 {$w0}, lanes, others;\n}",
                Uint32,
                Uint32(expert),
            )
        return peers

    @cute.jit
    def _scan_column(self, sPairs: cute.Tensor, pair: Int32) -> Uint32:
        """Counts of a pair in this CTA; the table then has what earlier warps counted."""
        total = Uint32(0)
        counts = []
        for warp in cutlass.range_constexpr(self.config.num_warps):
            counts.append(Uint32(sPairs[warp, pair]))
        for warp in cutlass.range_constexpr(self.config.num_warps):
            if cutlass.const_expr(self.config.stage != "count"):
                sPairs[warp, pair] = total
            # No carry from one counter to the other: a CTA has fewer slots than 2^16.
            total = total + counts[warp]
        return total

    @cute.jit
    def _scan_experts(self, smem, own: tuple, thread: Int32) -> tuple:
        """Of each number of the thread's pair: the sum of the pairs before, and of all."""
        warp, lane = thread // WARP, thread % WARP
        num_warps = self.config.num_pairs // WARP
        table = cute.make_layout((len(own), num_warps), stride=(num_warps, 1))
        sWarp = smem.allocate_tensor(Int32, table)
        ends = list(own)
        for step in cutlass.range_constexpr(5):
            for i in cutlass.range_constexpr(len(own)):
                below = cute.arch.shuffle_sync_up(ends[i], 1 << step)
                if lane >= (1 << step):
                    ends[i] = ends[i] + below
        if lane == WARP - 1 and warp < num_warps:
            for i in cutlass.range_constexpr(len(own)):
                sWarp[i, warp] = ends[i]
        cute.arch.sync_threads()
        starts, totals = [], []
        for i in cutlass.range_constexpr(len(own)):
            start, total = ends[i] - own[i], Int32(0)
            for other in cutlass.range_constexpr(num_warps):
                count = Int32(sWarp[i, other])
                if other < warp:
                    start = start + count
                total = total + count
            starts.append(start)
            totals.append(total)
        return tuple(starts), tuple(totals)

    @cute.jit
    def _place(
        self,
        sStart: cute.Tensor,
        sShift: cute.Tensor,
        sCounts: cute.Tensor,
        ranked: list,
        num_experts: Int32,
    ) -> list:
        """(place among the rows of this CTA, row) of each of the lane's slots, -1 for none."""
        warp = cute.arch.thread_idx()[0] // WARP
        placed = []
        for i in cutlass.range_constexpr(self.config.slots_per_thread):
            place, row = Int32(-1), Int32(-1)
            expert, rank = ranked[i] & COUNTER_MASK, ranked[i] >> COUNTER_BITS
            if expert < num_experts:
                place = Int32(sStart[expert]) + Int32(Uint16(sCounts[warp, expert])) + rank
                row = place + Int32(sShift[expert])
            placed.append((place, row))
        return placed

    @cute.jit
    def _tokens(self, first_token: tuple, step: tuple, top_k: Int32) -> list:
        """Token of each of the lane's slots, a warp apart, of the first one's and of a step's
        quotient and remainder by top_k."""
        token, slot_of_token = first_token
        tokens = []
        for _ in cutlass.range_constexpr(self.config.slots_per_thread):
            tokens.append(token)
            token, slot_of_token = token + step[0], slot_of_token + step[1]
            if slot_of_token >= top_k:
                token, slot_of_token = token + 1, slot_of_token - top_k
        return tokens

    @cute.jit
    def _write(
        self,
        smem,
        mTokens: cute.Tensor,
        mRows: cute.Tensor,
        placed: list,
        tokens: list,
        total: Int32,
        own_total: Int32,
    ):
        """Through shared memory, from which rows of an expert leave together.

        total, own_total: slots with a row, of all CTAs and of this one.
        """
        config = self.config
        num_slots = Int32(mRows.shape[0])
        first, thread = self._first_slot(), cute.arch.thread_idx()[0]
        whole = cutlass.const_expr(config.stage == "whole")
        sTokens = smem.allocate_tensor(Int32, cute.make_layout(config.num_slots))
        if cutlass.const_expr(not whole):
            sRows = smem.allocate_tensor(Int32, cute.make_layout(config.num_slots))
        for i in cutlass.range_constexpr(config.slots_per_thread):
            slot = first + i * WARP
            place, row = placed[i]
            if slot < num_slots:
                mRows[slot] = row
            if place >= 0:
                sTokens[place] = tokens[i]
                if cutlass.const_expr(not whole):
                    sRows[place] = row
        cute.arch.sync_threads()
        first_row = cute.arch.block_idx()[0] * config.num_slots + thread
        for i in cutlass.range_constexpr(config.slots_per_thread):
            place, row = thread + i * config.threads, first_row + i * config.threads
            if place < own_total:
                target = place
                if cutlass.const_expr(not whole):
                    target = Int32(sRows[place])
                mTokens[target] = Int32(sTokens[place])
            if row >= total and row < num_slots:
                mTokens[row] = Int32(-1)

    def compile(self, options: str = "") -> Callable[..., None]:
        config = self.config
        num_slots = cute.sym_int32()
        vector = make_fake_compact_tensor(Int32, (num_slots,), assumed_align=4)
        index_type = _INDEX_TYPES[config.index_dtype]
        counts = make_fake_compact_tensor(
            Int32, (cute.sym_int32(), config.num_pairs), stride_order=(1, 0), assumed_align=4
        )
        offs = make_fake_compact_tensor(Int32, (cute.sym_int32(),), assumed_align=4)
        places = config.stage != "count"
        return cute.compile(
            self,
            make_fake_compact_tensor(
                index_type, (num_slots,), assumed_align=config.index_dtype.itemsize
            ),
            None if config.stage == "whole" else counts,
            offs if places else None,
            vector if places else None,
            vector if places else None,
            Int32(1),
            Int32(1),
            Int32(1),
            make_fake_stream(use_tvm_ffi_env_stream=True),
            options=f"--enable-tvm-ffi {options}",
        )


def build(config: SortConfig, options: str = "") -> Callable[..., None]:
    """Compile for ``CUTE_DSL_ARCH`` or the present GPU; called with torch tensors."""
    return SortKernel(config).compile(options)
