"""Whose checkpoint a directory holds, by its JSON files."""

from pathlib import Path
from typing import Any

from nvfp4_ops.checkpoint.compressed_tensors import CompressedTensors
from nvfp4_ops.checkpoint.index import CheckpointError, read_json
from nvfp4_ops.checkpoint.linear import Producer
from nvfp4_ops.checkpoint.modelopt import ModelOpt
from nvfp4_ops.checkpoint.mxfp4 import GptOss

MODELOPT_CONFIG, HF_CONFIG = "hf_quant_config.json", "config.json"


def read_model_config(directory: Path) -> dict[str, Any]:
    """config.json, or nothing where there is none."""
    path = directory / HF_CONFIG
    return read_json(path) if path.exists() else {}


def read_producer(directory: Path) -> Producer:
    """Parse hf_quant_config.json (ModelOpt) or the quantization_config of config.json.

    Raises:
        CheckpointError: there is none, or it asks for what is not supported.
    """
    path = directory / MODELOPT_CONFIG
    hf_config = read_model_config(directory).get("quantization_config")
    if path.exists():
        config = read_json(path).get("quantization")
        if isinstance(config, dict) and isinstance(hf_config, dict):
            # Only this one tells whether activations are quantized.
            config = {"config_groups": hf_config.get("config_groups")} | config
    elif (directory / HF_CONFIG).exists():
        path, config = directory / HF_CONFIG, hf_config
    else:
        raise CheckpointError(f"{directory}: has no {MODELOPT_CONFIG} or {HF_CONFIG}")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: has no quantization config: not NVFP4")
    method = "modelopt" if path.name == MODELOPT_CONFIG else config.get("quant_method")
    if method == "modelopt" or "quant_algo" in config:
        return ModelOpt.from_config(config, str(path))
    if method == "compressed-tensors":
        return CompressedTensors.from_config(config, str(path))
    if method == "mxfp4":
        return GptOss.from_config(config, str(path))
    raise CheckpointError(
        f"{path}: quant_method must be 'modelopt', 'compressed-tensors' or 'mxfp4', got {method!r}"
    )
