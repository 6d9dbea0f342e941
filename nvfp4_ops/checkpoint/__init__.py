"""NVFP4 checkpoints: open, load, inspect and write them."""

from pathlib import Path
from typing import Any

from nvfp4_ops.checkpoint.checkpoint import Checkpoint, Module, open_checkpoint
from nvfp4_ops.checkpoint.index import CheckpointError, TensorIndex, TensorInfo
from nvfp4_ops.checkpoint.inspect import CheckpointReport, ExpertsReport, inspect_checkpoint
from nvfp4_ops.checkpoint.linear import LinearTensors
from nvfp4_ops.checkpoint.quantize import quantize_checkpoint
from nvfp4_ops.checkpoint.scheme import Scheme
from nvfp4_ops.checkpoint.write import expert_tensors, input_amax, quantization_config
from nvfp4_ops.moe import NVFP4MoE

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointReport",
    "ExpertsReport",
    "LinearTensors",
    "Scheme",
    "TensorIndex",
    "TensorInfo",
    "expert_tensors",
    "input_amax",
    "inspect_checkpoint",
    "load_experts",
    "open_checkpoint",
    "quantization_config",
    "quantize_checkpoint",
]


def load_experts(
    source: Checkpoint | str | Path,
    prefix: str,
    *,
    module: type[Module] = NVFP4MoE,  # type: ignore[assignment]
    **options: Any,
) -> Module:
    """Load the experts of one layer; see ``Checkpoint.load_experts``.

    Args:
        source: directory of a checkpoint, or an open one.
        prefix: name of the experts, such as ``model.layers.0.mlp.experts`` (or, for Mixtral,
            ``model.layers.0.block_sparse_moe.experts``).
        module: the class to make, NVFP4MoE or a subclass.
        options: as ``Checkpoint.load_experts``'s: device, activation_scale, activation, ...

    Raises:
        CheckpointError: names the file and the tensor that is missing or wrong.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    return checkpoint.load_experts(prefix, module, **options)
