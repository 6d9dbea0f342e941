"""The grouped mm alone: prepacked NVFP4 weights times bf16 rows, against the GPU's ceilings.

    python -m bench.grouped_mm [--out DIR]

Every case is checked against float64 on decoded weights before it is timed. Weight sets are
rotated, past the L2 cache; the time is that of the op in a CUDA graph, its first weights loaded
while the call before it ends (``early_weights``), as in a layer. Bytes are those of the weights, of
x and of the output, each counted once.
"""

import sys
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import nvfp4_ops
from bench.report import Report, parse_out
from bench.timing import Ceilings, graph_time_us, measure_ceilings

# Experts, N, K: 151, 302 and 604 MB of weights.
SHAPES = ((64, 2048, 2048), (64, 4096, 2048), (128, 4096, 2048))
ROWS_PER_EXPERT = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
WEIGHT_SETS = 3
BITS_PER_WEIGHT = 4.5


@dataclass(frozen=True)
class Result:
    """One case; the floor is the longer of reading the bytes and doing the arithmetic."""

    num_experts: int
    n: int
    k: int
    rows_per_expert: int
    time_us: float
    tb_per_s: float
    tflop_per_s: float
    share_of_read: float
    times_floor: float
    times_bf16: float


def random_weights(num_experts: int, n: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Codes uniform, scales 16 .. 448."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    shape = (num_experts, n, k // 2)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda", generator=generator)
    shape = (num_experts, n, k // 16)
    sf = torch.randint(0x58, 0x7F, shape, dtype=torch.uint8, device="cuda", generator=generator)
    return codes, sf.view(torch.float8_e4m3fn)


def check(out: Tensor, x: Tensor, codes: Tensor, sf: Tensor, alpha: Tensor, rows: int) -> None:
    """Each expert against float64; raises on a wrong result, which must not be timed."""
    for expert in range(codes.shape[0]):
        span = slice(expert * rows, (expert + 1) * rows)
        w = nvfp4_ops.dequantize_nvfp4(codes[expert], sf[expert], alpha[expert])
        expected = x[span].double() @ w.double().T
        error = (out[span].double() - expected).norm() / expected.norm()
        if not error < 3e-3:
            raise AssertionError(f"expert {expert}: relative error {error:.2e}")


def run_case(
    shape: tuple[int, int, int],
    rows: int,
    sets: list[Tensor],
    raw: tuple[Tensor, Tensor],
    bf16: list[Tensor],
    ceilings: Ceilings,
) -> Result:
    num_experts, n, k = shape
    num_rows = num_experts * rows
    x = torch.randn(num_rows, k, device="cuda").bfloat16()
    offs = (torch.arange(num_experts, device="cuda") + 1).int() * rows
    alpha = torch.rand(num_experts, device="cuda") * 1e-3 + 1e-4

    def call(packed: Tensor) -> Tensor:
        return nvfp4_ops.grouped_scaled_mm(
            x, packed, None, None, alpha, offs, num_columns=n, early_weights=True
        )

    check(call(sets[0]), x, *raw, alpha, rows)
    time_us = graph_time_us([lambda packed=packed: call(packed) for packed in sets])
    bf16_us = graph_time_us([lambda w=w: torch._grouped_mm(x, w, offs=offs) for w in bf16])
    weight_bytes = num_experts * n * k * BITS_PER_WEIGHT / 8
    num_bytes = weight_bytes + 2 * num_rows * (n + k)
    flop = 2.0 * num_rows * n * k
    floor_us = max(
        weight_bytes / ceilings.copy_tb_per_s / 1e6, flop / ceilings.matmul_tflop_per_s / 1e6
    )
    return Result(
        num_experts=num_experts,
        n=n,
        k=k,
        rows_per_expert=rows,
        time_us=round(time_us, 2),
        tb_per_s=round(num_bytes / time_us / 1e6, 3),
        tflop_per_s=round(flop / time_us / 1e6, 1),
        share_of_read=round(num_bytes / time_us / 1e6 / ceilings.read_tb_per_s, 3),
        times_floor=round(time_us / floor_us, 3),
        times_bf16=round(bf16_us / time_us, 2),
    )


def main() -> None:
    out = parse_out(__doc__.splitlines()[0])
    ceilings = measure_ceilings()
    rounded = {name: round(value, 2) for name, value in asdict(ceilings).items()}
    report = Report(
        "grouped_mm",
        {"ceilings": rounded},
        "experts x N x K | rows per expert | us | TB/s | TFLOP/s | share of read | x floor "
        "| x faster than bf16",
    )
    for shape in SHAPES:
        num_experts, n, k = shape
        raw = random_weights(*shape, 0)
        sets = [nvfp4_ops.prepack_weight(*random_weights(*shape, s)) for s in range(WEIGHT_SETS)]
        bf16 = [
            torch.randn(num_experts, n, k, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
            for _ in range(2)
        ]
        for rows in ROWS_PER_EXPERT:
            result = run_case(shape, rows, sets, raw, bf16, ceilings)
            report.add(
                result,
                f"{num_experts}x{n}x{k} | {rows} | {result.time_us} | {result.tb_per_s} "
                f"| {result.tflop_per_s} | {result.share_of_read:.1%} | {result.times_floor} "
                f"| {result.times_bf16}",
            )
    report.write(out)


if __name__ == "__main__":
    sys.exit(main())
