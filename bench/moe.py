"""A whole experts layer, five real shapes by seven numbers of tokens, beside peers and floors.

    python -m bench.moe [--shape NAME | H,I,E,K ...] [--tokens N ...] [--out DIR]

Every layer, ours in each mode and the peers, is checked against a float32 reference of the
dequantized weights before it is timed; a wrong result stops the run. Times are medians of
CUDA-graph replays over several random routings, enough of them for the weights they touch to
exceed the L2 cache; the router is not part of a layer.

floor = max(touched experts * 3 D F * 4.5 bit / copy bandwidth, 6 T top_k D F / matmul rate), both
rates measured in the same run. "x best peer" is how many times faster: than the fastest of the
bf16 layers run here and, on an H200, of the peers measured once in peers_h200.json.
"""

import argparse
import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from bench.moe_layers import (
    MAX_ERROR,
    NVFP4_BYTES,
    SHAPES,
    Mode,
    Routing,
    Shape,
    build_moe,
    checked_tokens,
    expected_rows,
    parse_shape,
    random_routing,
    relative_error,
)
from bench.moe_peers import COMMITTED_GPU, Layer, committed_peers, live_peers
from bench.moe_report import HEADER, WEIGHT_ONLY, Cell, figures, make_cell, markdown, summary
from bench.report import Report
from bench.timing import Ceilings, graph_time_us, measure_ceilings
from nvfp4_ops import NVFP4MoE

DEVICE = "cuda"
TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
MODES: tuple[Mode, ...] = (None, "static", "per_token")
# Weight bytes that the routings of a cell touch together: four times the L2 cache of an H200.
ROTATED_BYTES = 256e6
MIN_ROUTINGS, MAX_ROUTINGS = 3, 18


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=parse_shape, nargs="+", default=SHAPES)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    return parser.parse_args(arguments)


def make_routings(shape: Shape, tokens: int, device: str) -> list[Routing]:
    """Enough of them to exceed the L2 cache."""
    first = random_routing(shape, tokens, 1, device)
    touched_bytes = first.experts_touched() * shape.weights_per_expert * NVFP4_BYTES
    count = min(MAX_ROUTINGS, max(MIN_ROUTINGS, round(ROTATED_BYTES / touched_bytes)))
    return [first, *(random_routing(shape, tokens, seed, device) for seed in range(2, count + 1))]


def check(name: str, actual: Tensor, expected: Tensor, mode: Mode) -> None:
    """Raises on a wrong result, which must not be timed."""
    error = relative_error(actual, expected)
    if not error <= MAX_ERROR[mode]:
        raise AssertionError(f"{name}: relative error {error:.2e}, more than {MAX_ERROR[mode]:.0e}")


def time_layer(layer: Callable[..., Tensor], routings: Sequence[Routing]) -> float:
    return graph_time_us([lambda routing=routing: layer(*routing) for routing in routings])


@torch.no_grad()
def run_cell(
    shape: Shape,
    tokens: int,
    moe: NVFP4MoE,
    peers: dict[str, Layer],
    ceilings: Ceilings,
    committed: dict[str, float],
) -> Cell:
    routings = make_routings(shape, tokens, DEVICE)
    chosen = checked_tokens(tokens, DEVICE)
    expected = expected_rows(shape, moe, routings[0], chosen, MODES)
    time_us, peers_us = {}, {}
    for mode in MODES:
        moe.activation_scale = mode
        name = mode or WEIGHT_ONLY
        check(f"{shape.name} T={tokens} {name}", moe(*routings[0])[chosen], expected[mode], mode)
        time_us[name] = time_layer(moe, routings)
    for name, layer in peers.items():
        check(f"{shape.name} T={tokens} {name}", layer(*routings[0])[chosen], expected[None], None)
        peers_us[name] = time_layer(layer, routings)
    touched = sum(routing.experts_touched() for routing in routings) / len(routings)
    return make_cell(
        shape,
        tokens,
        touched,
        ceilings,
        time_us=time_us,
        peers_us=peers_us,
        committed_us=committed,
    )


def line(cell: Cell) -> str:
    """As ``HEADER``, then the other modes and the fastest peer."""
    best = cell.best_peer
    others = [f"{mode} {us:.1f}" for mode, us in cell.time_us.items() if mode != WEIGHT_ONLY]
    if best is not None:
        others.append(f"best peer {best[0]} {best[1]:.1f}")
    return " | ".join([*figures(cell), ", ".join(others)])


def main() -> None:
    arguments = parse_arguments()
    ceilings = measure_ceilings()
    report = Report(
        "moe",
        {"ceilings": {name: round(value, 2) for name, value in asdict(ceilings).items()}},
        " | ".join([*HEADER, "W4A4 us, best peer us"]),
    )
    comparable = COMMITTED_GPU in torch.cuda.get_device_name()
    committed = committed_peers() if comparable else {}
    cells = []
    for shape in arguments.shape:
        moe, peers = build_moe(shape, DEVICE), live_peers(shape, DEVICE)
        for tokens in arguments.tokens:
            known = committed.get((shape.name, tokens), {})
            cell = run_cell(shape, tokens, moe, peers, ceilings, known)
            cells.append(cell)
            report.add(cell, line(cell))
        # The next shape needs the room: dsv4-flash has 16 GB of weights, both kinds together.
        del moe, peers
        gc.collect()
        torch.cuda.empty_cache()
    for text in summary(cells):
        print(text, flush=True)
    report.write(arguments.out)
    (arguments.out / "moe.md").write_text(markdown(cells, report.header))
    from bench.moe_plot import write_plots

    write_plots(arguments.out)


if __name__ == "__main__":
    main()
