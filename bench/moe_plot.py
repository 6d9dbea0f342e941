"""Plots of bench.moe: latency over tokens beside floor and peers, and the gain over the best peer.

    python -m bench.moe_plot [DIR]

Draws DIR/moe.json as DIR/moe_latency.png and DIR/moe_gain.png. Needs matplotlib and no GPU.
"""

import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.moe_report import WEIGHT_ONLY, Cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS = "nvfp4_ops"
NUM_COLUMNS = 3
# Colour-blind safe (Okabe and Ito); ours is black.
COLORS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999")


def read_cells(path: Path) -> tuple[dict[str, Any], list[Cell]]:
    """Facts and cells of a moe.json."""
    document = json.loads(path.read_text())
    cells = [Cell(**cell) for cell in document.pop("results")]
    return document, cells


def by_shape(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    shapes: dict[str, list[Cell]] = {}
    for cell in cells:
        shapes.setdefault(cell.shape, []).append(cell)
    return {name: sorted(group, key=lambda cell: cell.tokens) for name, group in shapes.items()}


def _curves(cells: Sequence[Cell], field: str) -> dict[str, tuple[list[int], list[float]]]:
    """{name: (tokens, microseconds)} of a field, where it has a value."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for cell in cells:
        for name, us in getattr(cell, field).items():
            tokens, times = curves.setdefault(name, ([], []))
            tokens.append(cell.tokens)
            times.append(us)
    return curves


def _log_axes(axes: "Axes", tokens: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(count) for count in tokens])
    axes.grid(True, which="major", alpha=0.3)
    axes.set_xlabel("tokens")


def draw_latency(cells: Sequence[Cell], title: str) -> "Figure":
    """One panel a shape: our modes, this run's peers (dashed), committed ones (dotted), floor."""
    from matplotlib.figure import Figure

    shapes = by_shape(cells)
    peers = {
        name: COLORS[index % len(COLORS)]
        for index, name in enumerate(
            dict.fromkeys(name for c in cells for name in (*c.peers_us, *c.committed_us))
        )
    }
    num_rows = -(-len(shapes) // NUM_COLUMNS)
    figure = Figure(figsize=(5 * NUM_COLUMNS, 4.2 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, NUM_COLUMNS, squeeze=False).flatten()
    labels: dict[str, Any] = {}
    for axes, (name, group) in zip(panels, shapes.items(), strict=False):
        tokens = [cell.tokens for cell in group]
        axes.fill_between(tokens, [cell.floor_us for cell in group], color="0.88")
        labels["floor"] = axes.plot(tokens, [c.floor_us for c in group], color="0.6", lw=1)[0]
        for field, style in (("committed_us", ":"), ("peers_us", "--")):
            for peer, curve in _curves(group, field).items():
                labels[peer] = axes.plot(*curve, style, marker=".", color=peers[peer])[0]
        for mode, curve in _curves(group, "time_us").items():
            style = "-" if mode == WEIGHT_ONLY else "-."
            width = 2.2 if mode == WEIGHT_ONLY else 1.0
            labels[f"{OURS} {mode}"] = axes.plot(
                *curve, style, marker="o", ms=3, color="black", lw=width
            )[0]
        _log_axes(axes, tokens)
        axes.set_yscale("log")
        axes.set_title(name)
        axes.set_ylabel("microseconds a layer")
    for axes in panels[len(shapes) :]:
        axes.set_axis_off()
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=4)
    figure.suptitle(title)
    return figure


def draw_gain(cells: Sequence[Cell], title: str) -> "Figure":
    """How many times faster than the best peer, a line a shape."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1.0, color="0.4", lw=1)
    all_tokens: set[int] = set()
    for color, (name, group) in zip(COLORS * len(cells), by_shape(cells).items(), strict=False):
        known = [(cell.tokens, cell.times_best_peer) for cell in group if cell.best_peer]
        if known:
            axes.plot(*zip(*known, strict=True), marker="o", ms=4, color=color, label=name)
            all_tokens.update(tokens for tokens, _ in known)
    _log_axes(axes, sorted(all_tokens))
    axes.set_ylabel("times faster than the best peer")
    axes.set_ylim(bottom=0)
    if all_tokens:
        axes.legend()
    axes.set_title(title)
    return figure


def write_plots(directory: Path) -> list[Path]:
    """PNGs beside moe.json; none, and a line that says so, without matplotlib."""
    if find_spec("matplotlib") is None:
        print("matplotlib is not installed: no plots", flush=True)
        return []
    facts, cells = read_cells(directory / "moe.json")
    title = f"NVFP4 experts layer, {facts['gpu']}, torch {facts['torch']}"
    paths = []
    for name, draw in (("moe_latency", draw_latency), ("moe_gain", draw_gain)):
        path = directory / f"{name}.png"
        draw(cells, title).savefig(path, dpi=100, pil_kwargs={"optimize": True})
        paths.append(path)
    return paths


if __name__ == "__main__":
    write_plots(Path(sys.argv[1] if len(sys.argv) > 1 else "bench/results"))
