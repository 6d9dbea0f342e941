"""Fill an NVFP4MoE with stored experts, a few at a time."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from threading import Lock, local
from typing import TypeVar

import torch
from torch import Tensor

from nvfp4_ops import format as nvfp4
from nvfp4_ops.checkpoint.experts import Experts
from nvfp4_ops.checkpoint.linear import LinearTensors
from nvfp4_ops.moe import NVFP4MoE
from nvfp4_ops.projection import ExpertProjection

Module = TypeVar("Module", bound=NVFP4MoE)

# Experts are read by the first page fault of a copy. Several at once keep a disk busy: from a cold
# one 2 to 4 times as fast as one by one.
_NUM_READERS = 4

# A GPU is given this share of a layer at a time: few launches and large transfers, and beside the
# result room for twice as much, what has arrived and what is prepacked of it.
_CHUNKS_PER_LAYER = 32


@dataclass(frozen=True)
class _Room:
    """Memory of the host for the canonical weights of a few experts of one projection.

    codes (e, N, K/2), sf_bytes (e, N, K/16) uint8.
    """

    codes: Tensor
    sf_bytes: Tensor

    @classmethod
    def staging(cls, projection: ExpertProjection, num_experts: int, *, pinned: bool) -> "_Room":
        def empty(num_bytes: int) -> Tensor:
            shape = (num_experts, projection.num_rows, num_bytes)
            return torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=pinned)

        columns = projection.num_columns
        return cls(empty(nvfp4.packed_size(columns)), empty(nvfp4.num_blocks(columns)))

    @classmethod
    def own(cls, projection: ExpertProjection, experts: slice) -> "_Room":
        """The projection's own memory."""
        assert projection.weight_scale is not None
        sf_bytes = projection.weight_scale.view(torch.uint8)
        return cls(projection.weight[experts], sf_bytes[experts])

    def write(self, position: int, segments: Sequence[LinearTensors]) -> None:
        start = 0
        for segment in segments:
            rows = slice(start, start + segment.codes.shape[0])
            self.codes[position, rows].copy_(segment.codes)
            self.sf_bytes[position, rows].copy_(segment.block_scale.view(torch.uint8))
            start = rows.stop

    def first(self, num_experts: int) -> tuple[Tensor, Tensor]:
        return self.codes[:num_experts], self.sf_bytes[:num_experts]


class _Filler:
    """Reads chunks of experts in threads and writes them to their place in ``moe``.

    On the CPU that is where they are read to. Otherwise they are read to memory from which a GPU
    copies at full speed, a room for each thread, and arrive and are prepacked one chunk at a time.
    """

    def __init__(self, moe: NVFP4MoE, experts: Experts, target: torch.device) -> None:
        self.experts, self.target = experts, target
        self.projections = tuple(moe.projections().values())
        self.direct = target.type == "cpu" and not moe.down_proj.prepacked
        self.chunk_size = max(1, experts.num_experts // _CHUNKS_PER_LAYER)
        self.arriving = Lock()
        self.of_thread = local()
        # Threads do not inherit these, and what inference mode has allocated can be written in it
        # alone.
        self.inference_mode = torch.is_inference_mode_enabled()
        on_gpu = target.type == "cuda"
        self.stream = torch.cuda.current_stream(target) if on_gpu else None

    def rooms(self, chunk: slice) -> Sequence[_Room]:
        if self.direct:
            return [_Room.own(projection, chunk) for projection in self.projections]
        if not hasattr(self.of_thread, "rooms"):
            pinned = self.target.type == "cuda"
            self.of_thread.rooms = [
                _Room.staging(projection, self.chunk_size, pinned=pinned)
                for projection in self.projections
            ]
        rooms: Sequence[_Room] = self.of_thread.rooms
        return rooms

    def copy(self, start: int) -> list[list[float]]:
        """Copy the chunk that begins with expert ``start``; returns its input scales."""
        with torch.inference_mode(self.inference_mode), torch.cuda.stream(self.stream):
            stop = min(start + self.chunk_size, self.experts.num_experts)
            chunk = slice(start, stop)
            rooms = self.rooms(chunk)
            read = []
            for position, expert in enumerate(range(start, stop)):
                *to_hidden, down = self.experts.read(expert)
                for room, segments in zip(rooms, (to_hidden, [down]), strict=True):
                    room.write(position, segments)
                read.append((to_hidden, [down]))
            with nullcontext() if self.direct else self.arriving:
                for projection, room, stored in zip(
                    self.projections, rooms, zip(*read, strict=True), strict=True
                ):
                    self._arrive(projection, chunk, room, stored)
        return [
            [float(s.input_scale) for part in parts for s in part if s.input_scale is not None]
            for parts in read
        ]

    def _arrive(
        self,
        projection: ExpertProjection,
        chunk: slice,
        room: _Room,
        stored: Sequence[Sequence[LinearTensors]],
    ) -> None:
        global_scale = torch.stack([torch.stack([s.global_scale for s in e]) for e in stored])
        bias = None
        if projection.bias is not None:
            bias = torch.stack(
                [torch.cat([s.bias for s in e if s.bias is not None]) for e in stored]
            )
        if self.direct:
            projection.copy_small(chunk, global_scale, bias)
        else:
            projection.copy_experts(chunk, *room.first(len(stored)), global_scale, bias)


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
    filler = _Filler(moe, experts, target)
    pool = ThreadPoolExecutor(_NUM_READERS)
    try:
        starts = range(0, experts.num_experts, filler.chunk_size)
        chunks = list(pool.map(filler.copy, starts))
    finally:
        pool.shutdown(cancel_futures=True)
    if experts.has_input_scale:
        scales_ES = torch.tensor(list(chain(*chunks)), dtype=torch.float32, device="cpu")
        moe.first_proj.set_input_scale(scales_ES[:, :-1].squeeze(1))
        moe.down_proj.set_input_scale(scales_ES[:, -1])
