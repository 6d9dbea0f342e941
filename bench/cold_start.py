"""From `import torch` to the first finished layer: seconds of a new process, cache cold or warm.

    python -m bench.cold_start [--out DIR]

Each run is a process of its own with a cache directory of its own, empty at first ("cold"), then as
the first run left it ("warm"). The GPU's context is made first and reported apart: it costs any
program the same.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.report import Report, parse_out

MODES = (None, "per_token")
TOKENS, TOP_K, EXPERTS, HIDDEN, INTERMEDIATE = 8, 4, 16, 1024, 512
WARM_RUNS = 3
TARGET_S = {"cold": 15.0, "warm": 1.0}

# Prints seconds as JSON. What is timed: importing nvfp4_ops, moving (prepacking) a layer, and its
# first result; for comparison its second, and what of all this is importing the DSL.
CHILD = """
import json, sys, time
import torch
device, mode, tokens, top_k, experts, hidden, intermediate = json.loads(sys.argv[1])
wait = torch.cuda.synchronize if device == "cuda" else lambda: None
marks, start = {}, time.perf_counter()
def mark(name):
    global start
    wait()
    now = time.perf_counter()
    marks[name], start = now - start, now
x = torch.ones(tokens, hidden, dtype=torch.bfloat16, device=device)
index = torch.arange(tokens * top_k, device=device).view(tokens, top_k) % experts
weights = torch.ones(tokens, top_k, device=device)
mark("context")
import nvfp4_ops
mark("import")
moe = nvfp4_ops.NVFP4MoE(hidden, intermediate, experts, activation_scale=mode).to(device)
mark("layer")
with torch.no_grad():
    moe(x, index, weights)
    mark("first_call")
    moe(x, index, weights)
    mark("second_call")
from nvfp4_ops.kernels import compile_cache
marks["kernels"] = compile_cache.info().num_in_memory
print(json.dumps(marks))
"""


@dataclass(frozen=True)
class Result:
    """Seconds; ``seconds`` is import, layer and first call together."""

    cache: str
    mode: str
    seconds: float
    context_s: float
    import_s: float
    layer_s: float
    first_call_s: float
    second_call_s: float
    kernels: int


def run_child(directory: Path, mode: str | None, device: str) -> dict[str, float]:
    """Seconds of each stage, in a new process whose kernels come from and go to ``directory``."""
    arguments = [device, mode, TOKENS, TOP_K, EXPERTS, HIDDEN, INTERMEDIATE]
    # What makes the DSL keep or find things elsewhere would warm up a cold run.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CUTE_DSL_")}
    run = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(arguments)],
        env=environment | {"NVFP4_OPS_CACHE_DIR": str(directory), "NVFP4_OPS_CACHE": "1"},
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise RuntimeError(f"the timed process failed:\n{run.stderr}")
    marks: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return marks


def make_result(cache: str, mode: str | None, runs: list[dict[str, float]]) -> Result:
    """Median of each stage."""
    stages = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    kernels = int(stages.pop("kernels"))
    seconds = {f"{name}_s": round(value, 4) for name, value in stages.items()}
    total = sum(stages[name] for name in ("import", "layer", "first_call"))
    return Result(cache, mode or "weight-only", round(total, 3), kernels=kernels, **seconds)


def main() -> None:
    out = parse_out(__doc__.splitlines()[0])
    if not torch.cuda.is_available():
        sys.exit("cold_start: needs a CUDA GPU, whose kernels are compiled and loaded")
    report = Report(
        "cold_start",
        {"python": sys.version.split()[0], "target_s": TARGET_S},
        "cache | mode | s | of it: import, layer, first call | besides: context, second call"
        " | kernels",
    )
    for mode in MODES:
        with tempfile.TemporaryDirectory() as directory:
            for cache, num_runs in (("cold", 1), ("warm", WARM_RUNS)):
                runs = [run_child(Path(directory), mode, "cuda") for _ in range(num_runs)]
                r = make_result(cache, mode, runs)
                report.add(
                    r,
                    f"{r.cache} | {r.mode} | {r.seconds} | {r.import_s} {r.layer_s} "
                    f"{r.first_call_s} | {r.context_s} {r.second_call_s} | {r.kernels}",
                )
    report.write(out)


if __name__ == "__main__":
    main()
