"""Reports of benchmarks: what is printed, saved and drawn, from made-up numbers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench import plots
from bench.report import Report

GROUPED_MM: dict[str, Any] = {
    "command": "python -m bench.grouped_mm",
    "gpu": "made up",
    "ceilings": {"copy_tb_per_s": 4.0, "read_tb_per_s": 5.0, "matmul_tflop_per_s": 100.0},
    "results": [
        {
            "num_experts": 4,
            "n": n,
            "k": 128,
            "rows_per_expert": rows,
            "tb_per_s": tb,
            "tflop_per_s": tflop,
        }
        # Out of order: a line must not go back.
        for n, rows, tb, tflop in [(64, 8, 2.0, 40.0), (64, 1, 3.0, 7.0), (256, 1, 3.5, 9.0)]
    ],
}
QUANTIZE: dict[str, Any] = {
    "command": "python -m bench.quantize",
    "gpu": "made up",
    "copy_tb_per_s": 4.0,
    "results": [
        {"op": "quantize_nvfp4", "rows": 10, "columns": 32, "tb_per_s": 2.0},
        {"op": "swizzle_sf", "rows": 10, "columns": 32, "tb_per_s": 1.0},
        {"op": "swizzle_sf", "rows": 99, "columns": 32, "tb_per_s": 1.5},
    ],
}


@dataclass(frozen=True)
class Case:
    op: str
    time_us: float


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {
        line.get_label(): (list(map(float, line.get_xdata())), list(map(float, line.get_ydata())))
        for line in axes.lines
    }


def test_plot_grouped_mm_draws_results_under_the_ceilings() -> None:
    pytest.importorskip("matplotlib")
    bandwidth, arithmetic = plots.draw_grouped_mm(GROUPED_MM).axes
    drawn = lines(bandwidth)
    assert drawn["4 experts, N = 64, K = 128"] == ([1, 8], [3, 2])
    assert drawn["4 experts, N = 256, K = 128"] == ([1], [3.5])
    assert drawn["copy 4.00 TB/s"][1] == [4, 4]
    assert drawn["read 5.00 TB/s"][1] == [5, 5]
    drawn = lines(arithmetic)
    assert drawn["4 experts, N = 64, K = 128"] == ([1, 8], [7, 40])
    # A row and weight is 2 flop and 9/16 byte: 4 TB/s are 14.2 TFLOP/s at one row.
    rows, roof = drawn["roof, 100 TFLOP/s"]
    assert rows == [1, 8]
    assert roof == pytest.approx([4 * 2 / (9 / 16), 100])
    assert [text.get_text() for text in arithmetic.get_xticklabels()] == ["1", "8"]
    assert bandwidth.get_xlabel() == "rows per expert"


def test_plot_quantize_draws_a_bar_a_case() -> None:
    pytest.importorskip("matplotlib")
    (axes,) = plots.draw_quantize(QUANTIZE).axes
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in axes.patches]
    assert bars == [pytest.approx(bar) for bar in [(-0.2, 2.0), (0.2, 1.0), (1.0, 1.5)]]
    first, second, third = (bar.get_facecolor() for bar in axes.patches)
    assert first != second == third
    assert lines(axes)["copy 4.00 TB/s"][1] == [4, 4]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(legend) == ["copy 4.00 TB/s", "quantize_nvfp4", "swizzle_sf"]


def test_plots_are_drawn_from_saved_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "quantize.json").write_text(json.dumps(QUANTIZE))
    plots.main([str(tmp_path)])
    assert (tmp_path / "quantize.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "grouped_mm.png").exists()


def test_plots_without_matplotlib_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    plots.write_plot(QUANTIZE, "quantize", tmp_path)
    assert capsys.readouterr().out == "quantize.png is not drawn: matplotlib is not installed\n"
    assert not list(tmp_path.iterdir())


def test_report_prints_and_saves_what_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["made_up.py", "--tokens", "1", "--out", "elsewhere", "9"])
    report = Report("made_up", {"num_experts": 4}, "op | us")
    report.add(Case("permute", 1.5), "permute | 1.5")
    report.write(tmp_path / "new")
    printed = capsys.readouterr().out
    assert printed.endswith("num_experts: 4\nop | us\npermute | 1.5\n")
    assert (tmp_path / "new" / "made_up.txt").read_text() == printed
    saved = json.loads((tmp_path / "new" / "made_up.json").read_text())
    assert saved["command"] == "python -m bench.made_up --tokens 1 9"
    assert saved["results"] == [{"op": "permute", "time_us": 1.5}]
    assert not (tmp_path / "new" / "made_up.png").exists()
