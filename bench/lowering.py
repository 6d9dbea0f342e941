"""What the pass of torch.compile gains: quantize beside its neighbours, and experts of public ops.

    python -m bench.lowering [--out DIR]

Rows: RMSNorm or silu * up, compiled, then quantize_nvfp4: by the kernel of the op; decomposed, so
that Inductor fuses both; and, for silu * up, by the one kernel of activate_and_quantize_nvfp4.

Layers: examples/public_ops_moe.py, compiled without the pass and with it, beside NVFP4MoE. Its
gate_up weights are prepacked as a matrix ("plain"), or for a gated activation ("gated"), which
only the pass makes use of.

Every result is checked before it is timed. Times are medians of CUDA-graph replays over inputs
that exceed the L2 cache.
"""

import contextlib
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nvfp4_ops
from bench.moe import make_routings, time_layer
from bench.moe_layers import SHAPES, Mode, Routing, Shape, build_moe, relative_error
from bench.report import Report, parse_out
from bench.timing import graph_time_us
from nvfp4_ops import NVFP4MoE, kernels, reference
from nvfp4_ops.lowering import inductor

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from public_ops_moe import Projection, PublicOpsMoE

ROWS, COLUMNS = (256, 2048, 16384), (4096, 7168)
LAYERS = ("qwen3-30b-a3b", "dsv4-flash")
TOKENS = (1, 32, 512, 4096)
MODES: tuple[Mode, ...] = (None, "static")
SCALE = 0.0013
ROTATED_BYTES = 256 << 20
# Sums in another order, or fewer roundings, move a value across a tie now and then.
MAX_DIFFERENT_BYTES = 2e-3
MAX_LAYER_ERROR = 0.05

Context = Callable[[], contextlib.AbstractContextManager[Any]]


def rms_norm(x: Tensor) -> Tensor:
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + 1e-6)
    return normed.to(x.dtype)


