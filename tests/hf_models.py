"""Tiny random models of Mixture-of-Experts families, and their experts with decoded weights."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from nvfp4_ops import NVFP4MoE, dequantize_nvfp4
from nvfp4_ops.huggingface.families import ExpertsSpec
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
    "head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
GROUPS: dict[str, Any] = {"n_group": 2, "topk_group": 1, "n_shared_experts": 1}

# Name of the config class, without Config, and what it takes beyond SIZES.
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {"num_experts": 4, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    "Qwen3Moe": {"num_experts": 4, "norm_topk_prob": True, "decoder_sparse_step": 1},
    "Qwen3Next": {
        "num_experts": 4,
        "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
    },
    "Olmoe": {"num_experts": 4},
    "DeepseekV2": {**MLA, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "DeepseekV3": {**MLA, **GROUPS, "n_routed_experts": 4, "first_k_dense_replace": 1},
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


def build(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A random model whose experts matter: their weights are larger than transformers' default."""
    config_class = getattr(transformers, f"{family}Config")
    config = config_class(**{**SIZES, **FAMILIES[family], **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name and parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model.to(dtype).eval()
