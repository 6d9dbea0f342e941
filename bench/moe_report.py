"""What bench.moe says of its times: a cell's figures, the targets it misses, the table."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

from bench.moe_layers import NVFP4_BYTES, Shape
from bench.timing import Ceilings

WEIGHT_ONLY = "weight-only"
GEOMEAN_TARGET, FLOOR_TARGET, SINGLE_TOKEN_TARGET, W4A4_TARGET = 1.25, 1.7, 2.5, 1.15


@dataclass(frozen=True)
class Cell:
    """One shape at one number of tokens; times in microseconds, weight-only first.

    experts_touched: mean over the routings. floor_us: what no layer with these weights can beat
    on this GPU. peers_us: this run's and, on the GPU they come from, the committed ones.
    """

    shape: str
    tokens: int
    experts_touched: float
    floor_us: float
    time_us: dict[str, float]
    peers_us: dict[str, float]
    committed_us: dict[str, float]
    tb_per_s: float
    tflop_per_s: float

    @property
    def us(self) -> float:
        return self.time_us[WEIGHT_ONLY]

    @property
    def times_floor(self) -> float:
        return self.us / self.floor_us

    @property
    def best_peer(self) -> tuple[str, float] | None:
        """Name and microseconds of the fastest peer, committed ones included."""
        peers = self.committed_us | self.peers_us
        return min(peers.items(), key=lambda item: item[1]) if peers else None

    @property
    def times_best_peer(self) -> float | None:
        """How many times faster than the best peer; None without one."""
        best = self.best_peer
        return None if best is None else best[1] / self.us

    @property
    def w4a4_us(self) -> float | None:
        """Of the slowest mode that quantizes activations; None where none ran."""
        times = [us for mode, us in self.time_us.items() if mode != WEIGHT_ONLY]
        return max(times) if times else None


def floor_us(shape: Shape, tokens: int, experts_touched: float, ceilings: Ceilings) -> float:
    """The longer of copying as many bytes as are read of the weights, and of the arithmetic."""
    num_bytes = experts_touched * shape.weights_per_expert * NVFP4_BYTES
    return max(
        num_bytes / ceilings.copy_tb_per_s / 1e6,
        shape.flop(tokens) / ceilings.matmul_tflop_per_s / 1e6,
    )


def make_cell(
    shape: Shape,
    tokens: int,
    experts_touched: float,
    ceilings: Ceilings,
    *,
    time_us: dict[str, float],
    peers_us: dict[str, float],
    committed_us: dict[str, float],
) -> Cell:
    us = time_us[WEIGHT_ONLY]
    num_bytes = experts_touched * shape.weights_per_expert * NVFP4_BYTES
    return Cell(
        shape=shape.name,
        tokens=tokens,
        experts_touched=round(experts_touched, 1),
        floor_us=round(floor_us(shape, tokens, experts_touched, ceilings), 4),
        time_us={mode: round(value, 2) for mode, value in time_us.items()},
        peers_us={peer: round(value, 2) for peer, value in peers_us.items()},
        committed_us=committed_us,
        tb_per_s=round(num_bytes / us / 1e6, 3),
        tflop_per_s=round(shape.flop(tokens) / us / 1e6, 1),
    )


def geomean(values: Sequence[float]) -> float:
    return exp(sum(map(log, values)) / len(values))


def missed_targets(cells: Sequence[Cell]) -> list[str]:
    """One line for each cell and target that it misses, then for the mean over all cells."""
    missed = []
    for cell in cells:
        name = f"{cell.shape} T={cell.tokens}"
        ratio = cell.times_best_peer
        if ratio is not None and ratio <= 1.0:
            assert cell.best_peer is not None
            missed.append(f"{name}: {ratio:.2f} x the best peer ({cell.best_peer[0]}), target > 1")
        limit = SINGLE_TOKEN_TARGET if cell.tokens == 1 else FLOOR_TARGET
        # Between 1 and 8 tokens no target is set.
        if (cell.tokens == 1 or cell.tokens >= 8) and cell.times_floor > limit:
            missed.append(f"{name}: {cell.times_floor:.2f} x the floor, target <= {limit}")
        if cell.w4a4_us is not None and cell.w4a4_us > W4A4_TARGET * cell.us:
            missed.append(
                f"{name}: W4A4 takes {cell.w4a4_us / cell.us:.2f} x weight-only, "
                f"target <= {W4A4_TARGET}"
            )
    mean = geomean([cell.times_floor for cell in cells])
    if mean > GEOMEAN_TARGET:
        missed.append(f"all cells: {mean:.3f} x the floor (geomean), target <= {GEOMEAN_TARGET}")
    return missed


def summary(cells: Sequence[Cell]) -> list[str]:
    """Geometric means, and what misses its target."""
    lines = [
        f"geomean over {len(cells)} cells: "
        f"{geomean([cell.times_floor for cell in cells]):.3f} x the floor"
    ]
    ratios = [cell.times_best_peer for cell in cells]
    known = [ratio for ratio in ratios if ratio is not None]
    if known:
        lines[0] += f", {geomean(known):.2f} x the best peer"
    missed = missed_targets(cells)
    lines.append(f"targets missed: {len(missed)}" if missed else "every target is met")
    return lines + missed


HEADER = ("shape", "T", "us", "TB/s", "TFLOP/s", "x floor", "x best peer")


def figures(cell: Cell) -> list[str]:
    """The line of a cell, as in ``HEADER``."""
    ratio = cell.times_best_peer
    return [
        cell.shape,
        str(cell.tokens),
        f"{cell.us:.1f}",
        f"{cell.tb_per_s:.2f}",
        f"{cell.tflop_per_s:.1f}",
        f"{cell.times_floor:.2f}",
        "-" if ratio is None else f"{ratio:.2f}",
    ]


def _columns(cells: Sequence[Cell], field: str) -> list[str]:
    """Names of all entries, in the order of their first appearance."""
    return list(dict.fromkeys(name for cell in cells for name in getattr(cell, field)))


def markdown(cells: Sequence[Cell], header: dict[str, object]) -> str:
    """The whole result as a Markdown document: facts, table, summary."""
    modes = [mode for mode in _columns(cells, "time_us") if mode != WEIGHT_ONLY]
    peers, committed = _columns(cells, "peers_us"), _columns(cells, "committed_us")
    columns = [
        *HEADER,
        "experts touched",
        "floor us",
        *(f"W4A4 {mode} us" for mode in modes),
        *(f"{peer} us" for peer in peers),
        *(f"({peer} us)" for peer in committed),
    ]

    def optional(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    lines = [f"- {key}: {value}" for key, value in header.items()]
    lines += ["", "Columns in parentheses: measured once, see peers_h200.json.", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for cell in cells:
        row = [
            *figures(cell),
            f"{cell.experts_touched:g}",
            f"{cell.floor_us:.1f}",
            *(optional(cell.time_us.get(mode)) for mode in modes),
            *(optional(cell.peers_us.get(peer)) for peer in peers),
            *(optional(cell.committed_us.get(peer)) for peer in committed),
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join([*lines, "", *summary(cells)]) + "\n"
