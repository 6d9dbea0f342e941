"""Routing against plain Python: sort, permute, combine, and the two rules that choose experts."""

import importlib
import re
from typing import Any

import numpy as np
import pytest
import torch
from compare import assert_bytes_equal, assert_values_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import int32, random_codes, random_sf
from torch import Tensor

from nvfp4_ops import (
    SigmoidRouter,
    SoftmaxRouter,
    combine,
    permute,
    router_logits,
    sigmoid_top_k,
    softmax_top_k,
    sort_by_expert,
)

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
each_float = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def plain_sort(
    index: list[list[int]], num_experts: int
) -> tuple[list[int], list[int], list[list[int]]]:
    """offs, token_of_row and row_of_slot, by going through all slots for each expert."""
    offs: list[int] = []
    token_of_row: list[int] = []
    row_of_slot = [[-1] * len(slots) for slots in index]
    for expert in range(num_experts):
        for token, slots in enumerate(index):
            for slot, chosen in enumerate(slots):
                if chosen == expert:
                    row_of_slot[token][slot] = len(token_of_row)
                    token_of_row.append(token)
        offs.append(len(token_of_row))
    left_over = sum(map(len, index)) - len(token_of_row)
    return offs, token_of_row + [-1] * left_over, row_of_slot


def assert_sorted_as_plain(index: Tensor, num_experts: int) -> None:
    offs, token_of_row, row_of_slot = sort_by_expert(index, num_experts)
    expected = plain_sort(index.tolist(), num_experts)
    assert (offs.tolist(), token_of_row.tolist(), row_of_slot.tolist()) == expected
    assert {x.dtype for x in (offs, token_of_row, row_of_slot)} == {torch.int32}
    assert offs.shape == (num_experts,)
    assert token_of_row.shape == (index.numel(),)
    assert row_of_slot.shape == index.shape


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_sort_by_expert_works_the_documented_example(dtype: torch.dtype) -> None:
    top_k_index = torch.tensor([[2, 0], [2, 1], [0, 2]], dtype=dtype)
    offs, token_of_row, row_of_slot = sort_by_expert(top_k_index, 3)
    assert_bytes_equal(offs, int32(2, 3, 6))
    assert_bytes_equal(token_of_row, int32(0, 2, 1, 0, 1, 2))
    assert_bytes_equal(row_of_slot, int32(3, 0, 4, 2, 1, 5).view(3, 2))


def test_sort_by_expert_documented_example_is_in_the_docstring() -> None:
    # The function ``permute`` hides the module of that name.
    module = importlib.import_module("nvfp4_ops.routing.permute")
    assert module.__doc__ is not None
    for line in (
        "top_k_index   = [[2, 0], [2, 1], [0, 2]]",
        "offs          = [2, 3, 6]",
        "token_of_row  = [0, 2, 1, 0, 1, 2]",
        "row_of_slot   = [[3, 0], [4, 2], [1, 5]]",
    ):
        assert line in module.__doc__


@pytest.mark.parametrize(
    ("index", "num_experts"),
    [
        ([[2, 0], [9, 1], [0, 3]], 3),
        ([[7, 8], [3, 3]], 3),
        ([[1, 1, 1], [1, 1, 1]], 4),
        ([[0], [0], [0]], 1),
        ([[5], [0], [1]], 1),
        ([[2**40, 0]], 2),
    ],
    ids=["sentinels", "all-sentinels", "all-on-one", "one-expert", "one-here", "huge-index"],
)
def test_sort_by_expert_edge_cases(index: list[list[int]], num_experts: int) -> None:
    assert_sorted_as_plain(torch.tensor(index), num_experts)


@pytest.mark.parametrize("shape", [(0, 2), (0, 1), (3, 0)], ids=str)
def test_sort_by_expert_without_slots(shape: tuple[int, int]) -> None:
    assert_sorted_as_plain(torch.empty(shape, dtype=torch.int64), 3)


