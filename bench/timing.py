"""One timer for every benchmark, and the two ceilings of a GPU."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

REPEATS, REPLAYS = 18, 9
WARM_UP_S = 0.03
"""A GPU that has idled runs a tenth slower for some milliseconds."""


def graph_time_us(calls: Sequence[Callable[[], object]]) -> float:
    """Median microseconds of a call, in CUDA-graph replays that cycle through ``calls``.

    Give calls on different data whose sum exceeds the L2 cache, or the cache is measured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(REPEATS):
            calls[index % len(calls)]()
    warm = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < warm:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / REPEATS)
    return sorted(times)[len(times) // 2]


@dataclass(frozen=True)
class Ceilings:
    """What this GPU does at best."""

    copy_tb_per_s: float
    read_tb_per_s: float
    matmul_tflop_per_s: float


def measure_ceilings() -> Ceilings:
    """Device copy (read + write), a reduction's read, and an 8192^3 bf16 product of random data."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    words, target_words = source.view(torch.int32), target.view(torch.int32)
    # By a kernel: a graph's memcpy node reaches two thirds of its speed.
    copy_us = graph_time_us([lambda: torch.neg(words, out=target_words)])
    read_us = graph_time_us([lambda: words.amax()])
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    matmul_us = graph_time_us([lambda: a @ b])
    return Ceilings(
        copy_tb_per_s=2 * source.numel() / copy_us / 1e6,
        read_tb_per_s=source.numel() / read_us / 1e6,
        matmul_tflop_per_s=2 * 8192**3 / matmul_us / 1e6,
    )
