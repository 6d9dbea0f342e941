"""inspect_checkpoint: what is in a checkpoint's experts, and what would be refused, and why."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nvfp4_ops import format as nvfp4
from nvfp4_ops.checkpoint.checkpoint import Checkpoint, open_checkpoint
from nvfp4_ops.checkpoint.index import CheckpointError
from nvfp4_ops.checkpoint.linear import LinearTensors
from nvfp4_ops.checkpoint.progress import track
from nvfp4_ops.checkpoint.scheme import Scheme

Range = tuple[float, float]
_E4M3_MAX_BYTE = nvfp4.E4M3_NAN_BYTE - 1


@dataclass(frozen=True)
class ExpertsReport:
    """The experts of one layer.

    global_scales, input_scales: smallest and largest, decode.
    num_mismatched: experts whose gate and up projections have different global scales, and
        max_mismatch: the largest ratio of the two. Exact here; other engines take one for both.
    saturated: share of block scales at 448, the largest. A few in ten thousand are normal; many
        say that the global scale is too small and large weights are clipped.
    problems: why ``load_experts`` would refuse them.
    """

    prefix: str
    scheme: Scheme | None = None
    num_experts: int = 0
    hidden_size: int = 0
    intermediate_size: int = 0
    global_scales: Range | None = None
    input_scales: Range | None = None
    num_mismatched: int = 0
    max_mismatch: float = 1.0
    saturated: float = 0.0
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckpointReport:
    """All experts, the number of other linear layers of each scheme, and what is wrong."""

    directory: str
    producer: str | None = None
    experts: tuple[ExpertsReport, ...] = ()
    linear_layers: dict[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def all_problems(self) -> Sequence[str]:
        return [*self.problems, *(p for experts in self.experts for p in experts.problems)]


def inspect_checkpoint(directory: str | Path, *, progress: bool = False) -> CheckpointReport:
    """Read every quantized tensor of the experts once and report on it; refuses nothing.

    directory: of the checkpoint, quantized or not. progress: show a bar (needs tqdm).
    """
    try:
        checkpoint = open_checkpoint(directory)
    except CheckpointError as error:
        return CheckpointReport(str(directory), problems=(str(error),))
    prefixes = checkpoint.expert_prefixes()
    reports = [_inspect(checkpoint, prefix) for prefix in track(prefixes, progress, "inspect")]
    layers, problems = _other_layers(checkpoint, prefixes)
    if not reports:
        problems.append(f"{directory}: has no experts")
    producer = type(checkpoint.producer).__name__
    return CheckpointReport(str(directory), producer, tuple(reports), layers, tuple(problems))


def _inspect(checkpoint: Checkpoint, prefix: str) -> ExpertsReport:
    try:
        scheme = checkpoint.scheme(prefix)
        if scheme is None:
            return ExpertsReport(prefix)
        experts = checkpoint.experts(prefix)
    except CheckpointError as error:
        return ExpertsReport(prefix, problems=(str(error),))
    read: list[tuple[LinearTensors, ...]] = []
    problems = []
    num_saturated = num_blocks = 0
    for expert in range(experts.num_experts):
        try:
            segments = experts.read(expert)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for segment in segments:
            sf_bytes = segment.block_scale.view(torch.uint8)
            num_saturated += int((sf_bytes == _E4M3_MAX_BYTE).sum())
            num_blocks += sf_bytes.numel()
        # Only the scalars are kept.
        empty = segments[0].codes.new_empty(0)
        read.append(tuple(s._replace(codes=empty, block_scale=empty, bias=None) for s in segments))
    ratios = [_ratio(s[0].global_scale, s[1].global_scale) for s in read if experts.gated]
    return ExpertsReport(
        prefix,
        scheme,
        experts.num_experts,
        experts.hidden_size,
        experts.intermediate_size,
        _range([s.global_scale for segments in read for s in segments]),
        _range([s.input_scale for segments in read for s in segments]),
        sum(ratio != 1 for ratio in ratios),
        max(ratios, default=1.0),
        num_saturated / max(num_blocks, 1),
        tuple(problems),
    )


def _other_layers(
    checkpoint: Checkpoint, prefixes: Sequence[str]
) -> tuple[dict[str, int], list[str]]:
    """How many quantized linear layers of each scheme there are besides the experts."""
    packed = f".{checkpoint.producer.packed_name}"
    in_experts = tuple(f"{prefix}." for prefix in prefixes)
    counts: Counter[str] = Counter()
    problems = []
    for name in checkpoint.names():
        if name.endswith(packed) and not name.startswith(in_experts):
            try:
                scheme = checkpoint.scheme(name.removesuffix(packed))
            except CheckpointError as error:
                problems.append(str(error))
                continue
            if scheme is not None:
                counts[scheme] += 1
    return dict(counts), problems


def _ratio(a: Tensor, b: Tensor) -> float:
    return float(torch.maximum(a, b) / torch.minimum(a, b))


def _range(scales: Sequence[Tensor | None]) -> Range | None:
    values = [float(scale) for scale in scales if scale is not None]
    return (min(values), max(values)) if values else None