def test_sort_by_expert_strided_index() -> None:
    index = torch.randint(0, 5, (4, 30)).t()
    assert_sorted_as_plain(index, 4)


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.integers(0, 20),
    top_k=st.integers(1, 4),
    num_experts=st.integers(1, 6),
    dtype=st.sampled_from([torch.int64, torch.int32]),
    seed=st.integers(0, 2**16),
)
def test_sort_by_expert_equals_plain_python(
    tokens: int, top_k: int, num_experts: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, num_experts + 2, (tokens, top_k), generator=generator)
    assert_sorted_as_plain(index.to(dtype), num_experts)


@pytest.mark.parametrize(
    ("index", "num_experts", "error", "message"),
    [
        (torch.zeros(3).long(), 3, ValueError, "top_k_index: must be (T, top_k) (rank 2)"),
        (torch.zeros(3, 2), 3, TypeError, "top_k_index: must be int64 or int32, got float32"),
        (torch.zeros(3, 2).short(), 3, TypeError, "int64 or int32, got int16"),
        (torch.zeros(3, 2).int(), 0, ValueError, "num_experts: must be positive, got 0"),
        (
            torch.tensor([[0, -1]]),
            3,
            ValueError,
            "top_k_index: must be 0 to 2, or 3 or more for another rank's expert, got -1",
        ),
    ],
    ids=["rank", "float", "int16", "no-experts", "negative"],
)
def test_sort_by_expert_rejects(
    index: Tensor, num_experts: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        sort_by_expert(index, num_experts)


def rows_to_permute(name: str) -> Tensor:
    if name == "uint8":
        return random_codes(5, 8)
    if name == "float8":
        return torch.arange(256).byte()[:250].view(5, 50).view(torch.float8_e4m3fn)
    if name == "float8-rank3":
        return random_sf(5, 2, 3)
    if name == "fp32-rank1":
        return torch.randn(5)
    if name == "fp32-rank3":
        return torch.randn(5, 2, 3)
    if name == "int64":
        return torch.randint(-(2**60), 2**60, (5, 2))
    if name == "strided-uint8":
        return random_codes(8, 5).t()
    if name == "no-columns":
        return torch.randn(5, 0)
    x = torch.randn(5, 16)
    x[2] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0]).repeat(4)
    return x.to({"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name])


@pytest.mark.parametrize(
    "name",
    [
        "bf16",
        "fp16",
        "fp32",
        "uint8",
        "float8",
        "float8-rank3",
        "fp32-rank1",
        "fp32-rank3",
        "int64",
        "strided-uint8",
        "no-columns",
    ],
)
def test_permute_copies_bytes(name: str) -> None:
    x = rows_to_permute(name)
    tokens = [4, -1, 2, 2, 0, -1, 1]
    actual = permute(x, int32(*tokens))
    zero = torch.zeros_like(x[0].contiguous().view(torch.uint8)) if x.ndim > 1 else None
    for row, token in enumerate(tokens):
        if token >= 0:
            expected = x[token].contiguous()
        elif zero is None:
            expected = torch.zeros((), dtype=x.dtype)
        else:
            expected = zero.view(x.dtype)
        assert_bytes_equal(actual[row], expected, f"row {row}")


@pytest.mark.parametrize(("tokens", "rows"), [(0, 0), (0, 3), (3, 0)], ids=str)
def test_permute_without_tokens_or_rows(tokens: int, rows: int) -> None:
    actual = permute(torch.ones(tokens, 4), torch.full((rows,), -1, dtype=torch.int32))
    assert_bytes_equal(actual, torch.zeros(rows, 4))


@pytest.mark.parametrize(
    ("x", "token_of_row", "error", "message"),
    [
        (torch.ones(()), int32(0), ValueError, "x: must have a row dimension, got a scalar"),
        (torch.ones(3), int32(0).long(), TypeError, "token_of_row: must be int32, got int64"),
        (
            torch.ones(3),
            int32(0).view(1, 1),
            ValueError,
            "token_of_row: must be (R,) (rank 1), got shape (1, 1)",
        ),
        (
            torch.ones(3),
            int32(0).to("meta"),
            ValueError,
            "token_of_row: must be on cpu like the first argument, on meta",
        ),
    ],
    ids=["scalar", "int64", "rank", "device"],
)
def test_permute_rejects(
    x: Tensor, token_of_row: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        permute(x, token_of_row)


def combine_step_by_step(rows: Tensor, row_of_slot: Tensor, weights: Tensor) -> Tensor:
    """One fp32 product and one fp32 sum at a time."""
    values, scales = rows.float().numpy(), weights.float().numpy()
    out = np.zeros((row_of_slot.shape[0], rows.shape[1]), dtype=np.float32)
    for token, slots in enumerate(row_of_slot.tolist()):
        for column in range(rows.shape[1]):
            total = np.float32(0)
            for slot, row in enumerate(slots):
                if row >= 0:
                    total = np.float32(
                        total + np.float32(values[row, column] * scales[token, slot])
                    )
            out[token, column] = total
    return torch.from_numpy(out).to(rows.dtype)


def plan(tokens: int, top_k: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """A random plan; the expert ``num_experts`` is another rank's."""
    index = torch.rand(tokens, num_experts + 1).argsort(dim=1)[:, :top_k]
    return sort_by_expert(index, num_experts)


@pytest.mark.parametrize("weight_dtype", FLOATS, ids=str)
@each_float
def test_combine_equals_rounding_step_by_step(
    dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    _, _, row_of_slot = plan(11, 4, 6)
    rows, weights = torch.randn(44, 8).to(dtype), torch.rand(11, 4).to(weight_dtype)
    actual = combine(rows, row_of_slot, weights)
    assert_bytes_equal(actual, combine_step_by_step(rows, row_of_slot, weights))


def test_combine_adds_the_slots_in_order() -> None:
    rows = torch.tensor([[1e8], [1.0], [-1e8]])
    weights = torch.ones(2, 3)
    slots = int32(0, 2, 1, 0, 1, 2).view(2, 3)
    assert combine(rows, slots, weights).tolist() == [[1.0], [0.0]]


def test_combine_slot_without_row_adds_nothing() -> None:
    rows = torch.tensor([[2.0, 3.0], [torch.nan, torch.inf]])
    slots = int32(0, -1, -1, -1).view(2, 2)
    for poison in (torch.nan, torch.inf, 1.0):
        weights = torch.tensor([[0.5, poison], [poison, poison]])
        assert combine(rows, slots, weights).tolist() == [[1.0, 1.5], [0.0, 0.0]]


def test_combine_nan_stays_in_its_token() -> None:
    _, _, row_of_slot = sort_by_expert(torch.randint(0, 4, (6, 2)), 4)
    rows, weights = torch.randn(12, 8).bfloat16(), torch.rand(6, 2)
    clean = combine(rows, row_of_slot, weights)
    rows[row_of_slot[3, 1]] = torch.nan
    actual = combine(rows, row_of_slot, weights)
    assert bool(actual[3].isnan().all())
    others = [0, 1, 2, 4, 5]
    assert_bytes_equal(actual[others], clean[others])


@each_float
def test_combine_with_one_hot_weights_undoes_permute(dtype: torch.dtype) -> None:
    x = torch.randn(9, 16).to(dtype)
    index = torch.rand(9, 5).argsort(dim=1)[:, :3]
    _, token_of_row, row_of_slot = sort_by_expert(index, 5)
    for slot in range(3):
        weights = torch.zeros(9, 3)
        weights[:, slot] = 1
        assert_values_equal(combine(permute(x, token_of_row), row_of_slot, weights), x)


def test_combine_token_does_not_depend_on_the_batch() -> None:
    x, weights = torch.randn(40, 16).bfloat16(), torch.rand(40, 3)
    index = torch.rand(40, 8).argsort(dim=1)[:, :3]

    def moe(tokens: slice) -> Tensor:
        _, token_of_row, row_of_slot = sort_by_expert(index[tokens], 8)
        return combine(permute(x[tokens], token_of_row), row_of_slot, weights[tokens])

    whole = moe(slice(0, 40))
    assert_bytes_equal(moe(slice(0, 40)), whole, "again")
    for start, end in ((0, 1), (7, 8), (39, 40), (3, 20)):
        assert_bytes_equal(moe(slice(start, end)), whole[start:end])


@pytest.mark.parametrize("tokens", [0, 1, 127, 128, 129])
def test_combine_any_number_of_tokens(tokens: int) -> None:
    _, token_of_row, row_of_slot = plan(tokens, 2, 3)
    rows, weights = torch.randn(token_of_row.shape[0], 4), torch.rand(tokens, 2)
    actual = combine(rows, row_of_slot, weights)
    assert_bytes_equal(actual, combine_step_by_step(rows, row_of_slot, weights))


@pytest.mark.parametrize(
    ("replaced", "error", "message"),
    [
        ({"rows": torch.ones(4)}, ValueError, "rows: must be (R, H) (rank 2), got shape (4,)"),
        (
            {"rows": torch.ones(4, 2).double()},
            TypeError,
            "rows: must be bfloat16 or float16 or float32, got float64",
        ),
        (
            {"row_of_slot": int32(0, 1, 2, 3)},
            ValueError,
            "row_of_slot: must be (T, top_k) (rank 2), got shape (4,)",
        ),
        (
            {"row_of_slot": torch.zeros(2, 2).long()},
            TypeError,
            "row_of_slot: must be int32, got int64",
        ),
        (
            {"top_k_weights": torch.ones(2, 3)},
            ValueError,
            "top_k_weights: must be (T, top_k) = (2, 2), got shape (2, 3)",
        ),
        (
            {"top_k_weights": torch.ones(2, 2).double()},
            TypeError,
            "top_k_weights: must be float32 or bfloat16 or float16, got float64",
        ),
        (
            {"top_k_weights": torch.ones(2, 2, device="meta")},
            ValueError,
            "top_k_weights: must be on cpu like the first argument, on meta",
        ),
    ],
    ids=["rank", "float64", "slots-rank", "slots-int64", "weights-shape", "weights-64", "device"],
)
def test_combine_rejects(replaced: dict[str, Any], error: type[Exception], message: str) -> None:
    valid = {
        "rows": torch.ones(4, 2),
        "row_of_slot": int32(0, 1, 2, 3).view(2, 2),
        "top_k_weights": torch.ones(2, 2),
    }
    with pytest.raises(error, match=re.escape(message)):
        combine(**{**valid, **replaced})


@each_float
def test_router_logits_round_the_exact_sum_once(dtype: torch.dtype) -> None:
    x, weight = torch.randn(7, 48).to(dtype), torch.randn(5, 48).bfloat16()
    expected = np.array(
        [
            [sum(a * b for a, b in zip(row, w, strict=True)) for w in weight.tolist()]
            for row in x.tolist()
        ],
        dtype=np.float32,
    )
    assert_bytes_equal(router_logits(x, weight), torch.from_numpy(expected))


@pytest.mark.parametrize("hidden", [64, 2880])
@each_float
def test_router_logits_of_a_token_do_not_depend_on_the_batch(
    dtype: torch.dtype, hidden: int
) -> None:
    x, weight = torch.randn(33, hidden).to(dtype), torch.randn(32, hidden).to(dtype)
    whole = router_logits(x, weight)
    for token in range(33):
        assert_bytes_equal(router_logits(x[token : token + 1], weight), whole[token : token + 1])
    for part in (slice(0, 2), slice(3, 20), slice(1, 33, 4)):
        assert_bytes_equal(router_logits(x[part], weight), whole[part])


@pytest.mark.parametrize(
    ("x", "weight", "error", "message"),
    [
        (torch.ones(3), torch.ones(4, 3), ValueError, "x: must be (T, H) (rank 2)"),
        (torch.ones(3, 2).double(), torch.ones(4, 2), TypeError, "x: must be float32 or"),
        (torch.ones(3, 2), torch.ones(4, 2).int(), TypeError, "weight: must be float32 or"),
        (
            torch.ones(3, 2),
            torch.ones(2, 4),
            ValueError,
            "weight: must be (E, H) = (2, 2), got shape (2, 4)",
        ),
        (torch.ones(3, 2), torch.ones(2), ValueError, "weight: must be (E, H) (rank 2)"),
    ],
    ids=["x-rank", "x-dtype", "weight-dtype", "weight-shape", "weight-rank"],
)
def test_router_logits_rejects(
    x: Tensor, weight: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        router_logits(x, weight)


def mixtral_rule(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """As the routers of Mixtral and Qwen in transformers."""
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    weights, index = torch.topk(probabilities, top_k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return index, weights


def deepseek_v3_rule(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    num_groups: int,
    top_groups: int,
    renormalize: bool,
    scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """As DeepSeek-V3's router in transformers."""
    scores = logits.float().sigmoid()
    choice = scores + bias.unsqueeze(0)
    grouped = choice.view(-1, num_groups, logits.shape[1] // num_groups)
    group_scores = grouped.topk(2, dim=-1)[0].sum(dim=-1)
    group_index = torch.topk(group_scores, k=top_groups, dim=-1, sorted=False)[1]
    group_mask = torch.zeros_like(group_scores).scatter(1, group_index, 1)
    score_mask = group_mask.unsqueeze(-1).expand_as(grouped).reshape_as(choice)
    masked = choice.masked_fill(~score_mask.bool(), float("-inf"))
    index = torch.topk(masked, k=top_k, dim=-1)[1]
    weights = scores.gather(1, index)
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return index, weights * scaling_factor


def distinct_logits(tokens: int, num_experts: int) -> Tensor:
    """No two scores of a token closer than fp32 can tell: choices are not a matter of rounding."""
    order = torch.rand(tokens, num_experts).argsort(dim=1).float()
    return (order - num_experts / 2) * 0.11 + torch.rand(tokens, num_experts) * 0.05


@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalized", "plain"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (128, 8), (4, 4), (1, 1)], ids=str)
def test_softmax_top_k_equals_mixtral(num_experts: int, top_k: int, renormalize: bool) -> None:
    logits = distinct_logits(33, num_experts)
    index, weights = softmax_top_k(logits, top_k, renormalize=renormalize)
    expected_index, expected_weights = mixtral_rule(logits, top_k, renormalize)
    assert_bytes_equal(index, expected_index)
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=0)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalized", "plain"])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "num_groups", "top_groups", "scaling_factor"),
    [(256, 8, 8, 4, 2.5), (16, 4, 4, 2, 1.0), (8, 2, 1, 1, 1.8), (8, 8, 2, 2, 1.0)],
    ids=["deepseek-v3", "small", "one-group", "all-experts"],
)
def test_sigmoid_top_k_equals_deepseek_v3(
    num_experts: int,
    top_k: int,
    num_groups: int,
    top_groups: int,
    scaling_factor: float,
    renormalize: bool,
    bias: bool,
) -> None:
    logits = distinct_logits(33, num_experts) / 4
    correction = torch.rand(num_experts) * 0.2 if bias else None
    index, weights = sigmoid_top_k(
        logits,
        correction,
        top_k,
        num_groups=num_groups,
        top_groups=top_groups,
        renormalize=renormalize,
        scaling_factor=scaling_factor,
    )
    expected_index, expected_weights = deepseek_v3_rule(
        logits,
        torch.zeros(num_experts) if correction is None else correction,
        top_k,
        num_groups,
        top_groups,
        renormalize,
        scaling_factor,
    )
    assert_bytes_equal(index, expected_index)
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=0)


def test_sigmoid_top_k_bias_chooses_but_does_not_weigh() -> None:
    logits = torch.tensor([[3.0, 2.0, -3.0, -2.0]])
    index, weights = sigmoid_top_k(logits, torch.tensor([0.0, 0.0, 5.0, 0.0]), 2, renormalize=False)
    assert index.tolist() == [[2, 0]]
    torch.testing.assert_close(weights, torch.sigmoid(torch.tensor([[-3.0, 3.0]])))


def test_sigmoid_top_k_experts_outside_the_groups_lose_to_negative_scores() -> None:
    logits, bias = torch.tensor([[0.0, 0.0, 1.0, 2.0]]), torch.full((4,), -5.0)
    index, _ = sigmoid_top_k(logits, bias, 2, num_groups=2, top_groups=1)
    assert index.tolist() == [[3, 2]]


def test_sigmoid_top_k_groups_are_scored_by_their_two_best() -> None:
    # Group 0 has the best expert, group 1 the best pair.
    logits = torch.tensor([[4.0, -9.0, -9.0, 2.0, 1.0, -9.0]])
    index, _ = sigmoid_top_k(logits, None, 2, num_groups=2, top_groups=1)
    assert index.tolist() == [[3, 4]]


@each_float
def test_top_k_ties_go_to_the_lower_index(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0] * 6, [1, 3, 3, 1, 3, 1], [-1, -1, 5, -1, -1, -1]]).to(dtype)
    expected = [[0, 1, 2, 3], [1, 2, 4, 0], [2, 0, 1, 3]]
    assert softmax_top_k(logits, 4)[0].tolist() == expected
    assert sigmoid_top_k(logits, None, 4)[0].tolist() == expected
    grouped = torch.zeros(2, 8, dtype=dtype)
    index, _ = sigmoid_top_k(grouped, torch.zeros(8), 3, num_groups=4, top_groups=2)
    assert index.tolist() == [[0, 1, 2]] * 2


def test_top_k_ties_among_many_experts() -> None:
    logits = torch.zeros(4, 512)
    logits[:, 300:] = 1
    for rule in (softmax_top_k(logits, 8), sigmoid_top_k(logits, None, 8)):
        assert rule[0].tolist() == [list(range(300, 308))] * 4


@pytest.mark.parametrize("magnitude", [0.0, 80.0, 1e4, 3e38])
def test_top_k_weights_are_finite(magnitude: float) -> None:
    logits = torch.randn(9, 8).sign() * magnitude
    logits[0] = -magnitude
    for _, weights in (
        softmax_top_k(logits, 3),
        softmax_top_k(logits, 3, renormalize=False),
        sigmoid_top_k(logits, None, 3),
        sigmoid_top_k(logits, torch.randn(8), 3, num_groups=2, top_groups=1),
    ):
        assert bool(weights.isfinite().all())
        assert bool((weights >= 0).all())
        assert bool((weights <= 1).all())


def test_top_k_without_tokens() -> None:
    for index, weights in (
        softmax_top_k(torch.empty(0, 8), 3),
        sigmoid_top_k(torch.empty(0, 8), None, 3, num_groups=2, top_groups=1),
    ):
        assert_bytes_equal(index, torch.empty(0, 3, dtype=torch.int64))
        assert_bytes_equal(weights, torch.empty(0, 3))


def test_top_k_token_does_not_depend_on_the_batch() -> None:
    logits = torch.randn(64, 32)
    for rule in (
        lambda x: softmax_top_k(x, 4),
        lambda x: sigmoid_top_k(x, torch.linspace(-1, 1, 32), 4, num_groups=4, top_groups=2),
    ):
        index, weights = rule(logits)
        for token in range(64):
            alone = rule(logits[token : token + 1])
            assert_bytes_equal(alone[0], index[token : token + 1])
            assert_bytes_equal(alone[1], weights[token : token + 1])


@pytest.mark.parametrize(
    ("logits", "top_k", "error", "message"),
    [
        (torch.ones(4), 2, ValueError, "logits: must be (T, E) (rank 2), got shape (4,)"),
        (torch.ones(3, 4).double(), 2, TypeError, "logits: must be float32 or bfloat16 or"),
        (torch.ones(3, 4), 0, ValueError, "top_k: must be between 1 and E = 4, got 0"),
        (torch.ones(3, 4), 5, ValueError, "top_k: must be between 1 and E = 4, got 5"),
    ],
    ids=["rank", "dtype", "zero", "too-many"],
)
def test_top_k_rejects(logits: Tensor, top_k: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        softmax_top_k(logits, top_k)
    with pytest.raises(error, match=re.escape(message)):
        sigmoid_top_k(logits, None, top_k)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"correction_bias": torch.ones(8).double()},
            TypeError,
            "correction_bias: must be float32 or bfloat16, got float64",
        ),
        (
            {"correction_bias": torch.ones(7)},
            ValueError,
            "correction_bias: must be (E,) = (8,), got shape (7,)",
        ),
        ({"num_groups": 3}, ValueError, "num_groups: must divide E = 8, got 3"),
        ({"num_groups": 0}, ValueError, "num_groups: must divide E = 8, got 0"),
        ({"num_groups": 8}, ValueError, "num_groups: a group must have 2 experts, got 1"),
        (
            {"num_groups": 4, "top_groups": 5},
            ValueError,
            "top_groups: must be between 1 and num_groups = 4, got 5",
        ),
        (
            {"num_groups": 4, "top_groups": 0},
            ValueError,
            "top_groups: must be between 1 and num_groups = 4, got 0",
        ),
        (
            {"num_groups": 4, "top_groups": 1},
            ValueError,
            "top_k: must be at most the 2 experts of the 1 chosen groups, got 3",
        ),
    ],
    ids=[
        "bias-dtype",
        "bias-shape",
        "groups-divide",
        "no-groups",
        "tiny-groups",
        "top-groups-many",
        "top-groups-none",
        "top-k-of-groups",
    ],
)
def test_sigmoid_top_k_rejects(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"correction_bias": None, **options}
    with pytest.raises(error, match=re.escape(message)):
        sigmoid_top_k(torch.ones(3, 8), top_k=3, **arguments)


@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalized", "plain"])
def test_softmax_router_equals_mixtral(renormalize: bool) -> None:
    router = SoftmaxRouter(64, 8, 2, renormalize=renormalize)
    x = torch.randn(12, 64)
    index, weights = router(x)
    logits = (x.double() @ router.weight.double().T).float()
    expected_index, expected_weights = mixtral_rule(logits, 2, renormalize)
    assert_bytes_equal(index, expected_index)
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=0)


def test_sigmoid_router_equals_deepseek_v3() -> None:
    router = SigmoidRouter(
        64, 16, 4, num_groups=4, top_groups=2, renormalize=True, scaling_factor=2.5
    )
    router.e_score_correction_bias.copy_(torch.rand(16))
    x = torch.randn(12, 64)
    index, weights = router(x)
    logits = (x.double() @ router.weight.double().T).float()
    expected_index, expected_weights = deepseek_v3_rule(
        logits, router.e_score_correction_bias, 4, 4, 2, True, 2.5
    )
    assert_bytes_equal(index, expected_index)
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=0)


