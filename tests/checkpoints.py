"""Checkpoints written for tests: in every layout, from the canonical tensors of one module."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nvfp4_ops import NVFP4MoE
from nvfp4_ops.checkpoint import quantization_config

PREFIX = "model.layers.0.mlp.experts"
Tensors = dict[str, Tensor]

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

CT_NUMBERS = {"num_bits": 4, "type": "float", "group_size": 16, "symmetric": True}
CT_GROUP = {
    "format": "nvfp4-pack-quantized",
    "targets": ["Linear"],
    "weights": CT_NUMBERS,
    "input_activations": {**CT_NUMBERS, "dynamic": "local"},
}
MX_GROUP = {
    "format": "mxfp4-pack-quantized",
    "targets": ["Linear"],
    "weights": {"num_bits": 4, "type": "float", "group_size": 32},
    "input_activations": None,
}


def ct_config(*groups: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """config.json of a compressed-tensors checkpoint."""
    config = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "nvfp4-pack-quantized",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups or (CT_GROUP,))},
        "ignore": ["lm_head"],
    }
    return {"quantization_config": config | changes}


def write_checkpoint(
    directory: Path,
    tensors: Tensors,
    *,
    shards: int = 1,
    config: dict[str, Any] | None = None,
    modelopt: dict[str, Any] | None = None,
) -> Path:
    """config: of config.json. modelopt: changes of the config that is written if there is none."""
    directory.mkdir(parents=True, exist_ok=True)
    if config is None:
        content = quantization_config(["lm_head"], static=True) | (modelopt or {})
        (directory / "hf_quant_config.json").write_text(json.dumps({"quantization": content}))
    else:
        (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        part = {name: t for name, t in tensors.items() if weight_map[name] == shard}
        save_file(part, directory / shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def make_moe(*, bias: bool = False, input_scale: bool = True) -> NVFP4MoE:
    """4 experts of 48 x 32 with global scales of their own, gate's and up's different."""
    generator = torch.Generator().manual_seed(5)
    sizes = {"gate_up_bias": (4, 64), "down_bias": (4, 48)} if bias else {}
    biases = {
        name: torch.randn(size, generator=generator, dtype=torch.bfloat16)
        for name, size in sizes.items()
    }
    moe = NVFP4MoE.from_float(
        torch.randn(4, 64, 48, generator=generator),
        torch.randn(4, 48, 32, generator=generator),
        **biases,
    )
    if input_scale:
        moe.first_proj.set_input_scale(torch.rand(4, 2, generator=generator) + 0.1)
        moe.down_proj.set_input_scale(torch.rand(4, generator=generator) + 0.1)
    return moe


def assert_same_state(actual: NVFP4MoE, expected: NVFP4MoE) -> None:
    expected_state = expected.state_dict()
    assert actual.state_dict().keys() == expected_state.keys()
    for name, tensor in actual.state_dict().items():
        assert tensor.dtype == expected_state[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), expected_state[name].view(torch.uint8)), name


def renamed(tensors: Tensors, **names: str) -> Tensors:
    """With projections renamed, as in gate_proj="w1"."""
    result = {}
    for name, tensor in tensors.items():
        for old, new in names.items():
            name = name.replace(f".{old}.", f".{new}.")
        result[name] = tensor
    return result


def mixtral_names(tensors: Tensors) -> Tensors:
    return renamed(tensors, gate_proj="w1", up_proj="w3", down_proj="w2")


def compressed(tensors: Tensors) -> Tensors:
    """ModelOpt's tensors as compressed-tensors stores them; exact where scales are powers of 2."""
    result = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight":
            result[f"{module}.weight_packed"] = tensor
        elif kind == "weight_scale_2":
            result[f"{module}.weight_global_scale"] = (1 / tensor).reshape(1)
        elif kind == "input_scale":
            result[f"{module}.input_global_scale"] = (1 / tensor).reshape(1)
        else:
            result[name] = tensor
    return result


def stacked(moe: NVFP4MoE, *, interleaved: bool, transposed: bool = True) -> Tensors:
    """The module's tensors as gpt-oss and Llama 4 exports have them, but for the global scales."""
    tensors: Tensors = {}
    for name, projection in moe.projections().items():
        order = torch.arange(projection.num_rows)
        if interleaved and name == "gate_up_proj":
            order = order.view(2, -1).T.flatten()
        sf = projection.weight_scale.view(torch.uint8)[:, order]
        codes = projection.weight[:, order]
        if transposed:
            codes, sf = codes.transpose(1, 2), sf.transpose(1, 2)
        tensors[f"{PREFIX}.{name}"] = codes.contiguous()
        tensors[f"{PREFIX}.{name}_weight_scale"] = sf.contiguous().view(torch.float8_e4m3fn)
        if projection.bias is not None:
            tensors[f"{PREFIX}.{name}_bias"] = projection.bias[:, order].contiguous()
    return tensors


def decode_mxfp4(codes: Tensor, exponents: Tensor) -> Tensor:
    """(N, K / 2) and (N, K / 32) uint8 -> (N, K) float64, straight from the definition."""
    values = torch.stack([E2M1[(codes & 15).long()], E2M1[(codes >> 4).long()]], dim=-1).flatten(1)
    scale = torch.exp2(exponents.double() - 127).repeat_interleave(32, dim=1)
    return values.double() * scale
