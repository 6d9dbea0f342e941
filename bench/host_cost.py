"""What a call costs the host: microseconds of an eager op, and of an eager NVFP4MoE layer.

    python -m bench.host_cost [--out DIR]

The GPU has little to do and is not waited for inside the timed loop, so that only the host's own
work is timed: look-up, allocation, launch. Median of batches of calls. The last column is what a
call of a new kind costs, which nothing is known of yet: checks and the choice of a kernel besides.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

import nvfp4_ops
from bench.report import Report, parse_out
from nvfp4_ops import NVFP4MoE, plans

TOKENS, TOP_K, EXPERTS, HIDDEN, INTERMEDIATE = 4, 2, 8, 256, 256
BATCHES = 25
# So few that the launch queue of a stream (about a thousand) never fills: then the host waits.
LAUNCHES_PER_BATCH = 400
LAUNCHES_PER_LAYER = 20
OP_TARGET_US, LAYER_TARGET_US = 10.0, 60.0


@dataclass(frozen=True)
class Result:
    """Microseconds of a call as written, inside ``torch.inference_mode``, and without plans."""

    call: str
    time_us: float
    inference_mode_us: float
    target_us: float
    unplanned_us: float


def host_time_us(
    call: Callable[[], object], calls_per_batch: int, synchronize: Callable[[], object]
) -> float:
    """Median over batches of the host's time for a call; the GPU is idle when a batch starts."""
    call()
    times = []
    for _ in range(BATCHES):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls_per_batch):
            call()
        times.append((time.perf_counter() - start) / calls_per_batch * 1e6)
    synchronize()
    return statistics.median(times)


def make_calls(device: str) -> dict[str, Callable[[], object]]:
    """A call of each op, as a decoding layer makes it."""
    x = torch.randn(TOKENS, HIDDEN, device=device).bfloat16()
    logits = torch.randn(TOKENS, EXPERTS, device=device)
    bias = torch.zeros(EXPERTS, device=device)
    router = torch.randn(EXPERTS, HIDDEN, device=device)
    index, weights = nvfp4_ops.softmax_top_k(logits, TOP_K)
    offs, token_of_row, row_of_slot = nvfp4_ops.sort_by_expert(index, EXPERTS)
    rows = nvfp4_ops.permute(x, token_of_row)
    scale = nvfp4_ops.global_scale(x)
    row_scale = nvfp4_ops.global_scale(rows, per_token=True)
    codes, sf = nvfp4_ops.quantize_nvfp4(rows, row_scale)
    swizzled = nvfp4_ops.swizzle_sf(sf)
    w = nvfp4_ops.quantize_weight(
        torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, device=device) * 0.1
    )
    packed = nvfp4_ops.prepack_weight(w.codes, w.block_scale, gated=True)
    alpha = w.global_scale.unsqueeze(1).expand(-1, 2).contiguous()
    mm = {"activation": "silu_mul", "num_columns": 2 * INTERMEDIATE}
    return {
        "global_scale per_token": lambda: nvfp4_ops.global_scale(rows, per_token=True),
        "quantize_nvfp4": lambda: nvfp4_ops.quantize_nvfp4(rows, row_scale),
        "round_nvfp4": lambda: nvfp4_ops.round_nvfp4(x, scale, token_of_row=token_of_row),
        "round_per_token_nvfp4": lambda: nvfp4_ops.round_per_token_nvfp4(rows, offs),
        "dequantize_nvfp4": lambda: nvfp4_ops.dequantize_nvfp4(codes, sf, row_scale),
        "swizzle_sf": lambda: nvfp4_ops.swizzle_sf(sf),
        "unswizzle_sf": lambda: nvfp4_ops.unswizzle_sf(swizzled, tuple(sf.shape)),
        "grouped_scaled_mm bf16": lambda: nvfp4_ops.grouped_scaled_mm(
            rows, packed, None, None, alpha, offs, **mm
        ),
        "grouped_scaled_mm nvfp4": lambda: nvfp4_ops.grouped_scaled_mm(
            codes, packed, sf, None, alpha, offs, row_scale=row_scale, **mm
        ),
        "prepack_weight": lambda: nvfp4_ops.prepack_weight(w.codes, w.block_scale, gated=True),
        "router_logits": lambda: nvfp4_ops.router_logits(x, router),
        "softmax_top_k": lambda: nvfp4_ops.softmax_top_k(logits, TOP_K),
        "sigmoid_top_k": lambda: nvfp4_ops.sigmoid_top_k(logits, bias, TOP_K),
        "sort_by_expert": lambda: nvfp4_ops.sort_by_expert(index, EXPERTS),
        "permute": lambda: nvfp4_ops.permute(x, token_of_row),
        "combine": lambda: nvfp4_ops.combine(rows, row_of_slot, weights),
    }


def make_layers(device: str) -> dict[str, Callable[[], object]]:
    """An eager call of a layer in each mode that needs no calibration."""
    gate_up = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, device=device) * 0.1
    down = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, device=device) * 0.1
    x = torch.randn(TOKENS, HIDDEN, device=device).bfloat16()
    index, weights = nvfp4_ops.softmax_top_k(torch.randn(TOKENS, EXPERTS, device=device), TOP_K)
    layers = {}
    for mode in (None, "per_token", "per_tensor"):
        moe = NVFP4MoE.from_float(gate_up, down, activation_scale=mode)
        layers[f"NVFP4MoE {mode or 'weight-only'}"] = lambda moe=moe: moe(x, index, weights)
    return layers


def measure(
    call: Callable[[], object], calls_per_batch: int, synchronize: Callable[[], object]
) -> tuple[float, float, float]:
    """As written, in inference mode, and without plans."""
    plain = host_time_us(call, calls_per_batch, synchronize)
    with torch.inference_mode():
        inference = host_time_us(call, calls_per_batch, synchronize)
    with plans.suspended():
        return plain, inference, host_time_us(call, calls_per_batch, synchronize)


def main() -> None:
    out = parse_out(__doc__.splitlines()[0])
    if not torch.cuda.is_available():
        sys.exit("host_cost: needs a CUDA GPU, whose kernels the host launches")
    report = Report(
        "host_cost",
        {"tokens": TOKENS, "experts": EXPERTS, "hidden": HIDDEN},
        "call | us | us in inference mode | target us | us without plans",
    )
    calls = make_calls("cuda")
    for target, launches, group in (
        (OP_TARGET_US, 1, calls),
        (LAYER_TARGET_US, LAUNCHES_PER_LAYER, make_layers("cuda")),
    ):
        for name, call in group.items():
            times = measure(call, LAUNCHES_PER_BATCH // launches, torch.cuda.synchronize)
            plain, inference, unplanned = (round(us, 2) for us in times)
            report.add(
                Result(name, plain, inference, target, unplanned),
                f"{name} | {plain} | {inference} | {target} | {unplanned}",
            )
    report.write(out)


if __name__ == "__main__":
    main()
