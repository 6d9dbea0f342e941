"""The model with NVFP4 experts: quantize, save and load in ModelOpt's checkpoint layout.

Attention, router, norms and embedding stay bf16; every experts module becomes an NVFP4MoE.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import nvfp4_ops
from nvfp4_ops.checkpoint import Checkpoint, expert_tensors, load_experts, quantization_config
from nvfp4_ops.operand import ActivationScale
from tiny_moe.checkpoint import EXPERTS, checkpoint_tensors, load_checkpoint
from tiny_moe.config import TinyMoeConfig
from tiny_moe.model import TinyMoe

WEIGHTS = "model.safetensors"
BF16_EXPERTS = "experts_bf16.safetensors"
UNQUANTIZED = (
    "lm_head",
    "model.embed_tokens",
    "model.layers.*.self_attn*",
    "model.layers.*.mlp.gate",
)
MODES: tuple[ActivationScale | None, ...] = (None, "static", "per_token", "per_tensor")


def experts_name(layer: int) -> str:
    return f"model.layers.{layer}.mlp.experts"


def use_mode(model: TinyMoe, mode: ActivationScale | None) -> None:
    """Run the experts of every layer with ``mode``."""
    for layer in model.model.layers:
        layer.mlp.experts.activation_scale = mode


@torch.no_grad()
def quantize(model: TinyMoe, calibration: Iterable[Tensor]) -> None:
    """Replace the float experts of ``model`` and calibrate input scales on token batches (B, S)."""
    for layer in tqdm(model.model.layers, desc="quantizing experts", unit="layer"):
        experts = layer.mlp.experts
        layer.mlp.experts = nvfp4_ops.NVFP4MoE.from_float(experts.gate_up_proj, experts.down_proj)
    with nvfp4_ops.calibrate(model):
        for input_ids in tqdm(list(calibration), desc="calibrating", unit="batch"):
            model(input_ids)


def save_quantized(model: TinyMoe, directory: Path, bf16_experts: dict[str, Tensor]) -> None:
    """Write an NVFP4 checkpoint, and beside it the experts it was made from."""
    tensors = {name: t.bfloat16() for name, t in model.state_dict().items() if EXPERTS not in name}
    for index, layer in enumerate(model.model.layers):
        tensors |= expert_tensors(layer.mlp.experts, experts_name(index))
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    save_file(bf16_experts, directory / BF16_EXPERTS, metadata={"format": "pt"})
    producer = {"name": "nvfp4_ops", "version": nvfp4_ops.__version__}
    quantization = quantization_config(UNQUANTIZED, static=True)
    model.config.save(directory)
    for name, content in (
        ("hf_quant_config.json", {"producer": producer, "quantization": quantization}),
        (
            "config.json",
            json.loads((directory / "config.json").read_text(encoding="utf-8"))
            | {
                "quantization_config": {
                    "quant_method": "modelopt",
                    "quant_algo": quantization["quant_algo"],
                    "ignore": quantization["exclude_modules"],
                    "producer": producer,
                }
            },
        ),
    ):
        text = json.dumps(content, indent=2) + "\n"
        (directory / name).write_text(text, encoding="utf-8")


def bf16_experts(model: TinyMoe) -> dict[str, Tensor]:
    """The float experts of ``model`` in bf16, under their checkpoint names."""
    tensors = checkpoint_tensors(model)
    return {name: t.bfloat16() for name, t in tensors.items() if EXPERTS in name}


def load_quantized(
    directory: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    activation_scale: ActivationScale | None = None,
) -> TinyMoe:
    """Load an NVFP4 checkpoint; ``dtype`` is that of everything but the experts' weights."""
    model = TinyMoe(TinyMoeConfig.load(directory))
    checkpoint = Checkpoint(directory)
    for index, layer in enumerate(model.model.layers):
        layer.mlp.experts = load_experts(
            checkpoint, experts_name(index), activation_scale=activation_scale
        )
    rest = {name: checkpoint.tensor(name) for name in checkpoint.names() if EXPERTS not in name}
    missing = model.load_state_dict(rest, strict=False).missing_keys
    assert all(EXPERTS in name for name in missing), missing
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def load_bf16(directory: Path, *, dtype: torch.dtype, device: torch.device | str) -> TinyMoe:
    """Load the same model with the bf16 experts the checkpoint was made from."""
    model = TinyMoe(TinyMoeConfig.load(directory))
    tensors = load_file(directory / WEIGHTS)
    rest = {name: tensor for name, tensor in tensors.items() if EXPERTS not in name}
    load_checkpoint(model, rest | load_file(directory / BF16_EXPERTS))
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)
