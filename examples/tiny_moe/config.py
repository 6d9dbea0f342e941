"""The shape of the model, and how it is kept in `config.json`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class TinyMoeConfig:
    """Shape of the model; the field names are the keys of a Hugging Face `config.json`.

    Thin experts buy depth at the same size in bytes, and 64 and 128 are whole tiles for a matrix
    unit.
    """

    vocab_size: int = 2048
    hidden_size: int = 128
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    num_experts: int = 16
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 64
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    eos_token_id: int = 0

    def save(self, directory: Path) -> None:
        """Write `config.json` as transformers' Qwen3MoeForCausalLM reads it."""
        keys = asdict(self)
        theta = keys.pop("rope_theta")
        keys |= {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
            "tie_word_embeddings": True,
        }
        text = json.dumps(keys, indent=2, sort_keys=True) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> "TinyMoeConfig":
        """Read `config.json`; raises ValueError if it asks for what this model does not compute."""
        keys = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        required = {"model_type": "qwen3_moe", "norm_topk_prob": True, "tie_word_embeddings": True}
        for key, value in required.items():
            if keys.get(key) != value:
                raise ValueError(f"config.json: {key} must be {value!r}, got {keys.get(key)!r}")
        keys["rope_theta"] = keys["rope_parameters"]["rope_theta"]
        keys.setdefault("num_experts", keys.get("num_local_experts"))
        return cls(**{name: keys[name] for name in cls.__dataclass_fields__})
