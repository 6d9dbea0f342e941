"""bench.moe on the CPU: its checks catch wrong layers, its figures and plots are right."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import moe as bench
from bench import moe_layers, moe_peers, moe_report
from bench.moe_layers import Shape
from bench.moe_report import WEIGHT_ONLY, Cell, make_cell
from bench.timing import Ceilings

TINY = Shape("tiny", 64, 32, 4, 2)
CEILINGS = Ceilings(copy_tb_per_s=4.0, read_tb_per_s=4.4, matmul_tflop_per_s=800.0)


def cell(**changes: Any) -> Cell:
    """Floor 46.97 us, ours 50 us, the best peer 90 us."""
    fields: dict[str, Any] = dict(
        time_us={WEIGHT_ONLY: 50.0, "static": 55.0, "per_token": 57.0},
        peers_us={"torch bf16": 300.0},
        committed_us={"humming": 90.0},
    )
    made = make_cell(bench.parse_shape("mixtral-8x7b"), 1, 2.0, CEILINGS, **fields)
    return replace(made, **changes)


def test_bench_moe_shapes_are_those_of_the_committed_peers() -> None:
    committed = moe_peers.committed_peers()
    assert set(committed) == {(shape.name, t) for shape in bench.SHAPES for t in bench.TOKENS}
    assert committed["dsv3-32of256", 1]["marlin"] == 95.39
    # As many experts as random routing over this rank's own 32 touches.
    assert all("humming" in peers for key, peers in committed.items() if key[0] != "dsv3-32of256")


@pytest.mark.parametrize("text", ["2048,768,128", "a,b,c,d", "mixtral", ""])
def test_bench_moe_rejects_a_shape(text: str) -> None:
    with pytest.raises(ValueError, match=r"shape: must be H,I,E,K or one of qwen3-30b-a3b"):
        moe_layers.parse_shape(text)


def test_bench_moe_parses_its_options() -> None:
    arguments = bench.parse_arguments(["--shape", "512,256,8,2", "dsv4-flash", "--tokens", "3"])
    assert arguments.shape == [Shape("512x256x8x2", 512, 256, 8, 2), bench.SHAPES[3]]
    assert arguments.tokens == [3]
    assert len(bench.parse_arguments([]).shape) * len(bench.parse_arguments([]).tokens) == 35


def test_bench_moe_weights_have_every_code_and_scales_of_16_to_448() -> None:
    shape = Shape("", 512, 256, 1, 1)
    gate, up, down = moe_layers.random_expert(shape, 0, "cpu")
    assert gate.codes.unique().numel() == 256
    for weight in (gate, up, down):
        assert weight.block_scale.float().aminmax() == (16.0, 448.0)
    assert len({float(weight.global_scale) for weight in (gate, up, down)}) == 3
    again = moe_layers.random_expert(shape, 0, "cpu")
    assert torch.equal(gate.codes, again[0].codes)
    other = moe_layers.random_expert(shape, 1, "cpu")
    assert not torch.equal(gate.codes, other[0].codes)
    assert not torch.equal(gate.codes, up.codes)


def test_bench_moe_routes_each_token_to_distinct_experts() -> None:
    _, index, weights = moe_layers.random_routing(bench.SHAPES[0], 200, 0, "cpu")
    assert all(row.unique().numel() == 8 for row in index)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(200))


def test_bench_moe_rotates_past_the_cache() -> None:
    for shape, expected in ((bench.SHAPES[0], 12), (bench.SHAPES[1], 3)):
        routings = bench.make_routings(shape, 1, "cpu")
        assert len(routings) == expected
        assert len({tuple(routing.index.flatten().tolist()) for routing in routings}) > 1


@pytest.mark.parametrize("mode", bench.MODES, ids=str)
def test_bench_moe_check_passes_the_layer_and_catches_wrong_ones(mode: Any) -> None:
    moe = moe_layers.build_moe(TINY, "cpu")
    routing = moe_layers.random_routing(TINY, 40, 1, "cpu")
    chosen = moe_layers.checked_tokens(40, "cpu")
    assert chosen.tolist()[::15] == [0, 39]
    expected = moe_layers.expected_rows(TINY, moe, routing, chosen, bench.MODES)[mode]
    moe.activation_scale = mode
    out = moe(*routing)[chosen]
    bench.check("right", out, expected, mode)
    swapped = moe(routing.x, routing.index.flip(1), routing.weights)[chosen]
    for wrong in (out * 1.1, swapped, torch.where(out == out[0, 0], torch.nan, out)):
        with pytest.raises(AssertionError, match="wrong: relative error"):
            bench.check("wrong", wrong, expected, mode)
    if mode is None:
        weights = moe_peers.bf16_weights(TINY, "cpu")
        bench.check("torch", moe_peers.torch_layer(*weights)(*routing)[chosen], expected, None)


def test_bench_moe_transformers_peer_agrees() -> None:
    pytest.importorskip("transformers.integrations.moe")
    routing = moe_layers.random_routing(TINY, 5, 1, "cpu")
    moe = moe_layers.build_moe(TINY, "cpu")
    expected = moe_layers.expected_rows(TINY, moe, routing, torch.arange(5), [None])[None]
    peer = moe_peers.live_peers(TINY, "cpu")["transformers bf16"]
    bench.check("transformers", peer(*routing), expected, None)


def test_bench_moe_floor_is_the_longer_of_bytes_and_arithmetic() -> None:
    shape = bench.SHAPES[1]
    # 2 experts * 3 * 4096 * 14336 weights of 4.5 bits at 4 TB/s.
    assert moe_report.floor_us(shape, 1, 2, CEILINGS) == pytest.approx(49.545, abs=0.01)
    # 6 * 8192 * 2 * 4096 * 14336 operations at 800 TFLOP/s.
    assert moe_report.floor_us(shape, 8192, 8, CEILINGS) == pytest.approx(7215.5, abs=0.1)


def test_bench_moe_cell_figures() -> None:
    made = cell()
    assert made.best_peer == ("humming", 90.0)
    assert made.times_best_peer == pytest.approx(1.8)
    assert made.times_floor == pytest.approx(50 / 49.54, abs=1e-3)
    assert made.w4a4_us == 57.0
    assert moe_report.figures(made)[2:] == ["50.0", "3.96", "14.1", "1.01", "1.80"]
    alone = cell(peers_us={}, committed_us={})
    assert alone.times_best_peer is None
    assert moe_report.figures(alone)[-1] == "-"


def test_bench_moe_lists_exactly_the_missed_targets() -> None:
    assert moe_report.missed_targets([cell()]) == []
    slow = cell(time_us={WEIGHT_ONLY: 130.0, "static": 140.0}, tokens=1)
    assert moe_report.missed_targets([slow]) == [
        "mixtral-8x7b T=1: 0.69 x the best peer (humming), target > 1",
        "mixtral-8x7b T=1: 2.62 x the floor, target <= 2.5",
        "all cells: 2.624 x the floor (geomean), target <= 1.25",
    ]
    w4a4 = cell(time_us={WEIGHT_ONLY: 50.0, "static": 50.0, "per_token": 58.0})
    assert moe_report.missed_targets([w4a4]) == [
        "mixtral-8x7b T=1: W4A4 takes 1.16 x weight-only, target <= 1.15"
    ]
    # 1.8 x the floor: fine for a single token, too slow for 8; 2 tokens have no target.
    times = {WEIGHT_ONLY: 1.8 * 49.54}
    for tokens, missed in ((1, 0), (2, 0), (8, 1)):
        cells = [cell(tokens=tokens, time_us=times), *[cell(time_us={WEIGHT_ONLY: 1.0})] * 3]
        assert len(moe_report.missed_targets(cells)) == missed


def test_bench_moe_geomean() -> None:
    assert moe_report.geomean([1.0, 4.0]) == pytest.approx(2.0)
    assert "1.01 x" not in moe_report.summary([cell()])[0]
    assert moe_report.summary([cell()])[0] == (
        "geomean over 1 cells: 1.009 x the floor, 1.80 x the best peer"
    )


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole benchmark, with calls that are made but not timed."""

    def run_once(calls: Any) -> float:
        for call in calls:
            call()
        return 100.0

    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "graph_time_us", run_once)
    monkeypatch.setattr(bench, "measure_ceilings", lambda: CEILINGS)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU")


