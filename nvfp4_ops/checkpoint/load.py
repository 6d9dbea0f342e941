"""Fill an NVFP4MoE with stored experts, one after the other."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Lock
from typing import TypeVar

import torch
from torch import Tensor

from nvfp4_ops.checkpoint.experts import Experts
from nvfp4_ops.checkpoint.linear import LinearTensors
from nvfp4_ops.moe import NVFP4MoE

Module = TypeVar("Module", bound=NVFP4MoE)

# Experts are read by the first page fault of a copy. Several at once keep a disk busy: from a cold
# one 2 to 4 times as fast as one by one.
_NUM_READERS = 4


def fill(moe: NVFP4MoE, experts: Experts, device: torch.device | str | None) -> None:
    """Give a module that is on meta room on ``device`` and write the experts there.

    Each goes straight to its place in the layout of the device: beside the result there is room
    for the few experts being read, and no second copy.

    Raises:
        CheckpointError: of the first expert that can not be read.
    """
    target = torch.device(torch.get_default_device() if device is None else device)
    for projection in moe.projections().values():
        projection.allocate(target)
    # Prepacking takes several times the memory of an expert: one at a time.
    prepacking = Lock() if moe.down_proj.prepacked else nullcontext()

    # Threads do not inherit it, and what it has allocated can be written in it alone.
    inference_mode = torch.is_inference_mode_enabled()

    def copy(expert: int) -> list[Tensor]:
        stored = experts.read(expert)
        *to_hidden, down = (segment.to(target) for segment in stored)
        with torch.inference_mode(inference_mode), prepacking:
            moe.first_proj.copy_expert(expert, [s.weight for s in to_hidden], _bias(to_hidden))
            moe.down_proj.copy_expert(expert, [down.weight], down.bias)
        return [s.input_scale for s in stored if s.input_scale is not None]

    pool = ThreadPoolExecutor(_NUM_READERS)
    try:
        input_scales = list(pool.map(copy, range(experts.num_experts)))
    finally:
        pool.shutdown(cancel_futures=True)
    if experts.has_input_scale:
        scales_ES = torch.tensor(input_scales, dtype=torch.float32, device="cpu")
        moe.first_proj.set_input_scale(scales_ES[:, :-1].squeeze(1))
        moe.down_proj.set_input_scale(scales_ES[:, -1])


def _bias(segments: Sequence[LinearTensors]) -> Tensor | None:
    biases = [segment.bias for segment in segments if segment.bias is not None]
    return torch.cat(biases) if biases else None
