"""bench.lowering on the CPU, with calls for times: what it compiles, checks and reports."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config

from bench import lowering as bench
from bench.moe_layers import Shape

TINY = Shape("tiny", 64, 32, 4, 2)


def call_once(calls: Sequence[Callable[[], Any]]) -> float:
    calls[-1]()
    return float(len(calls))


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled by Dynamo alone, timed by the number of calls."""
    compile_model = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, **kw: compile_model(*args, **kw, backend="aot_eager")
    )
    monkeypatch.setattr(bench, "graph_time_us", call_once)
    monkeypatch.setattr(bench, "ROTATED_BYTES", 1 << 16)
    monkeypatch.setattr(
        bench, "time_layer", lambda layer, routings: call_once([lambda: layer(*routings[-1])])
    )


def test_bench_lowering_runs_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ROWS", (3, 64))
    monkeypatch.setattr(bench, "COLUMNS", (32,))
    results = bench.run_rows("cpu")
    assert [(r.neighbour, r.rows, r.fused_us is None) for r in results] == [
        ("rms_norm", 3, True),
        ("rms_norm", 64, True),
        ("silu_mul", 3, False),
        ("silu_mul", 64, False),
    ]
    assert config.post_grad_custom_pre_pass is None
    assert "silu_mul + quantize_nvfp4 | 3x32 |" in bench.line(results[2])


def test_bench_lowering_runs_layers() -> None:
    results = bench.run_layers(TINY, (1, 5), "cpu")
    assert [(r.mode, r.tokens) for r in results] == [
        ("weight_only", 1),
        ("weight_only", 5),
        ("static", 1),
        ("static", 5),
    ]
    assert bench.line(results[0]).startswith("tiny weight_only | T=1 | ")


def test_bench_lowering_finds_a_wrong_layer() -> None:
    def wrong(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return x * 2

    routings = {2: bench.make_routings(TINY, 2, "cpu")}
    expected = {2: routings[2][0].x}
    with pytest.raises(AssertionError, match="wrong T=2: relative error 1"):
        bench.time_layers("wrong", wrong, bench.decomposed, routings, expected)


def test_bench_lowering_finds_wrong_codes() -> None:
    y, scale = torch.randn(16, 64).bfloat16(), torch.tensor(0.01)
    codes, sf = bench.nvfp4_ops.quantize_nvfp4(y, scale)
    bench.check_rows("right", (codes, sf), y, scale)
    with pytest.raises(AssertionError, match="wrong: 512 of 512 bytes differ"):
        bench.check_rows("wrong", (codes ^ 1, sf), y, scale)
