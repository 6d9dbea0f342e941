"""prepack_weight and its inverse against the copy bandwidth.

    python -m bench.prepack [--out DIR]

The bytes of one expert are compared with the PyTorch layout's before anything is timed.
"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

import nvfp4_ops
from bench.report import Report, parse_out
from bench.timing import graph_time_us, measure_ceilings
from nvfp4_ops import kernels
from nvfp4_ops.kernels import prepack_sm90

# (E, N, K): weights of a few hundred MB, past the L2 cache; the last has half a block of columns.
SHAPES = ((64, 2048, 2048), (128, 1536, 2048), (32, 5760, 2880))
BITS_PER_WEIGHT = 4.5


@dataclass(frozen=True)
class Result:
    """One case; share is of the copy bandwidth, for reading and writing 4.5 bits a weight."""

    direction: str
    gated: bool
    num_experts: int
    n: int
    k: int
    time_us: float
    tb_per_s: float
    share: float


def check(codes: Tensor, sf: Tensor, gated: bool) -> None:
    """Bytes of the last expert, and the way back."""
    packed = nvfp4_ops.prepack_weight(codes, sf, gated=gated)
    expected = prepack_sm90.prepack(codes[-1:], sf[-1:], gated=gated)
    back = kernels.unpack(packed, codes.shape[1], 2 * codes.shape[2])
    same = torch.equal(packed[-1:], expected) and torch.equal(back[0], codes)
    if not same or not torch.equal(back[1].view(torch.uint8), sf.view(torch.uint8)):
        raise AssertionError("the kernel's bytes differ from the layout's")


def run_case(
    shape: tuple[int, int, int], gated: bool, direction: str, copy_tb_per_s: float
) -> Result:
    num_experts, n, k = shape
    codes = torch.randint(0, 256, (num_experts, n, k // 2), dtype=torch.uint8, device="cuda")
    sf = torch.randint(1, 127, (num_experts, n, k // 16), dtype=torch.uint8, device="cuda")
    sf = sf.view(torch.float8_e4m3fn)
    check(codes, sf, gated)
    packed = nvfp4_ops.prepack_weight(codes, sf, gated=gated)
    calls = {
        "prepack": lambda: nvfp4_ops.prepack_weight(codes, sf, gated=gated),
        "unpack": lambda: kernels.unpack(packed, n, k),
    }
    time_us = graph_time_us([calls[direction]])
    tb_per_s = 2 * num_experts * n * k * BITS_PER_WEIGHT / 8 / time_us / 1e6
    return Result(
        direction,
        gated,
        num_experts,
        n,
        k,
        round(time_us, 2),
        round(tb_per_s, 3),
        round(tb_per_s / copy_tb_per_s, 3),
    )


def main() -> None:
    out = parse_out(__doc__.splitlines()[0])
    copy = measure_ceilings().copy_tb_per_s
    report = Report(
        "prepack",
        {"copy_tb_per_s": round(copy, 2)},
        "direction | rows | E x N x K | us | TB/s | share of copy",
    )
    for shape in SHAPES:
        for gated in (False, True):
            for direction in ("prepack", "unpack"):
                r = run_case(shape, gated, direction, copy)
                report.add(
                    r,
                    f"{direction} | {'gated' if gated else 'plain'} | {r.num_experts} x {r.n} x "
                    f"{r.k} | {r.time_us} | {r.tb_per_s} | {r.share:.1%}",
                )
    report.write(out)


if __name__ == "__main__":
    sys.exit(main())
