"""Choose experts: router logits to expert indices and weights.

Two rules cover the field: softmax (Mixtral, Qwen, OLMoE, ...) and sigmoid with a correction bias
and expert groups (DeepSeek-V3, GLM-4, ...). They are ops, so that a compiled graph selects the
very same experts as eager: in float64 on every device, ties to the lower expert index.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from nvfp4_ops import kernels
from nvfp4_ops.kernels.launch.choose_experts import EXPERTS_SCORING_A_GROUP, RENORMALIZE_EPSILON
from nvfp4_ops.plans import Run
from nvfp4_ops.registry import (
    check_dtype,
    check_rank,
    check_same_device,
    check_shape,
    register,
)


def _top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest, ties to the lower index (``torch.topk`` leaves that open).

    NaN is the largest of all, whatever its sign, by which a GPU sorts it.
    """
    scores = scores.masked_fill(scores.isnan(), torch.nan)
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k].contiguous()


def _check_logits(logits: Tensor, top_k: int) -> None:
    check_rank("logits", logits, 2, "(T, E)")
    check_dtype("logits", logits, torch.float32, torch.bfloat16, torch.float16)
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k: must be between 1 and E = {logits.shape[1]}, got {top_k}")


def _empty_routes(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    num_tokens = logits.shape[0]
    return (
        logits.new_empty(num_tokens, top_k, dtype=torch.int64),
        logits.new_empty(num_tokens, top_k, dtype=torch.float32),
    )


def _check_router(x: Tensor, weight: Tensor) -> None:
    check_rank("x", x, 2, "(T, H)")
    check_dtype("x", x, torch.float32, torch.bfloat16, torch.float16)
    check_dtype("weight", weight, torch.float32, torch.bfloat16, torch.float16)
    check_shape("weight", weight, (weight.shape[0], x.shape[1]), "(E, H)")
    check_same_device("weight", weight, x.device)


def _router_logits_fake(x: Tensor, weight: Tensor) -> Tensor:
    _check_router(x, weight)
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)


def _router_logits_plan(x: Tensor, weight: Tensor) -> Run | None:
    _check_router(x, weight)
    if not x.is_cuda or not weight.numel() or kernels.why_no_router_logits(x, weight) is not None:
        return None
    launch = kernels.prepare_router_logits(x, weight)
    num_tokens, num_experts = x.shape[0], weight.shape[0]

    def run(x: Tensor, weight: Tensor) -> Tensor:
        logits = x.new_empty(num_tokens, num_experts, dtype=torch.float32)
        launch(x, weight, logits)
        return logits

    return run


def _router_logits_reference(x: Tensor, weight: Tensor) -> Tensor:
    return (x.double() @ weight.double().T).float()


