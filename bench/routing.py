"""Routers, sort_by_expert, permute and combine: microseconds where decoding waits, share of a copy
beyond.

    python -m bench.routing [--out DIR]

Outputs are compared with the CPU's bytes before anything is timed; a router's logits and weights
may differ in the last bit.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import nvfp4_ops
from bench.report import Report, parse_out
from bench.timing import graph_time_us, measure_ceilings

NUM_EXPERTS, TOP_K = 256, 8
SORT_TOKENS = (1, 32, 512, 2048, 8192, 131072)
HIDDEN = 4096
ROW_TOKENS = (1, 64, 1024, 8192)
# One token's codes and block scales of the same hidden size.
PERMUTED = {"hidden": 2 * HIDDEN, "codes": HIDDEN // 2, "block scales": HIDDEN // 16}
CHECKED_TOKENS = 1024
ROUTER_TOKENS = (1, 8, 64, 512, 8192)
GROUPS = {"num_groups": 8, "top_groups": 4}


@dataclass(frozen=True)
class Result:
    """One case; share is of the copy bandwidth."""

    op: str
    tokens: int
    time_us: float
    tb_per_s: float
    share: float


def random_index(tokens: int) -> Tensor:
    return torch.rand(tokens, NUM_EXPERTS, device="cuda").topk(TOP_K, dim=1).indices


def assert_same_bytes(actual: Tensor, expected: Tensor) -> None:
    if not torch.equal(actual.cpu().view(torch.uint8), expected.view(torch.uint8)):
        raise AssertionError("the GPU's bytes differ from the reference's")


def result(op: str, tokens: int, time_us: float, num_bytes: float, copy_tb_per_s: float) -> Result:
    tb_per_s = num_bytes / time_us / 1e6
    share = round(tb_per_s / copy_tb_per_s, 3)
    return Result(op, tokens, round(time_us, 2), round(tb_per_s, 3), share)


def sort_case(tokens: int, copy_tb_per_s: float) -> Result:
    index = random_index(tokens)
    plan = nvfp4_ops.sort_by_expert(index, NUM_EXPERTS)
    for actual, expected in zip(
        plan, nvfp4_ops.sort_by_expert(index.cpu(), NUM_EXPERTS), strict=True
    ):
        assert_same_bytes(actual, expected)
    time_us = graph_time_us([lambda: nvfp4_ops.sort_by_expert(index, NUM_EXPERTS)])
    # Indices of 8 bytes in, a token and a row out.
    num_bytes = tokens * TOP_K * (8 + 4 + 4)
    return result("sort_by_expert", tokens, time_us, num_bytes, copy_tb_per_s)


def router_cases(tokens: int, copy_tb_per_s: float) -> Iterator[Result]:
    """The three steps of routers, of DeepSeek-V3's sizes."""
    x = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
    weight = torch.randn(NUM_EXPERTS, HIDDEN, device="cuda").bfloat16() * HIDDEN**-0.5
    bias = torch.rand(NUM_EXPERTS, device="cuda")
    logits = nvfp4_ops.router_logits(x, weight)
    part = slice(0, CHECKED_TOKENS)
    expected = nvfp4_ops.router_logits(x[part].cpu(), weight.cpu())
    torch.testing.assert_close(logits[part].cpu(), expected, rtol=2**-23, atol=0)
    calls = {
        "softmax_top_k": lambda x: nvfp4_ops.softmax_top_k(x, TOP_K),
        "sigmoid_top_k": lambda x: nvfp4_ops.sigmoid_top_k(x, bias.to(x.device), TOP_K, **GROUPS),
    }
    time_us = graph_time_us([lambda: nvfp4_ops.router_logits(x, weight)])
    num_bytes = 2 * HIDDEN * (tokens + NUM_EXPERTS) + 4 * logits.numel()
    yield result("router_logits", tokens, time_us, num_bytes, copy_tb_per_s)
    for op, call in calls.items():
        (index, weights), wanted = call(logits[part]), call(logits[part].cpu())
        assert_same_bytes(index, wanted[0])
        torch.testing.assert_close(weights.cpu(), wanted[1], rtol=2**-23, atol=0)
        time_us = graph_time_us([lambda call=call: call(logits)])
        # A choice is an index of 8 bytes and a weight of 4.
        num_bytes = 4 * logits.numel() + tokens * TOP_K * (8 + 4)
        yield result(op, tokens, time_us, num_bytes, copy_tb_per_s)


def permute_case(what: str, row_bytes: int, tokens: int, copy_tb_per_s: float) -> Result:
    inputs = [
        torch.randint(0, 256, (tokens, row_bytes), dtype=torch.uint8, device="cuda")
        for _ in range(2)
    ]
    _, token_of_row, _ = nvfp4_ops.sort_by_expert(random_index(tokens), NUM_EXPERTS)
    part = token_of_row[:CHECKED_TOKENS]
    assert_same_bytes(
        nvfp4_ops.permute(inputs[0], part), nvfp4_ops.permute(inputs[0].cpu(), part.cpu())
    )
    time_us = graph_time_us([lambda x=x: nvfp4_ops.permute(x, token_of_row) for x in inputs])
    num_bytes = 2.0 * token_of_row.numel() * row_bytes
    return result(f"permute {what}", tokens, time_us, num_bytes, copy_tb_per_s)


def combine_case(tokens: int, copy_tb_per_s: float) -> Result:
    _, _, row_of_slot = nvfp4_ops.sort_by_expert(random_index(tokens), NUM_EXPERTS)
    rows = torch.randn(tokens * TOP_K, HIDDEN, device="cuda").bfloat16()
    weights = torch.rand(tokens, TOP_K, device="cuda")
    part = slice(0, min(tokens, CHECKED_TOKENS // TOP_K))
    assert_same_bytes(
        nvfp4_ops.combine(rows, row_of_slot[part], weights[part]),
        nvfp4_ops.combine(rows.cpu(), row_of_slot[part].cpu(), weights[part].cpu()),
    )
    time_us = graph_time_us([lambda: nvfp4_ops.combine(rows, row_of_slot, weights)])
    num_bytes = 2.0 * tokens * (TOP_K + 1) * HIDDEN
    return result("combine", tokens, time_us, num_bytes, copy_tb_per_s)


def main() -> None:
    out = parse_out(__doc__.splitlines()[0])
    copy = measure_ceilings().copy_tb_per_s
    report = Report(
        "routing",
        {"copy_tb_per_s": round(copy, 2), "num_experts": NUM_EXPERTS, "top_k": TOP_K},
        "op | tokens | us | TB/s | share of copy",
    )
    cases: list[Callable[[], Iterable[Result]]] = [
        *(lambda t=t: router_cases(t, copy) for t in ROUTER_TOKENS),
        *(lambda t=t: [sort_case(t, copy)] for t in SORT_TOKENS),
        *(
            lambda t=t, w=what, b=row_bytes: [permute_case(w, b, t, copy)]
            for what, row_bytes in PERMUTED.items()
            for t in ROW_TOKENS
        ),
        *(lambda t=t: [combine_case(t, copy)] for t in ROW_TOKENS),
    ]
    for case in cases:
        for done in case():
            report.add(
                done,
                f"{done.op} | {done.tokens} | {done.time_us} | {done.tb_per_s} | {done.share:.1%}",
            )
    report.write(out)


if __name__ == "__main__":
    sys.exit(main())
