"""load_pretrained: a transformers model from an NVFP4 checkpoint, ready to generate."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from nvfp4_ops.checkpoint import CheckpointError
from nvfp4_ops.huggingface.quantizer import METHOD
from nvfp4_ops.operand import ActivationScale


def load_pretrained(
    directory: str | Path,
    *,
    activation_scale: ActivationScale | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    model_class: Any = AutoModelForCausalLM,
    **options: Any,
) -> PreTrainedModel:
    """Load a transformers model from an NVFP4 checkpoint.

    Experts become NVFP4MoE, NVFP4 linear layers (attention, shared experts) NVFP4Linear; both
    stream from the files to their device. All else is transformers' own. For inference.

    Args:
        directory: checkpoint by ModelOpt or llm-compressor, with config.json.
        activation_scale: as NVFP4MoE's, of every NVFP4 module. None (weight-only) and the dynamic
            modes fit every checkpoint, "static" needs input scales in it. See
            ``set_activation_scale`` for changing it later.
        device: where the model is to live; None: the CPU.
        dtype: of everything that is not NVFP4; "auto": the config's.
        model_class: the auto class of transformers to load with.
        options: of ``from_pretrained``.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: names the file and the tensor that is missing, wrong or not supported.
        ValueError: a family or a flag of the experts that is not supported.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory}: has no config.json; it must be a local directory")
    trust = options.get("trust_remote_code", False)
    config = options.pop("config", None) or AutoConfig.from_pretrained(
        directory, trust_remote_code=trust
    )
    config.quantization_config = {
        "quant_method": METHOD,
        "activation_scale": activation_scale,
        "device": None if device is None else str(device),
    }
    # Transformers fills in random weights, or raises without a name; _check_loaded names them.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = model_class.from_pretrained(directory, config=config, dtype=dtype, **options)
    _check_loaded(directory, info)
    loaded: PreTrainedModel = model
    return loaded


def _check_loaded(directory: Path, info: dict[str, Any]) -> None:
    """Raise CheckpointError unless every tensor of the model came from the checkpoint."""
    problems = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    problems += [
        f"{name} must be {tuple(wanted)}, got {tuple(stored)}"
        for name, stored, wanted in sorted(info["mismatched_keys"])
    ]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise CheckpointError(f"{directory}: {'; '.join(problems[:5])}{more}")
