"""quantize_nvfp4 and swizzle_sf against the copy bandwidth.

    python -m bench.quantize [--out DIR]

Outputs are compared with the CPU's bytes on a part of the rows before anything is timed.
"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

import nvfp4_ops
from bench.report import Report, parse_out
from bench.timing import graph_time_us, measure_ceilings

SHAPES = ((16384, 2048), (65536, 4096), (32768, 7168))
CHECKED_ROWS = 256
SWIZZLED_SHAPES = ((1 << 19, 128), (1 << 20, 256))


@dataclass(frozen=True)
class Result:
    """One case; share is of the copy bandwidth."""

    op: str
    rows: int
    columns: int
    time_us: float
    tb_per_s: float
    share: float


def assert_same_bytes(actual: Tensor, expected: Tensor) -> None:
    if not torch.equal(actual.cpu().view(torch.uint8), expected.view(torch.uint8)):
        raise AssertionError("the GPU's bytes differ from the reference's")


def quantize_case(rows: int, columns: int, swizzled: bool, copy_tb_per_s: float) -> Result:
    inputs = [torch.randn(rows, columns, device="cuda").bfloat16() for _ in range(2)]
    scale = nvfp4_ops.global_scale(inputs[0])
    part = nvfp4_ops.quantize_nvfp4(inputs[0][:CHECKED_ROWS], scale, swizzled=swizzled)
    expected = nvfp4_ops.quantize_nvfp4(
        inputs[0][:CHECKED_ROWS].cpu(), scale.cpu(), swizzled=swizzled
    )
    for actual, wanted in zip(part, expected, strict=True):
        assert_same_bytes(actual, wanted)
    time_us = graph_time_us(
        [lambda x=x: nvfp4_ops.quantize_nvfp4(x, scale, swizzled=swizzled) for x in inputs]
    )
    num_bytes = rows * columns * (2 + 1 / 2 + 1 / 16)
    name = "quantize_nvfp4" + (" swizzled" if swizzled else "")
    return result(name, rows, columns, time_us, num_bytes, copy_tb_per_s)


def swizzle_case(rows: int, columns: int, copy_tb_per_s: float) -> Result:
    sf = torch.randint(0, 127, (rows, columns), dtype=torch.uint8, device="cuda")
    sf = sf.view(torch.float8_e4m3fn)
    assert_same_bytes(
        nvfp4_ops.swizzle_sf(sf[:CHECKED_ROWS]), nvfp4_ops.swizzle_sf(sf[:CHECKED_ROWS].cpu())
    )
    time_us = graph_time_us([lambda: nvfp4_ops.swizzle_sf(sf)])
    return result("swizzle_sf", rows, columns, time_us, 2.0 * rows * columns, copy_tb_per_s)


def result(
    op: str, rows: int, columns: int, time_us: float, num_bytes: float, copy_tb_per_s: float
) -> Result:
    tb_per_s = num_bytes / time_us / 1e6
    share = round(tb_per_s / copy_tb_per_s, 3)
    return Result(op, rows, columns, round(time_us, 2), round(tb_per_s, 3), share)


def main() -> None:
    out = parse_out(__doc__.splitlines()[0])
    copy = measure_ceilings().copy_tb_per_s
    report = Report(
        "quantize",
        {"copy_tb_per_s": round(copy, 2)},
        "op | rows x columns | us | TB/s | share of copy",
    )
    cases = [
        *(lambda s=s, w=w: quantize_case(*s, w, copy) for s in SHAPES for w in (False, True)),
        *(lambda s=s: swizzle_case(*s, copy) for s in SWIZZLED_SHAPES),
    ]
    for case in cases:
        done = case()
        report.add(
            done,
            f"{done.op} | {done.rows}x{done.columns} | {done.time_us} | {done.tb_per_s} "
            f"| {done.share:.1%}",
        )
    report.write(out)


if __name__ == "__main__":
    sys.exit(main())
