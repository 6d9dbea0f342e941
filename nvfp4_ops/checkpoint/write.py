"""Write experts in ModelOpt's checkpoint layout; the inverse of loading."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from nvfp4_ops import format as nvfp4
from nvfp4_ops.checkpoint.experts import PROJECTION_NAMES
from nvfp4_ops.moe import NVFP4MoE


def expert_tensors(moe: NVFP4MoE, prefix: str) -> dict[str, Tensor]:
    """The experts of a gated module as ModelOpt names and stores them; inverse of load_experts.

    Args:
        moe: gated, without biases.
        prefix: such as ``model.layers.0.mlp.experts``.

    Returns:
        {tensor name: tensor on the CPU}, the projections named gate_proj, up_proj and down_proj.
    """
    if not moe.gated or moe.down_proj.bias is not None:
        raise ValueError("moe: only gated experts without biases have this layout")
    tensors: dict[str, Tensor] = {}
    targets = ((moe.first_proj, 0), (moe.first_proj, 1), (moe.down_proj, 0))
    for name, (projection, segment) in zip(PROJECTION_NAMES[0], targets, strict=True):
        codes, block_scale = projection.canonical()
        rows = projection.segment_rows(segment)
        for expert in range(moe.num_experts):
            scale_2 = projection.segment(projection.weight_scale_2)
            parts = {
                "weight": codes[expert, rows],
                "weight_scale": block_scale[expert, rows],
                "weight_scale_2": scale_2[expert, segment],
            }
            if projection.input_scale is not None:
                parts["input_scale"] = projection.segment(projection.input_scale)[expert, segment]
            key = f"{prefix}.{expert}.{name}"
            # Clones: safetensors refuses tensors that share storage.
            tensors.update({f"{key}.{k}": v.detach().cpu().clone() for k, v in parts.items()})
    return tensors


def input_amax(
    moe: NVFP4MoE, prefix: str, names: Sequence[str] = PROJECTION_NAMES[0]
) -> dict[str, float]:
    """What ``quantize_checkpoint`` takes as ``input_amax``, of calibrated experts.

    Args:
        moe: gated, with input scales: see ``nvfp4_ops.calibrate``.
        prefix: the experts' name in the checkpoint to be quantized.
        names: of its gate, up and down projections.
    """
    if not moe.gated:
        raise ValueError("moe: must be gated")
    columns: list[Tensor] = []
    for name, projection in moe.projections().items():
        projection.check_input_scale(name)
        assert projection.input_scale is not None
        columns += projection.segment(projection.input_scale).double().cpu().unbind(1)
    return {
        f"{prefix}.{expert}.{name}": float(scales[expert]) * nvfp4.GLOBAL_SCALE_DIVISOR
        for name, scales in zip(names, columns, strict=True)
        for expert in range(moe.num_experts)
    }


def quantization_config(exclude_modules: Sequence[str], *, static: bool) -> dict[str, Any]:
    """ModelOpt's ``quantization`` entry of hf_quant_config.json.

    exclude_modules: names of the modules left unquantized, wildcards allowed.
    static: whether input scales are stored.
    """
    return {
        "quant_algo": "NVFP4" if static else "W4A16_NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": nvfp4.BLOCK_SIZE,
        "exclude_modules": list(exclude_modules),
    }


def hf_quantization_config(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """The same for ``quantization_config`` of config.json."""
    numbers = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": nvfp4.BLOCK_SIZE}
    group: dict[str, Any] = {"weights": numbers, "targets": ["Linear"]}
    if quantization["quant_algo"] == "NVFP4":
        group["input_activations"] = dict(numbers)
    return {
        "quant_method": "modelopt",
        "quant_algo": quantization["quant_algo"],
        "config_groups": {"group_0": group},
        "ignore": list(quantization["exclude_modules"]),
    }