_router_logits = register(
    "router_logits(Tensor x, Tensor weight) -> Tensor",
    fake=_router_logits_fake,
    kernel=_router_logits_reference,
    plan=_router_logits_plan,
)


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Router scores x @ weight.T, accumulated in float64 and rounded once to fp32.

    A library matmul picks its summation order by the number of rows, so that in fp32 a token can
    be routed differently alone and in a batch. Here only logits can differ whose terms cancel by
    more than the 2^29 that float64 has over fp32.

    Args:
        x: (T, H) fp32, bf16 or fp16.
        weight: (E, H) fp32, bf16 or fp16.

    Returns:
        (T, E) fp32.

    Raises:
        TypeError: another dtype. ValueError: the shapes do not fit.
    """
    return _router_logits(x, weight)


def _plan_choose(
    rule: Literal["softmax", "sigmoid"],
    logits: Tensor,
    correction_bias: Tensor | None,
    top_k: int,
    num_groups: int = 1,
    **options: Any,
) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]] | None:
    """The GPU's kernel, where it serves these, as a function of logits and bias."""
    if not logits.is_cuda or kernels.why_no_choose(logits, top_k, num_groups) is not None:
        return None
    launch = kernels.prepare_choose(
        rule, logits, correction_bias, top_k, num_groups=num_groups, **options
    )

    def run(logits: Tensor, correction_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        index, weights = _empty_routes(logits, top_k)
        launch(logits, correction_bias, index, weights)
        return index, weights

    return run


def _softmax_top_k_fake(
    logits: Tensor, top_k: int, renormalize: bool = True
) -> tuple[Tensor, Tensor]:
    _check_logits(logits, top_k)
    return _empty_routes(logits, top_k)


def _softmax_top_k_plan(logits: Tensor, top_k: int, renormalize: bool = True) -> Run | None:
    _check_logits(logits, top_k)
    choose = _plan_choose("softmax", logits, None, top_k, renormalize=renormalize)
    return None if choose is None else lambda logits, *_: choose(logits, None)


def _softmax_top_k_reference(
    logits: Tensor, top_k: int, renormalize: bool = True
) -> tuple[Tensor, Tensor]:
    index = _top_k(logits.float(), top_k)
    scores = logits.double().softmax(dim=-1).gather(1, index)
    if renormalize:
        scores = scores / scores.sum(dim=-1, keepdim=True)
    return index, scores.float()


_softmax_top_k = register(
    "softmax_top_k(Tensor logits, int top_k, bool renormalize=True) -> (Tensor, Tensor)",
    fake=_softmax_top_k_fake,
    kernel=_softmax_top_k_reference,
    plan=_softmax_top_k_plan,
)


def softmax_top_k(logits: Tensor, top_k: int, *, renormalize: bool = True) -> tuple[Tensor, Tensor]:
    """Route by softmax: the ``top_k`` experts of largest probability.

    Args:
        logits: (T, E) fp32, bf16 or fp16.
        top_k: experts per token, 1 to E.
        renormalize: divide the chosen probabilities by their sum (``norm_topk_prob``).

    Returns:
        top_k_index: (T, top_k) int64, by falling probability, ties to the lower index.
        top_k_weights: (T, top_k) fp32.

    Raises:
        TypeError: another dtype. ValueError: logits not a matrix, or top_k out of range.
    """
    return _softmax_top_k(logits, top_k, renormalize)


def _check_sigmoid(
    logits: Tensor, correction_bias: Tensor | None, top_k: int, num_groups: int, top_groups: int
) -> None:
    _check_logits(logits, top_k)
    num_experts = logits.shape[1]
    if correction_bias is not None:
        check_dtype("correction_bias", correction_bias, torch.float32, torch.bfloat16)
        check_shape("correction_bias", correction_bias, (num_experts,), "(E,)")
        check_same_device("correction_bias", correction_bias, logits.device)
    check_groups(num_experts, top_k, num_groups, top_groups)


def check_groups(num_experts: int, top_k: int, num_groups: int, top_groups: int) -> None:
    """Raise ValueError unless ``top_k`` experts can come from ``top_groups`` of the groups."""
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups: must divide E = {num_experts}, got {num_groups}")
    if not 1 <= top_groups <= num_groups:
        raise ValueError(
            f"top_groups: must be between 1 and num_groups = {num_groups}, got {top_groups}"
        )
    experts_per_group = num_experts // num_groups
    if num_groups > 1 and experts_per_group < EXPERTS_SCORING_A_GROUP:
        raise ValueError(f"num_groups: a group must have 2 experts, got {experts_per_group}")
    if top_groups * experts_per_group < top_k:
        raise ValueError(
            f"top_k: must be at most the {top_groups * experts_per_group} experts of the "
            f"{top_groups} chosen groups, got {top_k}"
        )


def _sigmoid_top_k_fake(
    logits: Tensor,
    correction_bias: Tensor | None,
    top_k: int,
    num_groups: int = 1,
    top_groups: int = 1,
    renormalize: bool = True,
    scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    _check_sigmoid(logits, correction_bias, top_k, num_groups, top_groups)
    return _empty_routes(logits, top_k)


def _sigmoid_top_k_plan(
    logits: Tensor,
    correction_bias: Tensor | None,
    top_k: int,
    num_groups: int = 1,
    top_groups: int = 1,
    renormalize: bool = True,
    scaling_factor: float = 1.0,
) -> Run | None:
    _check_sigmoid(logits, correction_bias, top_k, num_groups, top_groups)
    choose = _plan_choose(
        "sigmoid",
        logits,
        correction_bias,
        top_k,
        num_groups,
        top_groups=top_groups,
        renormalize=renormalize,
        scaling_factor=scaling_factor,
    )
    return None if choose is None else lambda logits, bias, *_: choose(logits, bias)


def _sigmoid_top_k_reference(
    logits: Tensor,
    correction_bias: Tensor | None,
    top_k: int,
    num_groups: int = 1,
    top_groups: int = 1,
    renormalize: bool = True,
    scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    scores = logits.double().sigmoid()
    choice = scores if correction_bias is None else scores + correction_bias.double()
    if num_groups > 1:
        grouped = choice.unflatten(-1, (num_groups, -1))
        best = grouped.sort(dim=-1, descending=True).values[..., :EXPERTS_SCORING_A_GROUP]
        chosen = _top_k(best.sum(dim=-1), top_groups)
        outside = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, chosen, False)
        choice = grouped.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(-2)
    index = _top_k(choice, top_k)
    weights = scores.gather(1, index)
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + RENORMALIZE_EPSILON)
    return index, (weights * scaling_factor).float()


_sigmoid_top_k = register(
    "sigmoid_top_k(Tensor logits, Tensor? correction_bias, int top_k, int num_groups=1,"
    " int top_groups=1, bool renormalize=True, float scaling_factor=1.0) -> (Tensor, Tensor)",
    fake=_sigmoid_top_k_fake,
    kernel=_sigmoid_top_k_reference,
    plan=_sigmoid_top_k_plan,
)


def sigmoid_top_k(
    logits: Tensor,
    correction_bias: Tensor | None,
    top_k: int,
    *,
    num_groups: int = 1,
    top_groups: int = 1,
    renormalize: bool = True,
    scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Route as DeepSeek-V3: choose by sigmoid + correction bias, weigh by the sigmoid alone.

    Args:
        logits: (T, E) fp32, bf16 or fp16.
        correction_bias: (E,) fp32 or bf16, added for the choice only, or None.
        top_k: experts per token.
        num_groups: the experts are split into this many consecutive groups.
        top_groups: experts come from the groups of largest sum of their two best choice scores.
        renormalize: divide the chosen scores by their sum + 1e-20.
        scaling_factor: multiplies the weights (``routed_scaling_factor``).

    Returns:
        top_k_index: (T, top_k) int64, by falling choice score, ties to the lower index.
        top_k_weights: (T, top_k) fp32.

    Raises:
        TypeError: another dtype. ValueError: a shape or count does not fit the others.
    """
    return _sigmoid_top_k(
        logits, correction_bias, top_k, num_groups, top_groups, renormalize, scaling_factor
    )
