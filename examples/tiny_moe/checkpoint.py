"""Weights on disk, under the names and shapes that Hugging Face checkpoints of Qwen3-MoE use.

The module stacks its experts, a checkpoint keeps one tensor per expert and projection; only this
file knows both.
"""

import torch
from torch import Tensor

from tiny_moe.model import TinyMoe

EXPERTS = ".mlp.experts."


def checkpoint_tensors(model: TinyMoe) -> dict[str, Tensor]:
    """State dict as in a Hugging Face checkpoint: one tensor per expert and projection."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        layer, stacked, projection = name.partition(EXPERTS)
        if not stacked:
            tensors[name] = tensor
            continue
        for expert, weight in enumerate(tensor):
            prefix = f"{layer}{EXPERTS}{expert}."
            if projection == "down_proj":
                tensors[prefix + "down_proj.weight"] = weight
            else:
                gate, up = weight.chunk(2)
                tensors[prefix + "gate_proj.weight"] = gate
                tensors[prefix + "up_proj.weight"] = up
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def load_checkpoint(model: TinyMoe, tensors: dict[str, Tensor]) -> None:
    """Inverse of `checkpoint_tensors`: fill `model`, whose experts must be `FloatExperts`."""
    state = {name: tensor for name, tensor in tensors.items() if EXPERTS not in name}
    for layer in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{layer}{EXPERTS}"
        weights = {
            projection: torch.stack(
                [
                    tensors[f"{prefix}{expert}.{projection}_proj.weight"]
                    for expert in range(model.config.num_experts)
                ]
            )
            for projection in ("gate", "up", "down")
        }
        state[prefix + "gate_up_proj"] = torch.cat((weights["gate"], weights["up"]), dim=1)
        state[prefix + "down_proj"] = weights["down"]
    model.load_state_dict(state)
