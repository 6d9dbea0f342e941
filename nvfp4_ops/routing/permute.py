"""Sort rows by expert and back: sort_by_expert, permute, combine.

Worked example, T = 3 tokens, top_k = 2, E = 3 experts:

    top_k_index   = [[2, 0], [2, 1], [0, 2]]        slot (t, j) = expert of token t
    offs          = [2, 3, 6]                       expert 0 has rows 0-1, 1 row 2, 2 rows 3-5
    token_of_row  = [0, 2, 1, 0, 1, 2]              rows of an expert by rising token
    row_of_slot   = [[3, 0], [4, 2], [1, 5]]        where each slot went

A slot whose index is E or more belongs to another rank (expert parallelism): it gets no row
(row_of_slot -1), and the rows left over at the end have token_of_row -1.
"""

import torch
from torch import Tensor

from nvfp4_ops import kernels
from nvfp4_ops.plans import Run
from nvfp4_ops.registry import (
    check_dtype,
    check_indices,
    check_rank,
    check_same_device,
    check_shape,
    register,
)


def _check_sort(top_k_index: Tensor, num_experts: int) -> None:
    check_rank("top_k_index", top_k_index, 2, "(T, top_k)")
    check_dtype("top_k_index", top_k_index, torch.int64, torch.int32)
    if num_experts < 1:
        raise ValueError(f"num_experts: must be positive, got {num_experts}")
    if top_k_index.device.type != "cpu" or isinstance(top_k_index, torch._subclasses.FakeTensor):
        return
    if top_k_index.numel() and int(top_k_index.min()) < 0:
        raise ValueError(
            f"top_k_index: must be 0 to {num_experts - 1}, or {num_experts} or more for another "
            f"rank's expert, got {int(top_k_index.min())}"
        )


