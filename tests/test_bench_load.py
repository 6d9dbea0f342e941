"""The benchmark of loading, on the CPU: what it writes, reads, checks and measures."""

from pathlib import Path

import pytest
import torch

from bench import load_checkpoint as bench
from bench.report import Report

pytest.importorskip("transformers")
SIZE = bench.Size(
    layers=3,
    hidden=64,
    intermediate=32,
    num_experts=5,
    top_k=2,
    heads=2,
    kv_heads=1,
    head_dim=32,
    vocabulary=64,
    layers_per_file=2,
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "POOL_BYTES", 1 << 16)
    monkeypatch.setattr(bench, "BUFFER_BYTES", 1 << 12)


def test_load_bench_measures_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("load_checkpoint", {}, "columns")
    bench.run(tmp_path, SIZE, "cpu", report)
    assert [file.name for file in bench.checkpoint_files(tmp_path)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    *timings, memory = report.results
    assert [(t.what, t.cache) for t in timings] == [
        (what, cache) for what in ("read", "load") for cache in ("cold", "warm")
    ]
    assert all(timing.seconds >= 0 for timing in timings)
    assert isinstance(memory, bench.Memory)
    assert "memory in GB" in capsys.readouterr().out


def test_load_bench_notices_another_byte(tmp_path: Path) -> None:
    bench.write_checkpoint(tmp_path, SIZE)
    model = bench.load(tmp_path, "cpu")
    bench.check_bytes(tmp_path, model, SIZE)
    for layer in range(SIZE.layers):
        model.get_submodule(f"model.layers.{layer}.mlp.experts").down_proj.weight[:, 0, 0] += 1
    with pytest.raises(AssertionError, match=r"down_proj\.weight: other bytes"):
        bench.check_bytes(tmp_path, model, SIZE)


def test_load_bench_reads_every_byte_and_sees_memory(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(3 * bench.BUFFER_BYTES + 5))
    (tmp_path / "b").write_bytes(bytes(7))
    files = [tmp_path / "a", tmp_path / "b"]
    bench.drop_from_cache(files)
    assert bench.read_files(files) == 3 * bench.BUFFER_BYTES + 12
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    with bench.peak_resident_bytes() as peak:
        held = torch.ones(64 << 20, dtype=torch.uint8)
        for _ in range(20):
            held += 1
    assert 40e6 < peak["RssAnon"] < 200e6
