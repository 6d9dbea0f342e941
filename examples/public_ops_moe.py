"""Experts written with the public ops, fused by a pass: ``python examples/public_ops_moe.py``.

Nothing below is fused by hand: tokens are gathered, quantized, multiplied, activated and summed in
steps that read like their equations. Compiled with ``nvfp4_ops.lowering.inductor`` enabled they
become the ops that NVFP4MoE calls.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nvfp4_ops
from nvfp4_ops.lowering import inductor


class Projection(nn.Module):
    """out[r] = x[r] @ W[expert of r].T; W4A4 with an input scale, else weight-only.

    weight: canonical codes (E, N, K / 2), or prepacked for ``num_columns`` N without block_scale.
    weight_scale_2: (E,), or (E, 2) of the two halves of N. input_scale: (), or (E,).
    """

    def __init__(
        self,
        weight: Tensor,
        block_scale: Tensor | None,
        weight_scale_2: Tensor,
        input_scale: Tensor | None = None,
        num_columns: int | None = None,
    ) -> None:
        super().__init__()
        self.num_columns = num_columns
        alpha = weight_scale_2 if input_scale is None else weight_scale_2 * input_scale
        self.register_buffer("weight", weight)
        self.register_buffer("block_scale", block_scale)
        self.register_buffer("alpha", alpha)
        self.register_buffer("input_scale", input_scale)

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        sf = None
        if self.input_scale is not None:
            x, sf = nvfp4_ops.quantize_nvfp4(x, self.input_scale, offs)
        return nvfp4_ops.grouped_scaled_mm(
            x, self.weight, sf, self.block_scale, self.alpha, offs, num_columns=self.num_columns
        )


class PublicOpsMoE(nn.Module):
    """sum over j of top_k_weights[t, j] * down_e(silu(gate_e(x[t])) * up_e(x[t]))."""

    def __init__(self, gate_up: Projection, down: Projection) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        num_experts = self.gate_up.weight.shape[0]
        offs, token_of_row, row_of_slot = nvfp4_ops.sort_by_expert(top_k_index, num_experts)
        gate, up = self.gate_up(x[token_of_row], offs).chunk(2, dim=-1)
        rows = self.down(F.silu(gate) * up, offs)
        return (rows[row_of_slot] * top_k_weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)


def quantized(w: Tensor, input_scale: Tensor | None, *, gated: bool = False) -> Projection:
    """(E, N, K) as a projection; on a GPU prepacked, as its grouped mm reads weights."""
    weight = nvfp4_ops.quantize_weight(w)
    if not w.is_cuda:
        return Projection(*weight, input_scale)
    packed = nvfp4_ops.prepack_weight(weight.codes, weight.block_scale, gated=gated)
    return Projection(packed, None, weight.global_scale, input_scale, num_columns=w.shape[1])


@torch.no_grad()
def main(num_tokens: int = 64) -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    num_experts, hidden, intermediate = 8, 128, 64
    w_gate_up = torch.randn(num_experts, 2 * intermediate, hidden, device=device) / hidden**0.5
    w_down = torch.randn(num_experts, hidden, intermediate, device=device) / intermediate**0.5
    scale = torch.tensor(4 / 2688, device=device)
    moe = PublicOpsMoE(
        quantized(w_gate_up.bfloat16(), scale, gated=True), quantized(w_down.bfloat16(), scale)
    )
    x = torch.randn(num_tokens, hidden, device=device).bfloat16()
    logits = torch.randn(num_tokens, num_experts, device=device)
    inputs = (x, *nvfp4_ops.softmax_top_k(logits, top_k=2))
    expected = moe(*inputs)
    with inductor.enabled():
        fused = torch.compile(moe, fullgraph=True, dynamic=True)
        actual = fused(*inputs)
    error = (actual - expected).float().norm() / expected.float().norm()
    print(f"rewrites: {inductor.counts() or 'none: the graph was in the cache'}")
    print(f"relative difference to the unfused experts: {error:.4f}")


if __name__ == "__main__":
    main()