@pytest.mark.usefixtures("on_the_cpu")
def test_bench_moe_writes_json_table_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["moe", "--shape", "64,32,4,2", "32,48,3,1", "--tokens", "1", "9"]
    monkeypatch.setattr("sys.argv", [*command, "--out", str(tmp_path)])
    bench.main()
    cells = json.loads((tmp_path / "moe.json").read_text())["results"]
    assert [(c["shape"], c["tokens"]) for c in cells] == [
        (name, t) for name in ("64x32x4x2", "32x48x3x1") for t in (1, 9)
    ]
    assert all(set(c["time_us"]) == {WEIGHT_ONLY, "static", "per_token"} for c in cells)
    table = (tmp_path / "moe.md").read_text()
    assert "| 64x32x4x2 | 9 | 100.0 |" in table
    assert table.count("\n| ") == 5
    assert "geomean over 4 cells" in capsys.readouterr().out


def test_bench_moe_plots_draw_every_curve() -> None:
    pytest.importorskip("matplotlib")
    from bench import moe_plot

    cells = [
        cell(shape=shape, tokens=tokens, committed_us={"humming": 90.0} if tokens > 1 else {})
        for shape in ("a", "b")
        for tokens in (1, 8)
    ]
    panels = moe_plot.draw_latency(cells, "title").axes
    assert [axes.get_title() for axes in panels[:2]] == ["a", "b"]
    curves = {
        tuple(map(tuple, (line.get_xdata(), line.get_ydata()))) for line in panels[0].get_lines()
    }
    floor = cell().floor_us
    assert curves == {
        ((1, 8), (floor, floor)),
        ((8,), (90.0,)),
        ((1, 8), (300.0, 300.0)),
        ((1, 8), (50.0, 50.0)),
        ((1, 8), (55.0, 55.0)),
        ((1, 8), (57.0, 57.0)),
    }
    (gain,) = moe_plot.draw_gain(cells, "title").axes
    lines = {line.get_label(): list(line.get_ydata()) for line in gain.get_lines()[1:]}
    assert lines == {"a": [6.0, 1.8], "b": [6.0, 1.8]}
