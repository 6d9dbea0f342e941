"""The benchmarks of host time, on the CPU: what they time, and that their calls are right."""

import time
from pathlib import Path

import pytest

from bench import cold_start, host_cost


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for bench in (host_cost, cold_start):
        for name, size in (("EXPERTS", 4), ("HIDDEN", 64), ("INTERMEDIATE", 32)):
            monkeypatch.setattr(bench, name, size)


def test_host_time_is_that_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_cost, "BATCHES", 3)
    waits = []

    def synchronize() -> None:
        waits.append(1)
        time.sleep(0.01)

    us = host_cost.host_time_us(lambda: time.sleep(0.002), 5, synchronize)
    assert 2000 <= us < 9000  # the wait of 10 ms is not in it
    assert len(waits) == 4


def test_host_cost_calls_every_op_of_a_layer() -> None:
    calls = host_cost.make_calls("cpu") | host_cost.make_layers("cpu")
    timed = {name.split()[0] for name in calls}
    assert {"grouped_scaled_mm", "quantize_nvfp4", "sort_by_expert", "NVFP4MoE"} <= timed
    for call in calls.values():
        call()


def test_cold_start_times_a_new_process(tmp_path: Path) -> None:
    marks = cold_start.run_child(tmp_path, "per_token", "cpu")
    result = cold_start.make_result("cold", "per_token", [marks])
    assert result.seconds == pytest.approx(
        marks["import"] + marks["layer"] + marks["first_call"], abs=1e-3
    )
    assert 0 < result.second_call_s < result.seconds
    assert result.kernels == 0  # the CPU has none


def test_cold_start_reports_medians() -> None:
    runs = [
        {
            "context": 9.0,
            "import": s,
            "layer": 1.0,
            "first_call": 2.0,
            "second_call": 0.5,
            "kernels": 3,
        }
        for s in (1.0, 5.0, 2.0)
    ]
    result = cold_start.make_result("warm", None, runs)
    assert (result.mode, result.import_s, result.seconds, result.kernels) == (
        "weight-only",
        2.0,
        5.0,
        3,
    )


def test_cold_start_shows_why_the_process_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold_start, "CHILD", "raise SystemExit('made to fail')")
    with pytest.raises(RuntimeError, match="made to fail"):
        cold_start.run_child(tmp_path, None, "cpu")
