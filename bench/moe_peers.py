"""What bench.moe compares with: bf16 layers that run beside it, and figures measured once."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.moe_layers import Shape, float_expert, random_routing

COMMITTED = Path(__file__).parent / "peers_h200.json"
COMMITTED_GPU = "H200"
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def committed_peers() -> dict[tuple[str, int], dict[str, float]]:
    """{(shape, tokens): {peer: microseconds}} of peers_h200.json, which states its origin."""
    peers: dict[tuple[str, int], dict[str, float]] = {}
    for cell in json.loads(COMMITTED.read_text())["cells"]:
        peers.setdefault((cell["shape"], cell["T"]), {})[cell["peer"]] = cell["us"]
    return peers


def bf16_weights(shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    """gate_up (E, 2F, D) and down (E, D, F): the NVFP4 layer's, dequantized."""
    e, d, f = shape.num_experts, shape.hidden, shape.intermediate
    gate_up = torch.empty(e, 2 * f, d, dtype=torch.bfloat16, device=device)
    down = torch.empty(e, d, f, dtype=torch.bfloat16, device=device)
    for expert in range(e):
        gate, up, down[expert] = float_expert(shape, expert, device)
        gate_up[expert, :f], gate_up[expert, f:] = gate, up
    return gate_up, down


def _grouped_mm() -> Callable[..., Tensor]:
    """Public since torch 2.10, private before."""
    grouped_mm: Callable[..., Tensor] = getattr(F, "grouped_mm", None) or torch._grouped_mm
    return grouped_mm


def torch_layer(gate_up: Tensor, down: Tensor) -> Layer:
    """Plain PyTorch around its grouped mm: sort, gather, multiply, gather back, sum."""
    grouped_mm = _grouped_mm()
    gate_up_t, down_t = gate_up.transpose(1, 2), down.transpose(1, 2)
    experts = torch.arange(gate_up.shape[0], device=gate_up.device)

    def layer(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        tokens, top_k = index.shape
        expert, slot_of_row = index.flatten().sort(stable=True)
        offs = torch.searchsorted(expert, experts, right=True, out_int32=True)
        rows = x[slot_of_row // top_k]
        gate, up = grouped_mm(rows, gate_up_t, offs=offs).chunk(2, dim=-1)
        rows = grouped_mm(F.silu(gate) * up, down_t, offs=offs)
        row_of_slot = torch.empty_like(slot_of_row)
        row_of_slot[slot_of_row] = torch.arange(slot_of_row.numel(), device=x.device)
        rows = rows[row_of_slot].view(tokens, top_k, -1)
        return torch.bmm(weights.to(x.dtype).unsqueeze(1), rows).squeeze(1)

    return layer


def transformers_layer(shape: Shape, gate_up: Tensor, down: Tensor) -> Layer:
    """The grouped_mm experts of transformers, as its models run them.

    Raises:
        ImportError: transformers is not installed or has none.
    """
    from transformers.integrations.moe import grouped_mm_experts_forward

    def apply_gate(gate_up_out: Tensor) -> Tensor:
        gate, up = gate_up_out.chunk(2, dim=-1)
        return F.silu(gate) * up

    # What the function reads of the experts module that it is a method of.
    experts = SimpleNamespace(
        num_experts=shape.num_experts,
        gate_up_proj=gate_up,
        down_proj=down,
        has_gate=True,
        has_bias=False,
        is_transposed=False,
        has_post_expert_norm=False,
        _is_expert_parallel=False,
        _apply_gate=apply_gate,
        act_fn=F.silu,
        config=SimpleNamespace(),
    )
    return lambda *args: grouped_mm_experts_forward(experts, *args)


def live_peers(shape: Shape, device: str) -> dict[str, Layer]:
    """Layers of the same weights in bf16 that this machine can run; says what it can not."""
    weights = bf16_weights(shape, device)
    peers: dict[str, Layer] = {"torch bf16": torch_layer(*weights)}
    try:
        layer = transformers_layer(shape, *weights)
        layer(*random_routing(shape, 1, 0, device))
    except (ImportError, AttributeError, TypeError) as error:
        # Another version may read other attributes of its experts.
        print(f"transformers bf16 is left out: {error}", flush=True)
    else:
        peers["transformers bf16"] = layer
    return peers
