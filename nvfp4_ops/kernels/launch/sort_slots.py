"""Launch of ``sort_slots``: one CTA does it all where decoding waits for it, else two kernels."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from nvfp4_ops.kernels.launch.tensors import WARP, GetCompiled, Launch
from nvfp4_ops.kernels.limits import MAX_EXPERTS

# Counters of two experts in a word, of 16 bits each: a CTA has at most 2^13 slots.
PAIR = 2

# Tables in shared memory are this wide; a narrow one leaves more of it to neighbours.
EXPERT_LIMITS = (256, MAX_EXPERTS)

WHOLE_SLOTS = 4096

MAX_SLOTS = 1 << 30

MAX_CTAS = 128


@dataclass(frozen=True)
class SortConfig:
    """Static configuration.

    stage: "whole" sorts in one CTA; "count" writes each CTA's counts and "place" uses them.
    max_experts: width of the tables, one of ``EXPERT_LIMITS``.
    threads, slots_per_thread: their product is the number of slots of a CTA.
    """

    stage: Literal["whole", "count", "place"]
    index_dtype: torch.dtype
    max_experts: int
    threads: int = 1024
    slots_per_thread: int = 1

    def __post_init__(self) -> None:
        if self.index_dtype not in (torch.int32, torch.int64):
            raise ValueError(f"index_dtype: must be int32 or int64, got {self.index_dtype}")
        if self.max_experts not in EXPERT_LIMITS:
            raise ValueError(f"max_experts: must be in {EXPERT_LIMITS}, got {self.max_experts}")
        if self.threads not in (256, 512, 1024) or self.threads < self.num_pairs:
            raise ValueError(
                f"threads: must be 256, 512 or 1024, and at least {self.num_pairs}, "
                f"got {self.threads}"
            )
        if self.slots_per_thread not in (1, 2, 4, 8):
            raise ValueError(f"slots_per_thread: must be 1, 2, 4 or 8, got {self.slots_per_thread}")
        if self.stage == "whole" and self.num_slots > WHOLE_SLOTS:
            raise ValueError(f"whole: a CTA sorts up to {WHOLE_SLOTS}, got {self.num_slots} slots")

    @property
    def num_pairs(self) -> int:
        return self.max_experts // PAIR

    @property
    def num_warps(self) -> int:
        return self.threads // WARP

    @property
    def num_slots(self) -> int:
        """Slots of a CTA."""
        return self.threads * self.slots_per_thread


@lru_cache(maxsize=1024)
def choose_configs(num_slots: int, num_experts: int, dtype: torch.dtype) -> tuple[SortConfig, ...]:
    """The kernels to run, in order: ("whole",) or ("count", "place")."""
    max_experts = next(limit for limit in EXPERT_LIMITS if num_experts <= limit)
    # Few threads start and meet sooner.
    few = max(256, max_experts // PAIR)
    for threads, slots_per_thread in ((few, 1), (1024, 1), (1024, 2), (1024, 4)):
        if num_slots <= threads * slots_per_thread:
            return (SortConfig("whole", dtype, max_experts, threads, slots_per_thread),)
    # Every placing CTA reads the counts of all: their number is kept low.
    per_thread = next((n for n in (1, 4) if num_slots <= 1024 * n * MAX_CTAS), 8)
    return (
        SortConfig("count", dtype, max_experts, 1024, per_thread),
        SortConfig("place", dtype, max_experts, 1024, per_thread),
    )


def prepare_sort(top_k_index: Tensor, num_experts: int, get_compiled: GetCompiled) -> Launch:
    """offs, token_of_row, row_of_slot = sort_by_expert(top_k_index, E), all written whole.

    top_k_index: (T, top_k) int32 or int64, contiguous, T * top_k from 1 to ``MAX_SLOTS``.
    get_compiled: from a ``SortConfig`` to what ``build`` returns for it.

    Returns launch(top_k_index, offs (E,), token_of_row (T * top_k,), row_of_slot (T, top_k)), int32
    and contiguous.
    """
    num_slots, top_k = top_k_index.numel(), top_k_index.shape[1]
    if num_experts > MAX_EXPERTS:
        raise ValueError(f"num_experts: the kernel takes at most {MAX_EXPERTS}, got {num_experts}")
    if num_slots > MAX_SLOTS:
        raise ValueError(f"top_k_index: the kernel takes {MAX_SLOTS} slots, got {num_slots}")
    configs = choose_configs(num_slots, num_experts, top_k_index.dtype)
    num_ctas = -(-num_slots // configs[0].num_slots)
    sizes = (num_experts, top_k, num_ctas)
    compiled = [get_compiled(config) for config in configs]
    if len(compiled) == 1:
        (whole,) = compiled

        def launch(index: Tensor, offs: Tensor, token_of_row: Tensor, row_of_slot: Tensor) -> None:
            whole(index.ravel(), None, offs, token_of_row, row_of_slot.ravel(), *sizes)

        return launch
    count, place = compiled
    num_pairs = configs[0].num_pairs

    def launch_two(index: Tensor, offs: Tensor, token_of_row: Tensor, row_of_slot: Tensor) -> None:
        slots = index.ravel()
        counts = index.new_empty(num_ctas, num_pairs, dtype=torch.int32)
        count(slots, counts, None, None, None, *sizes)
        place(slots, counts, offs, token_of_row, row_of_slot.ravel(), *sizes)

    return launch_two
