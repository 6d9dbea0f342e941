"""Small models with NVFP4 layers, for what compilers make of them."""

from typing import Any

import torch
from torch import Tensor, nn

from nvfp4_ops import NVFP4Linear, NVFP4MoE, SoftmaxRouter
from nvfp4_ops.operand import ActivationScale

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 4, 64, 32, 2
INPUT_SCALE = 2e-3

MODES: tuple[ActivationScale | None, ...] = (None, "static", "per_token", "per_tensor")


def moe(
    mode: ActivationScale | None,
    *,
    gated: bool = True,
    bias: bool = False,
    num_experts: int = EXPERTS,
    dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> NVFP4MoE:
    rows = INTERMEDIATE * (2 if gated else 1)
    biases = {
        "gate_up_bias": torch.randn(num_experts, rows).to(dtype),
        "down_bias": torch.randn(num_experts, HIDDEN).to(dtype),
    }
    layer = NVFP4MoE.from_float(
        torch.randn(num_experts, rows, HIDDEN).to(dtype) / 8,
        torch.randn(num_experts, HIDDEN, INTERMEDIATE).to(dtype) / 8,
        gated=gated,
        **({"activation": "relu2"} if not gated else {}) | (biases if bias else {}) | options,
    )
    if mode == "static":
        for projection in layer.projections().values():
            # Not all alike: an exchange of two would otherwise not be seen.
            steps = torch.arange(projection.weight_scale_2.numel()).view_as(
                projection.weight_scale_2
            )
            projection.set_input_scale(INPUT_SCALE * (1 + steps))
    layer.activation_scale = mode
    return layer


def linear(
    mode: ActivationScale | None,
    *,
    in_features: int = HIDDEN,
    out_features: int = HIDDEN,
    bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> NVFP4Linear:
    layer = NVFP4Linear.from_float(nn.Linear(in_features, out_features, bias=bias, dtype=dtype))
    if mode == "static":
        layer.projection.set_input_scale(torch.tensor([INPUT_SCALE]))
    layer.activation_scale = mode
    return layer


class Block(nn.Module):
    """Attention with one NVFP4 projection, then a MoE with a router that is its own or not."""

    def __init__(
        self,
        mode: ActivationScale | None,
        *,
        bias: bool = False,
        own_router: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN, dtype=torch.bfloat16)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, dtype=torch.bfloat16)
        self.out = linear(mode, bias=bias)
        if own_router:
            options["router"] = SoftmaxRouter(HIDDEN, EXPERTS, TOP_K).bfloat16()
        else:
            self.gate = nn.Linear(HIDDEN, EXPERTS, dtype=torch.bfloat16)
        self.experts = moe(mode, bias=bias, **options)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S, hidden)."""
        q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, dim=-1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1))
        h = self.norm(x)
        if self.experts.router is not None:
            return x + self.experts(h)
        weights, index = self.gate(h).float().softmax(dim=-1).topk(TOP_K)
        return x + self.experts(h, index, weights)


def blocks(mode: ActivationScale | None, num_blocks: int = 2, **options: Any) -> nn.Module:
    return nn.Sequential(*(Block(mode, **options) for _ in range(num_blocks))).eval()


def hidden_states(*lead: int) -> Tensor:
    return torch.randn(*lead, HIDDEN).bfloat16()
