"""Launch of ``choose_experts``."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nvfp4_ops.format import ceil_div
from nvfp4_ops.kernels.launch.tensors import FLOAT_DTYPES, WARP, GetCompiled, Launch
from nvfp4_ops.kernels.limits import MAX_EXPERTS

# As Hugging Face's DeepSeek-V3: keeps a row of all-zero weights from dividing by zero.
RENORMALIZE_EPSILON = 1e-20
EXPERTS_SCORING_A_GROUP = 2

MAX_CHOICES = WARP
"""A lane has a choice, or a group."""
BIAS_DTYPES = (torch.float32, torch.bfloat16)
WARPS = 4


@dataclass(frozen=True)
class ChooseConfig:
    """bias: its dtype, None without one. grouped: experts come from the best groups only.

    experts_per_lane: a power of two; experts are dealt to 32 lanes in turn.
    """

    rule: Literal["softmax", "sigmoid"]
    dtype: torch.dtype
    bias: torch.dtype | None
    experts_per_lane: int
    grouped: bool
    renormalize: bool

    def __post_init__(self) -> None:
        if self.rule not in ("softmax", "sigmoid"):
            raise ValueError(f"rule: must be softmax or sigmoid, got {self.rule}")
        if self.dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype: must be one of {list(FLOAT_DTYPES)}, got {self.dtype}")
        if self.bias is not None and self.bias not in BIAS_DTYPES:
            raise ValueError(f"bias: must be one of {list(BIAS_DTYPES)} or None, got {self.bias}")
        if self.rule == "softmax" and (self.bias is not None or self.grouped):
            raise ValueError("rule: only sigmoid has a bias and groups")
        if self.experts_per_lane not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"experts_per_lane: must be 1 to 32, got {self.experts_per_lane}")


def why_no_choose(num_experts: int, top_k: int, num_groups: int) -> str | None:
    """Why the kernel can not choose, or None where it can."""
    for what, count, limit in (
        ("experts", num_experts, MAX_EXPERTS),
        ("experts of a token", top_k, MAX_CHOICES),
        ("groups", num_groups, MAX_CHOICES),
    ):
        if count > limit:
            return f"the kernel takes at most {limit} {what}, got {count}"
    return None


def choose_experts_per_lane(num_experts: int) -> int:
    """A power of two, so that few kernels serve all numbers of experts."""
    return 1 << (ceil_div(num_experts, WARP) - 1).bit_length()


def prepare_choose(
    rule: Literal["softmax", "sigmoid"],
    logits: Tensor,
    correction_bias: Tensor | None,
    top_k: int,
    get_compiled: GetCompiled,
    *,
    num_groups: int = 1,
    top_groups: int = 1,
    renormalize: bool = True,
    scaling_factor: float = 1.0,
) -> Launch:
    """index, weights = softmax_top_k or sigmoid_top_k of logits; see these.

    logits: (T, E), T positive, with ``why_no_choose`` None. correction_bias: (E,) or None.
    get_compiled: from a ``ChooseConfig`` to what ``build`` returns for it.

    Returns launch(logits, correction_bias, index (T, top_k) int64, weights (T, top_k) fp32), all
    contiguous.
    """
    num_experts = logits.shape[1]
    reason = why_no_choose(num_experts, top_k, num_groups)
    if reason is not None:
        raise ValueError(f"logits: {reason}")
    experts_per_lane = choose_experts_per_lane(num_experts)
    bias = None if correction_bias is None else correction_bias.dtype
    config = ChooseConfig(rule, logits.dtype, bias, experts_per_lane, num_groups > 1, renormalize)
    compiled, scaling = get_compiled(config), float(scaling_factor)

    def launch(logits: Tensor, bias: Tensor | None, index: Tensor, weights: Tensor) -> None:
        compiled(logits, bias, index, weights, num_groups, top_groups, scaling)

    return launch
