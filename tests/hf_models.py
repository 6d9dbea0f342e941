"""Tiny random models of Mixture-of-Experts families, and float twins of NVFP4 models.

A twin is the model as transformers has it, in float, whose weights are those that the NVFP4 model
decodes to; with ``fake_quantized`` its inputs are quantized and decoded again as well.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from nvfp4_ops import (
    NVFP4Linear,
    NVFP4MoE,
    dequantize_nvfp4,
    global_scale,
    quantize_nvfp4,
)
from nvfp4_ops.huggingface.families import ExpertsSpec, experts_modules, experts_spec
from nvfp4_ops.projection import ExpertProjection

VOCABULARY = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
# Every attention of DeepSeek splits a head into parts with and without position.
MLA: dict[str, Any] = {
    "head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
GROUPS: dict[str, Any] = {"n_group": 2, "topk_group": 1, "n_shared_experts": 1}

LINEAR_ATTENTION: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}

# Name of the config class, without Config, and what it takes beyond SIZES.
_FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {"num_experts": 4, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    "Qwen3Moe": {"num_experts": 4, "norm_topk_prob": True, "decoder_sparse_step": 1},
    "Qwen3Next": {
        "num_experts": 4,
        "shared_expert_intermediate_size": 32,
        **LINEAR_ATTENTION,
    },
    "Qwen3_5MoeText": {
        "num_experts": 4,
        "shared_expert_intermediate_size": 32,
        **LINEAR_ATTENTION,
    },
    "Olmoe": {"num_experts": 4},
    "DeepseekV2": {**MLA, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "DeepseekV3": {**MLA, **GROUPS, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "DeepseekV4": {
        "n_routed_experts": 4,
        "num_local_experts": 4,
        "n_shared_experts": 1,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "q_lora_rank": 32,
        "o_lora_rank": 16,
        "o_groups": 2,
        "qk_rope_head_dim": 16,
        "layer_types": ["sliding_attention", "sliding_attention"],
        "mlp_layer_types": ["hash_moe", "moe"],
    },
    "Glm4Moe": {**GROUPS, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "GptOss": {"num_local_experts": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "Llama4Text": {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48},
    "NemotronH": {
        **GROUPS,
        "n_routed_experts": 4,
        "layers_block_type": ["attention", "moe", "moe"],
        "num_hidden_layers": 3,
        "moe_shared_expert_intermediate_size": 32,
    },
    "GraniteMoe": {"num_local_experts": 4},
    "MiniMaxM2": {"num_local_experts": 4},
    "Phimoe": {"num_local_experts": 4},
    "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0},
}

# Those that the installed transformers has.
FAMILIES = {k: v for k, v in _FAMILIES.items() if hasattr(transformers, f"{k}Config")}


def build(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model whose experts matter: their weights are larger than transformers' own."""
    config_class = getattr(transformers, f"{family}Config")
    config = config_class(**{**SIZES, **FAMILIES[family], **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name and parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model.to(dtype).eval()


def decoded(projection: ExpertProjection, expert: int) -> Tensor:
    """fp32 weight (N, K) of one expert."""
    scales = projection.segment(projection.weight_scale_2)[expert]
    parts = [
        dequantize_nvfp4(
            projection.weight[expert, projection.segment_rows(segment)],
            projection.weight_scale[expert, projection.segment_rows(segment)],
            scale,
        )
        for segment, scale in enumerate(scales)
    ]
    return torch.cat(parts)


@torch.no_grad()
def decode_experts(moe: NVFP4MoE, spec: ExpertsSpec, experts: nn.Module) -> None:
    """Overwrite the weights of a float experts module by what an NVFP4MoE decodes to."""
    for name, projection in moe.projections().items():
        is_first = name != "down_proj"
        for expert in range(spec.num_experts):
            rows = decoded(projection, expert)
            bias = projection.bias[expert] if spec.bias else None
            if is_first and spec.interleaved:
                rows = torch.stack(rows.chunk(2), dim=1).flatten(0, 1)
                bias = torch.stack(bias.chunk(2), dim=1).flatten()
            experts.get_parameter(name)[expert] = rows.T if spec.transposed else rows
            if bias is not None:
                experts.get_parameter(f"{name}_bias")[expert] = bias


@torch.no_grad()
def decoded_twin(model: PreTrainedModel, float_model: PreTrainedModel) -> PreTrainedModel:
    """``float_model`` with the weights of ``model``, the same model but for its NVFP4 modules."""
    twin = copy.deepcopy(float_model)
    experts = experts_modules(twin)
    for name, module in model.named_modules():
        if isinstance(module, NVFP4MoE):
            decode_experts(module, experts_spec(name, experts[name]), experts[name])
        elif isinstance(module, NVFP4Linear):
            twin.get_submodule(name).weight.copy_(decoded(module.projection, 0))
    return twin


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """What is left of x (R, K) after quantization, in its own dtype."""
    codes, sf = quantize_nvfp4(x, scale)
    return dequantize_nvfp4(codes, sf, scale).to(x.dtype)


def rounding(mode: str, static: Tensor | None) -> Callable[[Tensor], Tensor]:
    """How ``activation_scale`` mode rounds rows."""
    if mode == "static":
        assert static is not None
        return lambda x: rounded(x, static)
    return lambda x: rounded(x, global_scale(x, per_token=mode == "per_token"))


class FakeQuantizedExperts(nn.Module):
    """Decoded experts on rounded inputs, expert by expert, every step in the dtype of the input."""

    def __init__(self, moe: NVFP4MoE, mode: str, dtype: torch.dtype) -> None:
        super().__init__()
        assert moe.gated
        assert moe.down_proj.bias is None
        assert moe.activation == "silu"
        self.gate_up = [decoded(moe.first_proj, e).to(dtype) for e in range(moe.num_experts)]
        self.down = [decoded(moe.down_proj, e).to(dtype) for e in range(moe.num_experts)]
        self.moe, self.mode = moe, mode

    def forward(self, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        first, down = self.moe.first_proj.input_scale, self.moe.down_proj.input_scale
        x_TD = rounding(self.mode, None if first is None else first.amax())(x_TD)
        out_TD = torch.zeros_like(x_TD)
        for token in range(len(x_TD)):
            rows = []
            for expert, weight in zip(index_TK[token], weights_TK[token], strict=True):
                gate, up = (x_TD[token : token + 1] @ self.gate_up[expert].T).chunk(2, dim=1)
                hidden = nn.functional.silu(gate) * up
                hidden = rounding(self.mode, None if down is None else down[expert])(hidden)
                rows.append(hidden @ self.down[expert].T * weight)
            out_TD[token] = torch.cat(rows).sum(dim=0)
        return out_TD


class FakeQuantizedLinear(nn.Module):
    """A decoded linear layer on rounded inputs."""

    def __init__(self, linear: NVFP4Linear, mode: str, dtype: torch.dtype) -> None:
        super().__init__()
        assert linear.projection.bias is None
        self.weight = decoded(linear.projection, 0).to(dtype)
        scale = linear.projection.input_scale
        self.round = rounding(mode, None if scale is None else scale[0])

    def forward(self, x: Tensor) -> Tensor:
        rows = self.round(x.reshape(-1, x.shape[-1]))
        return (rows @ self.weight.T).unflatten(0, x.shape[:-1])


def fake_quantized(model: PreTrainedModel, mode: str) -> PreTrainedModel:
    """A copy of an NVFP4 model that computes as the producers' float models do."""
    twin = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, NVFP4MoE):
            twin.set_submodule(name, FakeQuantizedExperts(module, mode, model.dtype))
        elif isinstance(module, NVFP4Linear):
            twin.set_submodule(name, FakeQuantizedLinear(module, mode, model.dtype))
    return twin


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())
