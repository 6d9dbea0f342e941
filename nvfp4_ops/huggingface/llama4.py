"""The Mixture-of-Experts block of Llama 4 around NVFP4MoE.

Llama 4 weights what goes into an expert, not what comes out, and gives every token to every
expert, those not chosen zero times. Here only the chosen experts run.
"""

import torch
from torch import Tensor, nn
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from nvfp4_ops.moe import NVFP4MoE


class NVFP4Llama4Moe(Llama4TextMoe):
    """Llama4TextMoe whose ``experts`` is an NVFP4MoE; router and shared expert are its own."""

    experts: NVFP4MoE  # type: ignore[assignment]

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x_TD = hidden_states.reshape(-1, self.hidden_dim)
        scores_TE, logits_TE = self.router(x_TD)
        index_TK = logits_TE.topk(self.top_k, dim=-1).indices
        scores_TK = scores_TE.gather(1, index_TK)
        # A row for each choice: its input is weighted, its output counts once.
        x_TKD = x_TD.unsqueeze(1) * scores_TK.unsqueeze(2)
        ones_TK1 = torch.ones_like(scores_TK).unsqueeze(2)
        routed_TD = self.experts(x_TKD, index_TK.unsqueeze(2), ones_TK1).sum(dim=1)
        return self.shared_expert(x_TD) + routed_TD, logits_TE


def convert(block: nn.Module, experts: NVFP4MoE) -> None:
    """Turn a Llama4TextMoe into an NVFP4Llama4Moe, in place: outputs are recorded by class."""
    block.experts = experts
    block.__class__ = NVFP4Llama4Moe
