"""The elementwise ops against the copy bandwidth.

    python -m bench.quantize [--out DIR]

Outputs are compared with the CPU's on a part of the rows before anything is timed. "share of copy"
is of the bandwidth of a 1 GiB copy; "of same size" of a copy that moves as many bytes as the case,
which pays for its launch, ramp and tail as the case does.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

import nvfp4_ops
from bench.report import Report, parse_out
from bench.timing import graph_time_us, measure_ceilings

# 64, 512 and 448 MiB of bf16.
SHAPES = ((16384, 2048), (65536, 4096), (32768, 7168))
CHECKED_ROWS = 256
# 64 and 256 MiB of scales.
SWIZZLED_SHAPES = ((1 << 19, 128), (1 << 20, 256))
NUM_EXPERTS = 64
MIB = 1 << 20

Call = Callable[[Tensor], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """An op on rows; bytes_per_row are those that it has to read and write.

    inputs: makes the rows, on the GPU. exact: the GPU's bytes are the CPU's, not only most.
    """

    op: str
    rows: int
    columns: int
    bytes_per_row: float
    inputs: Callable[[], Tensor]
    call: Call
    exact: bool = True


@dataclass(frozen=True)
class Result:
    """One case; shares are of the copy bandwidth, at 1 GiB and at the case's own size."""

    op: str
    rows: int
    columns: int
    time_us: float
    tb_per_s: float
    share: float
    share_of_same_size: float


def _tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def check(case: Case, x: Tensor) -> None:
    """Bytes of the first rows, on the GPU and on the CPU."""
    part = x[:CHECKED_ROWS]
    for actual, expected in zip(
        _tensors(case.call(part)), _tensors(case.call(part.cpu())), strict=True
    ):
        differ = actual.cpu().view(-1).view(torch.uint8) != expected.view(-1).view(torch.uint8)
        if differ.sum() > (0 if case.exact else 1e-3 * differ.numel()):
            raise AssertionError(f"{case.op}: {int(differ.sum())} bytes differ from the CPU's")