def _empty_plan(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens, top_k = top_k_index.shape
    return (
        top_k_index.new_empty(num_experts, dtype=torch.int32),
        top_k_index.new_empty(tokens * top_k, dtype=torch.int32),
        top_k_index.new_empty(tokens, top_k, dtype=torch.int32),
    )


def _sort_fake(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    _check_sort(top_k_index, num_experts)
    return _empty_plan(top_k_index, num_experts)


def _sort_plan(top_k_index: Tensor, num_experts: int) -> Run | None:
    _check_sort(top_k_index, num_experts)
    if not top_k_index.is_cuda or kernels.why_no_elementwise(top_k_index, num_experts) is not None:
        return None
    launch = kernels.prepare_sort(top_k_index, num_experts)

    def run(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        outputs = _empty_plan(top_k_index, num_experts)
        launch(top_k_index, *outputs)
        return outputs

    return run


def _sort_reference(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    _, top_k = top_k_index.shape
    expert = top_k_index.flatten().clamp(max=num_experts)
    expert_sorted, slot_of_row = expert.sort(stable=True)
    experts = torch.arange(num_experts, device=expert.device, dtype=expert.dtype)
    offs = torch.searchsorted(expert_sorted, experts, right=True, out_int32=True)
    rows = torch.arange(expert.numel(), device=expert.device)
    row_of_slot = torch.empty_like(rows)
    row_of_slot[slot_of_row] = torch.where(expert_sorted < num_experts, rows, -1)
    token_of_row = torch.where(expert_sorted < num_experts, slot_of_row // max(top_k, 1), -1)
    return offs, token_of_row.int(), row_of_slot.int().view_as(top_k_index)


_sort_by_expert = register(
    "sort_by_expert(Tensor top_k_index, int num_experts) -> (Tensor, Tensor, Tensor)",
    fake=_sort_fake,
    kernel=_sort_reference,
    plan=_sort_plan,
)


def sort_by_expert(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order the T * top_k slots by expert, then by token: the plan of permute and combine.

    Args:
        top_k_index: (T, top_k) int64 or int32 expert of each slot; num_experts or more where the
            expert is another rank's.
        num_experts: E.

    Returns:
        offs: (E,) int32 end row of each expert.
        token_of_row: (T * top_k,) int32 token that each row is a copy of; -1 from offs[-1] on.
        row_of_slot: (T, top_k) int32 row of each slot; -1 where the slot has none.

    The module's docstring works an example.

    Raises:
        TypeError: another dtype. ValueError: not a matrix, or (on the CPU) a negative index; a
            GPU, where looking would mean waiting, drops it like one of E or more.
    """
    return _sort_by_expert(top_k_index, num_experts)


def _check_permute(x: Tensor, token_of_row: Tensor) -> None:
    if x.ndim < 1:
        raise ValueError("x: must have a row dimension, got a scalar")
    check_rank("token_of_row", token_of_row, 1, "(R,)")
    check_dtype("token_of_row", token_of_row, torch.int32)
    check_same_device("token_of_row", token_of_row, x.device)


def _empty_rows(x: Tensor, token_of_row: Tensor) -> Tensor:
    return x.new_empty(token_of_row.shape[0], *x.shape[1:])


def _permute_fake(x: Tensor, token_of_row: Tensor) -> Tensor:
    _check_permute(x, token_of_row)
    return _empty_rows(x, token_of_row)


def _permute_plan(x: Tensor, token_of_row: Tensor) -> Run | None:
    _check_permute(x, token_of_row)
    check_indices("token_of_row", token_of_row, x.shape[0], "tokens")
    if not token_of_row.numel() or not kernels.has_elementwise(x):
        return None
    launch = kernels.prepare_permute(x, token_of_row)
    shape = (token_of_row.shape[0], *x.shape[1:])

    def run(x: Tensor, token_of_row: Tensor) -> Tensor:
        out = x.new_empty(*shape)
        launch(x, token_of_row, out)
        return out

    return run


def _permute_reference(x: Tensor, token_of_row: Tensor) -> Tensor:
    # float8 has no indexing of its own on every device; the bytes do.
    rows = x.view(torch.uint8) if x.dtype.itemsize == 1 else x
    padded = torch.cat([rows, rows.new_zeros((1, *rows.shape[1:]))])
    # -1 is the row of zeros that was just appended.
    return padded[token_of_row.long()].view(x.dtype)


_permute = register(
    "permute(Tensor x, Tensor token_of_row) -> Tensor",
    fake=_permute_fake,
    kernel=_permute_reference,
    plan=_permute_plan,
)


def permute(x: Tensor, token_of_row: Tensor) -> Tensor:
    """Copy the row of its token to each routed row: out[r] = x[token_of_row[r]], 0 for -1.

    Args:
        x: (T, ...) any dtype: hidden states, codes, block scales or per-token scales.
        token_of_row: (R,) int32 from ``sort_by_expert``.

    Returns:
        (R, ...) of the dtype of x.

    Raises:
        TypeError: token_of_row is not int32.
        ValueError: it is not a vector, or (on the CPU) names a token that is not there.
    """
    return _permute(x, token_of_row)


def _check_combine(rows: Tensor, row_of_slot: Tensor, top_k_weights: Tensor) -> None:
    check_rank("rows", rows, 2, "(R, H)")
    check_dtype("rows", rows, torch.bfloat16, torch.float16, torch.float32)
    check_rank("row_of_slot", row_of_slot, 2, "(T, top_k)")
    check_dtype("row_of_slot", row_of_slot, torch.int32)
    check_dtype("top_k_weights", top_k_weights, torch.float32, torch.bfloat16, torch.float16)
    check_shape("top_k_weights", top_k_weights, tuple(row_of_slot.shape), "(T, top_k)")
    check_same_device("row_of_slot", row_of_slot, rows.device)
    check_same_device("top_k_weights", top_k_weights, rows.device)


def _empty_tokens(rows: Tensor, row_of_slot: Tensor) -> Tensor:
    return rows.new_empty(row_of_slot.shape[0], rows.shape[1])


def _combine_fake(rows: Tensor, row_of_slot: Tensor, top_k_weights: Tensor) -> Tensor:
    _check_combine(rows, row_of_slot, top_k_weights)
    return _empty_tokens(rows, row_of_slot)


def _combine_plan(rows: Tensor, row_of_slot: Tensor, top_k_weights: Tensor) -> Run | None:
    _check_combine(rows, row_of_slot, top_k_weights)
    check_indices("row_of_slot", row_of_slot, rows.shape[0], "rows")
    if not row_of_slot.numel() or not kernels.has_elementwise(rows):
        return None
    launch = kernels.prepare_combine(rows, row_of_slot, top_k_weights)
    shape = (row_of_slot.shape[0], rows.shape[1])

    def run(rows: Tensor, row_of_slot: Tensor, top_k_weights: Tensor) -> Tensor:
        out = rows.new_empty(*shape)
        launch(rows, row_of_slot, top_k_weights, out)
        return out

    return run


def _combine_reference(rows: Tensor, row_of_slot: Tensor, top_k_weights: Tensor) -> Tensor:
    tokens, top_k = row_of_slot.shape
    padded = torch.cat([rows, rows.new_zeros((1, rows.shape[1]))])
    total = torch.zeros(tokens, rows.shape[1], dtype=torch.float32, device=rows.device)
    for slot in range(top_k):
        row = row_of_slot[:, slot].long()
        # A slot without a row adds nothing, whatever its weight.
        weight = torch.where(row < 0, 0.0, top_k_weights[:, slot].float())
        total = total + padded[row].float() * weight.unsqueeze(-1)
    return total.to(rows.dtype)


_combine = register(
    "combine(Tensor rows, Tensor row_of_slot, Tensor top_k_weights) -> Tensor",
    fake=_combine_fake,
    kernel=_combine_reference,
    plan=_combine_plan,
)


def combine(rows: Tensor, row_of_slot: Tensor, top_k_weights: Tensor) -> Tensor:
    """Weighted sum of each token's expert outputs, back in token order.

    out[t] = sum over j of top_k_weights[t, j] * rows[row_of_slot[t, j]], in fp32, j rising, each
    product and each sum rounded: the order never depends on the routing or on other tokens.

    Args:
        rows: (R, H) bf16, fp16 or fp32.
        row_of_slot: (T, top_k) int32 from ``sort_by_expert``; slots of -1 add nothing.
        top_k_weights: (T, top_k) fp32, bf16 or fp16.

    Returns:
        (T, H) of the dtype of rows.

    Raises:
        TypeError: another dtype.
        ValueError: another shape, or (on the CPU) row_of_slot names a row that is not there.
    """
    return _combine(rows, row_of_slot, top_k_weights)
