"""Routers: the linear layer and top-k rule that choose each token's experts."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from nvfp4_ops.routing.topk import check_groups, router_logits, sigmoid_top_k, softmax_top_k


class _Router(nn.Module):
    """Weight and shape of a router; the subclasses are the rules."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k: must be between 1 and {num_experts}, got {top_k}")
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size), requires_grad=False)
        nn.init.normal_(self.weight, std=hidden_size**-0.5)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}"


class SoftmaxRouter(_Router):
    """Mixtral's and Qwen's rule: softmax over the experts, top-k, optionally renormalised.

    weight: (E, H). forward(hidden_states (T, H)) -> (T, top_k) int64 index, (T, top_k) fp32
    weights; see ``softmax_top_k``.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, renormalize: bool = True
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        self.renormalize = renormalize

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        logits = router_logits(hidden_states, self.weight)
        return softmax_top_k(logits, self.top_k, renormalize=self.renormalize)


class SigmoidRouter(_Router):
    """DeepSeek-V3's rule: sigmoid scores, a correction bias for the choice, expert groups.

    weight: (E, H); e_score_correction_bias: (E,) buffer, fp32 whatever the module is cast to: its
    differences between experts are small. forward as SoftmaxRouter; see ``sigmoid_top_k`` for the
    arguments.
    """

    e_score_correction_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        num_groups: int = 1,
        top_groups: int = 1,
        renormalize: bool = True,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        check_groups(num_experts, top_k, num_groups, top_groups)
        self.num_groups, self.top_groups = num_groups, top_groups
        self.renormalize, self.scaling_factor = renormalize, scaling_factor
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        bias = self.e_score_correction_bias
        moved = fn(bias)
        super()._apply(fn, recurse)
        same_dtype = moved.dtype == bias.dtype
        self.e_score_correction_bias = moved if same_dtype else bias.to(moved.device)
        return self

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return sigmoid_top_k(
            router_logits(hidden_states, self.weight),
            self.e_score_correction_bias,
            self.top_k,
            num_groups=self.num_groups,
            top_groups=self.top_groups,
            renormalize=self.renormalize,
            scaling_factor=self.scaling_factor,
        )
