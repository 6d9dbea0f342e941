"""Plots of the kernel benchmarks: the grouped mm under its roofs, quantize beside a copy.

    python -m bench.plots [DIR]

Draws DIR/NAME.json of every benchmark below as DIR/NAME.png. Needs matplotlib and no GPU.
"""

import json
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BITS_PER_WEIGHT = 4.5
# Colour-blind safe (Okabe and Ito).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
CEILING = {"color": "black", "linestyle": "--", "linewidth": 1}


def draw_grouped_mm(document: dict[str, Any]) -> "Figure":
    """TB/s and TFLOP/s over rows per expert, a line a shape, under what the GPU does at best.

    The roof of TFLOP/s is the lower of the arithmetic and of reading the weights once.
    """
    figure = _figure(2, document)
    bandwidth, arithmetic = figure.axes
    ceilings, results = document["ceilings"], document["results"]
    rows = sorted({result["rows_per_expert"] for result in results})
    copy, peak = ceilings["copy_tb_per_s"], ceilings["matmul_tflop_per_s"]
    bandwidth.axhline(copy, label=f"copy {copy:.2f} TB/s", **CEILING)
    read = ceilings["read_tb_per_s"]
    bandwidth.axhline(read, label=f"read {read:.2f} TB/s", **CEILING | {"linestyle": ":"})
    # 2 flop a weight and row; the weights are read once whatever the rows.
    flop_per_byte = [2 * count / (BITS_PER_WEIGHT / 8) for count in rows]
    roof = [min(peak, copy * intensity) for intensity in flop_per_byte]
    arithmetic.plot(rows, roof, label=f"roof, {peak:.0f} TFLOP/s", **CEILING)
    shapes = dict.fromkeys(map(_shape_label, results))
    for color, shape in zip(cycle(COLORS), shapes, strict=False):
        cases = [result for result in results if _shape_label(result) == shape]
        cases.sort(key=lambda case: case["rows_per_expert"])
        for axes, field in ((bandwidth, "tb_per_s"), (arithmetic, "tflop_per_s")):
            axes.plot(
                [case["rows_per_expert"] for case in cases],
                [case[field] for case in cases],
                marker="o",
                color=color,
                label=shape,
            )
    for axes, unit in ((bandwidth, "TB/s"), (arithmetic, "TFLOP/s")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(rows, [str(count) for count in rows])
        axes.set_xlabel("rows per expert")
        _finish(axes, unit)
    bandwidth.set_ylim(bottom=0)
    arithmetic.set_yscale("log")
    return figure


def _shape_label(result: dict[str, Any]) -> str:
    return f"{result['num_experts']} experts, N = {result['n']}, K = {result['k']}"


def draw_quantize(document: dict[str, Any]) -> "Figure":
    """TB/s of each op and size, a bar each, beside the copy."""
    figure = _figure(1, document)
    (axes,) = figure.axes
    copy, results = document["copy_tb_per_s"], document["results"]
    sizes = list(dict.fromkeys((result["rows"], result["columns"]) for result in results))
    ops = list(dict.fromkeys(result["op"] for result in results))
    colors = dict(zip(ops, cycle(COLORS), strict=False))
    width = 0.8 / len(ops)
    for i, size in enumerate(sizes):
        cases = [result for result in results if (result["rows"], result["columns"]) == size]
        for j, case in enumerate(cases):
            center = i + (j - (len(cases) - 1) / 2) * width
            axes.bar(center, case["tb_per_s"], width, color=colors[case["op"]], label=case["op"])
    axes.axhline(copy, label=f"copy {copy:.2f} TB/s", **CEILING)
    axes.set_xticks(range(len(sizes)), [f"{rows} x\n{columns}" for rows, columns in sizes])
    _finish(axes, "TB/s")
    # Room for the legend above the copy.
    axes.set_ylim(0, 1.3 * copy)
    return figure


PLOTS: dict[str, Callable[[dict[str, Any]], "Figure"]] = {
    "grouped_mm": draw_grouped_mm,
    "quantize": draw_quantize,
}


def _figure(num_panels: int, document: dict[str, Any]) -> "Figure":
    # Not pyplot: nothing here is interactive, and figures are freed with their last reference.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * num_panels, 4.5), layout="constrained")
    figure.subplots(1, num_panels)
    figure.suptitle(f"{document['command']}, {document['gpu']}", fontsize=10)
    return figure


def _finish(axes: "Axes", unit: str) -> None:
    axes.set_ylabel(unit)
    axes.grid(True, which="major", alpha=0.3)
    # Each label once, though several bars have it.
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=8)


def write_plot(document: dict[str, Any], name: str, directory: Path) -> None:
    """Draw NAME.png if there is a plot of that name; without matplotlib say so."""
    if name not in PLOTS:
        return
    if find_spec("matplotlib") is None:
        print(f"{name}.png is not drawn: matplotlib is not installed")
        return
    PLOTS[name](document).savefig(directory / f"{name}.png", dpi=100, pil_kwargs={"optimize": True})


def main(arguments: Sequence[str]) -> None:
    directory = Path(arguments[0] if arguments else "bench/results")
    for name in PLOTS:
        path = directory / f"{name}.json"
        if path.exists():
            write_plot(json.loads(path.read_text()), name, directory)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