def silu_mul(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return (nn.functional.silu(gate) * up).to(x.dtype)


@dataclass(frozen=True)
class Neighbour:
    """What comes before quantize_nvfp4; width: columns that it reads for each that it writes."""

    name: str
    function: Callable[[Tensor], Tensor]
    width: int

    def quantized(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return nvfp4_ops.quantize_nvfp4(self.function(x), scale)


NEIGHBOURS = (Neighbour("rms_norm", rms_norm, 1), Neighbour("silu_mul", silu_mul, 2))


@dataclass(frozen=True)
class RowsResult:
    """Microseconds of each way; fused is None where there is no such op."""

    neighbour: str
    rows: int
    columns: int
    op_us: float
    decomposed_us: float
    fused_us: float | None


@dataclass(frozen=True)
class LayerResult:
    """Microseconds of a layer: of public ops in three ways, and NVFP4MoE."""

    shape: str
    mode: str
    tokens: int
    unfused_us: float
    plain_us: float
    gated_us: float
    moe_us: float


def decomposed() -> contextlib.AbstractContextManager[Any]:
    return inductor.enabled(patterns=False, decompose=True)


def check_rows(name: str, actual: Sequence[Tensor], y: Tensor, scale: Tensor) -> None:
    """Raises unless nearly all bytes are those of the rounded neighbour's."""
    for got, want in zip(actual, reference.quantize_nvfp4(y, scale), strict=True):
        differ = got.view(torch.uint8) != want.view(torch.uint8)
        if differ.sum() > MAX_DIFFERENT_BYTES * differ.numel():
            raise AssertionError(f"{name}: {int(differ.sum())} of {differ.numel()} bytes differ")


@torch.no_grad()
def time_rows(
    call: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    neighbour: Neighbour,
    columns: int,
    device: str,
    context: Context = contextlib.nullcontext,
) -> list[float]:
    """Of each number of rows; context: of the first call, which compiles what is to be compiled."""
    scale = torch.tensor(SCALE, device=device)
    times = []
    for num_rows in ROWS:
        width = neighbour.width * columns
        sets = max(2, ROTATED_BYTES // (2 * num_rows * width))
        inputs = [torch.randn(num_rows, width, device=device).bfloat16() for _ in range(sets)]
        torch._dynamo.mark_dynamic(inputs[0], 0)
        with context():
            actual = call(inputs[0], scale)
        check_rows(neighbour.name, actual, neighbour.function(inputs[0]), scale)
        times.append(graph_time_us([lambda x=x: call(x, scale) for x in inputs]))
    return times


def compiled(neighbour: Neighbour) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Anew, and once for all numbers of rows."""
    torch._dynamo.reset()
    return torch.compile(neighbour.quantized, fullgraph=True)


def fused(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return nvfp4_ops.activate_and_quantize_nvfp4(x, scale, activation="silu_mul")


def run_rows(device: str) -> list[RowsResult]:
    results = []
    for neighbour in NEIGHBOURS:
        for columns in COLUMNS:
            size = (neighbour, columns, device)
            by_op = time_rows(compiled(neighbour), *size)
            by_inductor = time_rows(compiled(neighbour), *size, decomposed)
            has_op = neighbour.width == 2
            by_fused_op = time_rows(fused, *size) if has_op else [None] * len(ROWS)
            results += [
                RowsResult(neighbour.name, *figures)
                for figures in zip(
                    ROWS, [columns] * len(ROWS), by_op, by_inductor, by_fused_op, strict=True
                )
            ]
    return results


def public_layer(moe: NVFP4MoE, mode: Mode, *, gated: bool) -> PublicOpsMoE:
    """The experts of ``moe`` in public ops; their weights are shared, but for plain gate_up's."""
    projections = []
    for projection in moe.projections().values():
        weight, sf = projection.weight, projection.weight_scale
        if weight.ndim == kernels.GATED_RANK and not gated:
            weight = nvfp4_ops.prepack_weight(*projection.canonical())
        made = Projection(
            weight,
            sf,
            projection.weight_scale_2,
            num_columns=projection.num_rows if projection.prepacked else None,
        )
        if mode == "static":
            made.input_scale, made.alpha = projection.static_scale, projection.static_alpha
        projections.append(made)
    return PublicOpsMoE(*projections)


@torch.no_grad()
def time_layers(
    name: str,
    layer: nn.Module,
    context: Context,
    routings: dict[int, list[Routing]],
    expected: dict[int, Tensor],
) -> list[float]:
    """Compiled here: graphs are shared by the modules of a class, so earlier ones are dropped."""
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    times = []
    for tokens, batches in routings.items():
        with context():
            actual = compiled(*batches[0])
        error = relative_error(actual, expected[tokens].float())
        if not error <= MAX_LAYER_ERROR:
            raise AssertionError(f"{name} T={tokens}: relative error {error:.2e}")
        times.append(time_layer(compiled, batches))
    return times


@torch.no_grad()
def run_layers(shape: Shape, tokens: Sequence[int], device: str) -> list[LayerResult]:
    moe = build_moe(shape, device)
    routings = {count: make_routings(shape, count, device) for count in tokens}
    results = []
    for mode in MODES:
        moe.activation_scale = mode
        expected = {count: moe(*batches[0]) for count, batches in routings.items()}
        plain, gated = (public_layer(moe, mode, gated=gated) for gated in (False, True))
        ways: list[tuple[str, nn.Module, Context]] = [
            ("unfused", plain, contextlib.nullcontext),
            ("plain", plain, inductor.enabled),
            ("gated", gated, inductor.enabled),
            ("NVFP4MoE", moe, contextlib.nullcontext),
        ]
        times = [time_layers(*way, routings, expected) for way in ways]
        results += [
            LayerResult(shape.name, mode or "weight_only", *figures)
            for figures in zip(tokens, *times, strict=True)
        ]
    return results


def line(result: RowsResult | LayerResult) -> str:
    if isinstance(result, RowsResult):
        fused = "" if result.fused_us is None else f"{result.fused_us:.1f}"
        return (
            f"{result.neighbour} + quantize_nvfp4 | {result.rows}x{result.columns} "
            f"| {result.op_us:.1f} | {result.decomposed_us:.1f} | {fused} "
            f"| {result.op_us / result.decomposed_us:.2f}"
        )
    times = (result.unfused_us, result.plain_us, result.gated_us, result.moe_us)
    return (
        f"{result.shape} {result.mode} | T={result.tokens} | "
        + " | ".join(f"{time:.1f}" for time in times)
        + f" | {result.gated_us / result.moe_us:.3f}"
    )


def main() -> None:
    out = parse_out(__doc__.splitlines()[0])
    if not torch.cuda.is_available():
        sys.exit("lowering: needs a CUDA GPU, whose kernels it times")
    report = Report(
        "lowering",
        {},
        "rows: case | rows x columns | op us | decomposed us | fused op us | op / decomposed\n"
        "layers: layer | tokens | unfused us | plain us | gated us | NVFP4MoE us "
        "| gated / NVFP4MoE",
    )
    for result in run_rows("cuda"):
        report.add(result, line(result))
    for shape in SHAPES:
        if shape.name in LAYERS:
            for layer in run_layers(shape, TOKENS, "cuda"):
                report.add(layer, line(layer))
            gc.collect()
            torch.cuda.empty_cache()
    report.write(out)


if __name__ == "__main__":
    sys.exit(main())
