"""quantize_nvfp4 and swizzle_sf against the copy bandwidth.

    python -m bench.quantize [--out DIR]

Outputs are compared with the CPU's bytes on a part of the rows before anything is timed.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import nvfp4_ops
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    out = parser.parse_args().out
    copy = measure_ceilings().copy_tb_per_s
    header = {
        "command": "python -m bench.quantize",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "nvfp4_ops": nvfp4_ops.__version__,
        "copy_tb_per_s": round(copy, 2),
    }
    lines = [f"{name}: {value}" for name, value in header.items()]
    lines.append("op | rows x columns | us | TB/s | share of copy")
    print("\n".join(lines), flush=True)
    results = []
    cases = [
        *(lambda s=s, w=w: quantize_case(*s, w, copy) for s in SHAPES for w in (False, True)),
        *(lambda s=s: swizzle_case(*s, copy) for s in SWIZZLED_SHAPES),
    ]
    for case in cases:
        done = case()
        results.append(done)
        lines.append(
            f"{done.op} | {done.rows}x{done.columns} | {done.time_us} | {done.tb_per_s} "
            f"| {done.share:.1%}"
        )
        print(lines[-1], flush=True)
    out.mkdir(parents=True, exist_ok=True)
    document = header | {"results": [asdict(done) for done in results]}
    (out / "quantize.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / "quantize.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