@cache
def copy_time_us(num_bytes: int) -> float:
    """A copy that reads and writes ``num_bytes`` in all, rotated past the L2 cache."""
    num_words = num_bytes // 8
    sets = max(2, 256 * MIB // num_bytes)
    words = [torch.zeros(num_words, dtype=torch.int32, device="cuda") for _ in range(sets)]
    out = torch.empty_like(words[0])
    return graph_time_us([lambda x=x: torch.neg(x, out=out) for x in words])


def run(case: Case, copy_tb_per_s: float) -> Result:
    num_bytes = case.rows * case.bytes_per_row
    sets = max(2, int(256 * MIB // num_bytes))
    inputs = [case.inputs() for _ in range(sets)]
    check(case, inputs[0])
    time_us = graph_time_us([lambda x=x: case.call(x) for x in inputs])
    tb_per_s = num_bytes / time_us / 1e6
    return Result(
        case.op,
        case.rows,
        case.columns,
        round(time_us, 2),
        round(tb_per_s, 3),
        round(tb_per_s / copy_tb_per_s, 3),
        round(copy_time_us(int(num_bytes)) / time_us, 3),
    )


@cache
def _on_device(device: torch.device, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """A scale per tensor and per row, and offs that leave no row out."""
    generator = torch.Generator().manual_seed(0)
    per_row = torch.rand(num_rows, 1, generator=generator) * 0.001 + 0.001
    ends = torch.randint(0, num_rows + 1, (NUM_EXPERTS,), generator=generator).sort().values.int()
    ends[-1] = num_rows
    return torch.tensor(0.0017).to(device), per_row.to(device), ends.to(device)


def quantize_cases(rows: int, k: int) -> Iterator[Case]:
    def rows_of(width: int) -> Callable[[], Tensor]:
        return lambda: torch.randn(rows, width, device="cuda").bfloat16()

    def scale(x: Tensor) -> Tensor:
        return _on_device(x.device, x.shape[0])[0]

    def offs(x: Tensor) -> Tensor:
        return _on_device(x.device, x.shape[0])[2]

    quantized = k * (1 / 2 + 1 / 16)
    for swizzled in (False, True):
        suffix = " swizzled" if swizzled else ""
        yield Case(
            "quantize_nvfp4" + suffix,
            rows,
            k,
            2 * k + quantized,
            rows_of(k),
            lambda x, s=swizzled: nvfp4_ops.quantize_nvfp4(x, scale(x), swizzled=s),
        )
        yield Case(
            f"quantize_nvfp4{suffix}, {NUM_EXPERTS} experts",
            rows,
            k,
            2 * k + quantized,
            rows_of(k),
            lambda x, s=swizzled: nvfp4_ops.quantize_nvfp4(x, scale(x), offs(x), swizzled=s),
        )
        yield Case(
            "activate_and_quantize_nvfp4 silu_mul" + suffix,
            rows,
            k,
            4 * k + quantized,
            rows_of(2 * k),
            lambda x, s=swizzled: nvfp4_ops.activate_and_quantize_nvfp4(
                x, scale(x), activation="silu_mul", swizzled=s
            ),
            exact=False,
        )
    yield Case(
        "quantize_per_token_nvfp4",
        rows,
        k,
        2 * k + quantized + 4,
        rows_of(k),
        nvfp4_ops.quantize_per_token_nvfp4,
    )
    yield Case(
        f"round_nvfp4, {NUM_EXPERTS} experts",
        rows,
        k,
        4 * k,
        rows_of(k),
        lambda x: nvfp4_ops.round_nvfp4(x, scale(x), offs(x)),
    )
    yield Case(
        "round_per_token_nvfp4",
        rows,
        k,
        4 * k + 4,
        rows_of(k),
        nvfp4_ops.round_per_token_nvfp4,
    )
    yield Case("global_scale", rows, k, 2 * k, rows_of(k), nvfp4_ops.global_scale)
    yield Case(
        "global_scale per token",
        rows,
        k,
        2 * k + 4,
        rows_of(k),
        lambda x: nvfp4_ops.global_scale(x, per_token=True),
    )


def dequantize_cases(rows: int, k: int) -> Iterator[Case]:
    """The scales are the first k / 16 bytes of a row of codes: any bytes but NaN will do."""

    def codes() -> Tensor:
        return torch.randint(0, 0x7F, (rows, k // 2), dtype=torch.uint8, device="cuda")

    @cache
    def scales(device: torch.device, num_rows: int, swizzled: bool) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        sf = torch.randint(0, 0x7F, (num_rows, k // 16), dtype=torch.uint8, generator=generator)
        linear = sf.to(device).view(torch.float8_e4m3fn)
        return nvfp4_ops.swizzle_sf(linear) if swizzled else linear

    for swizzled in (False, True):
        yield Case(
            "dequantize_nvfp4 to bf16" + (" swizzled" if swizzled else ""),
            rows,
            k,
            k * (1 / 2 + 1 / 16 + 2),
            codes,
            lambda c, s=swizzled: nvfp4_ops.dequantize_nvfp4(
                c,
                scales(c.device, c.shape[0], s),
                _on_device(c.device, c.shape[0])[0],
                dtype=torch.bfloat16,
            ),
        )


def swizzle_cases(rows: int, columns: int) -> Iterator[Case]:
    def sf() -> Tensor:
        random = torch.randint(0, 127, (rows, columns), dtype=torch.uint8, device="cuda")
        return random.view(torch.float8_e4m3fn)

    def swizzled() -> Tensor:
        return nvfp4_ops.swizzle_sf(sf())

    def unswizzle(tiles: Tensor) -> Tensor:
        num_rows = min(tiles.shape[0] * 128, rows)
        return nvfp4_ops.unswizzle_sf(tiles, (num_rows, columns))

    yield Case("swizzle_sf", rows, columns, 2 * columns, sf, nvfp4_ops.swizzle_sf)
    yield Case("unswizzle_sf", rows, columns, 2 * columns, swizzled, unswizzle)


def main() -> None:
    out = parse_out(__doc__.splitlines()[0])
    copy = measure_ceilings().copy_tb_per_s
    report = Report(
        "quantize",
        {"copy_tb_per_s": round(copy, 2)},
        "op | rows x columns | us | TB/s | share of copy | of same size",
    )
    cases = [
        *(case for shape in SHAPES for case in quantize_cases(*shape)),
        *(case for shape in SHAPES for case in dequantize_cases(*shape)),
        *(case for shape in SWIZZLED_SHAPES for case in swizzle_cases(*shape)),
    ]
    for case in cases:
        done = run(case, copy)
        report.add(
            done,
            f"{done.op} | {done.rows}x{done.columns} | {done.time_us} | {done.tb_per_s} "
            f"| {done.share:.1%} | {done.share_of_same_size:.1%}",
        )
    report.write(out)


if __name__ == "__main__":
    sys.exit(main())
