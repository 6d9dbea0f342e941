"""A decoder's experts block as eager code, compiled, exported, and as an AOTInductor package.

    python -m bench.export [--out DIR]

The block is a router, an NVFP4MoE and the sum with its input, of the size of Qwen3-30B-A3B's. Each
way to run it must give the bits of eager mode; then calls are timed back to back, GPU waited for at
the end of a batch: with few tokens that is the time of the host. Beside them the GPU's own time, of
eager calls in a CUDA graph.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.cpp_extension import CUDA_HOME

import nvfp4_ops
from bench.moe_layers import SHAPES, Mode, Shape, build_moe, random_routing
from bench.report import Report, parse_out
from bench.timing import graph_time_us

MODES: tuple[Mode, ...] = (None, "per_token")
TOKENS = (1, 8, 512)
EXAMPLE_TOKENS = 4
BATCHES = 9
# So few launches that the queue of a stream (about a thousand) never fills.
CALLS_PER_BATCH = 20


@dataclass(frozen=True)
class Result:
    """Microseconds of a call, each of which gave the bits of eager mode.

    package_us: None where the machine can not compile a package. graph_us: None without a GPU.
    """

    mode: str
    tokens: int
    eager_us: float
    compiled_us: float
    exported_us: float
    package_us: float | None
    graph_us: float | None


class Block(nn.Module):
    """x + experts(x) of the experts that the router chooses."""

    def __init__(self, shape: Shape, device: str) -> None:
        super().__init__()
        router = nvfp4_ops.SoftmaxRouter(shape.hidden, shape.num_experts, shape.top_k)
        self.router = router.to(device, torch.bfloat16)
        self.experts = build_moe(shape, device)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.experts(x, *self.router(x))


def make_ways(block: Block, x: Tensor, package: Path | None) -> dict[str, Callable[..., Tensor]]:
    """The block for any number of tokens, by each way; package: where to write one, or None."""
    torch._dynamo.reset()
    program = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    ways: dict[str, Callable[..., Tensor]] = {
        "eager": block,
        "compiled": torch.compile(block, fullgraph=True, dynamic=True),
        "exported": program.module(),
    }
    if package is not None:
        torch._inductor.aoti_compile_and_package(program, package_path=str(package))
        ways["package"] = torch._inductor.aoti_load_package(str(package))
    return ways


def call_time_us(call: Callable[[], object], synchronize: Callable[[], object]) -> float:
    """Median over batches of a call's time, in calls back to back."""
    call()
    times = []
    for _ in range(BATCHES):
        synchronize()
        start = time.perf_counter()
        for _ in range(CALLS_PER_BATCH):
            call()
        synchronize()
        times.append((time.perf_counter() - start) / CALLS_PER_BATCH * 1e6)
    return statistics.median(times)


def run_case(block: Block, ways: dict[str, Callable[..., Tensor]], x: Tensor) -> Result:
    """Raises AssertionError where a way's result differs from eager mode's in a bit."""
    expected = block(x)
    synchronize = torch.cuda.synchronize if x.is_cuda else lambda: None
    times: dict[str, float | None] = {"package_us": None, "graph_us": None}
    for name, way in ways.items():
        if not torch.equal(way(x), expected):
            raise AssertionError(f"{name}: another result than eager mode for {x.shape[0]} tokens")
        times[f"{name}_us"] = round(call_time_us(lambda way=way: way(x), synchronize), 1)
    if x.is_cuda:
        times["graph_us"] = round(graph_time_us([lambda: block(x)]), 1)
    return Result(block.experts.activation_scale or "weight-only", x.shape[0], **times)


@torch.no_grad()
def main() -> None:
    out = parse_out(__doc__.splitlines()[0])
    if not torch.cuda.is_available():
        sys.exit("export: needs a CUDA GPU, whose kernels the host launches")
    shape = SHAPES[0]
    report = Report(
        "export",
        {
            "shape": shape.name,
            "package": "measured" if CUDA_HOME else "not measured: no CUDA toolkit to compile it",
        },
        "mode | tokens | us: eager | torch.compile | exported | package | of it on the GPU",
    )
    block = Block(shape, "cuda")
    for mode in MODES:
        block.experts.activation_scale = mode
        with tempfile.TemporaryDirectory() as directory:
            example = random_routing(shape, EXAMPLE_TOKENS, 0, "cuda").x
            package = Path(directory) / "block.pt2" if CUDA_HOME else None
            ways = make_ways(block, example, package)
            for tokens in TOKENS:
                r = run_case(block, ways, random_routing(shape, tokens, 1, "cuda").x)
                report.add(
                    r,
                    f"{r.mode} | {r.tokens} | {r.eager_us} | {r.compiled_us} | {r.exported_us} "
                    f"| {r.package_us} | {r.graph_us}",
                )
    report.write(out)


if __name__ == "__main__":
    main()