@pytest.mark.parametrize("router_class", [SoftmaxRouter, SigmoidRouter])
def test_router_state_round_trips(
    router_class: type[SoftmaxRouter] | type[SigmoidRouter],
) -> None:
    saved, loaded = router_class(64, 8, 2), router_class(64, 8, 2)
    loaded.load_state_dict(saved.state_dict())
    x = torch.randn(12, 64)
    for got, want in zip(loaded(x), saved(x), strict=True):
        assert_bytes_equal(got, want)
    names = {"weight"} | ({"e_score_correction_bias"} if router_class is SigmoidRouter else set())
    assert set(saved.state_dict()) == names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("router_class", [SoftmaxRouter, SigmoidRouter])
def test_router_runs_in_half_precision(
    router_class: type[SoftmaxRouter] | type[SigmoidRouter], dtype: torch.dtype
) -> None:
    router = router_class(64, 8, 2).to(dtype)
    x = torch.randn(12, 64).to(dtype)
    index, weights = router(x)
    logits = router_logits(x, router.weight)
    assert_bytes_equal(index, logits.sort(descending=True, stable=True).indices[:, :2].contiguous())
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(12))


@pytest.mark.parametrize("top_k", [0, 9])
@pytest.mark.parametrize("router_class", [SoftmaxRouter, SigmoidRouter])
def test_router_rejects_top_k(
    router_class: type[SoftmaxRouter] | type[SigmoidRouter], top_k: int
) -> None:
    with pytest.raises(ValueError, match=f"top_k: must be between 1 and 8, got {top_k}"):
        router_class(64, 8, top_k)


def test_permute_and_combine_refuse_indices_that_are_not_there() -> None:
    x, rows = torch.ones(3, 4), torch.ones(5, 4)
    for bad in (-2, 3):
        with pytest.raises(ValueError, match=f"token_of_row: must be -1 or .* 3 tokens, got {bad}"):
            permute(x, torch.tensor([0, bad], dtype=torch.int32))
    for bad in (-2, 5):
        with pytest.raises(ValueError, match=f"row_of_slot: must be -1 or .* 5 rows, got {bad}"):
            combine(rows, torch.tensor([[0, bad]], dtype=torch.int32), torch.ones(1, 2))


def test_sigmoid_router_checks_its_groups_at_once() -> None:
    with pytest.raises(ValueError, match="num_groups: must divide E = 8, got 3"):
        SigmoidRouter(16, 8, 2, num_groups=3)
