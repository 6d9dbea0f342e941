"""calibrate_checkpoint: how large the inputs of a float checkpoint's layers are on real text."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from nvfp4_ops import format as nvfp4
from nvfp4_ops.calibration import calibrate
from nvfp4_ops.checkpoint import TensorIndex
from nvfp4_ops.huggingface.names import ModelNames
from nvfp4_ops.huggingface.replace import replace_experts
from nvfp4_ops.moe import NVFP4MoE

DOWN_NAMES = ("down_proj", "w2")


@torch.inference_mode()
def calibrate_checkpoint(
    directory: str | Path,
    texts: Iterable[str],
    *,
    max_tokens: int = 512,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "auto",
    tokenizer: Any = None,
) -> dict[str, float]:
    """Largest magnitude of the input of every linear layer and expert of a float checkpoint.

    Runs the model with NVFP4 weights in its experts, as it will run later. All experts of a layer
    share the amax of the tokens; an expert's down projection has its own, or the largest of the
    others where it saw no token.

    Args:
        directory: of a Hugging Face checkpoint with float weights.
        texts: as in real use. Each is one sequence, cut after ``max_tokens`` tokens.
        device, dtype: of the model while it runs.
        tokenizer: None: the checkpoint's own.

    Returns:
        {module, as the checkpoint names it: amax}: ``input_amax`` of ``quantize_checkpoint``.
        Linear layers that were given nothing are left out.

    Raises:
        ValueError: no text, experts that are not supported, or activations that are not finite.
    """
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    nn.Module.to(model, device)
    owners = _owners(model, TensorIndex(directory).names())
    replace_experts(model)
    with calibrate(model), _observe_linears(model) as amax:
        for text in tqdm(list(texts), desc="calibrating", unit="text"):
            ids = tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")
            model(input_ids=ids["input_ids"].to(device), use_cache=False)
    return {
        name: float(value)
        for name, owner in owners.items()
        if (value := _input_amax(model, owner, name, amax)) is not None
    }


def _owners(model: PreTrainedModel, tensors: Iterable[str]) -> dict[str, str]:
    """{module of the checkpoint: the model's experts or linear layer it belongs to}."""
    names, tensors = ModelNames(model), list(tensors)
    experts = {prefix: module for module, prefix in names.experts(tensors).items()}
    owners: dict[str, str] = {}
    for tensor in tensors:
        prefix = names.experts_prefix(tensor)
        if prefix in experts and not tensor.endswith("bias"):
            owners[tensor.removesuffix(".weight")] = experts[prefix]
        elif module := names.linear(tensor):
            owners[tensor.removesuffix(".weight")] = module
    return owners


@contextmanager
def _observe_linears(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Running amax of the input of every linear layer, by name."""
    amax: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):

                def observe(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                    if inputs[0].numel():
                        seen = inputs[0].abs().amax().float()
                        amax[name] = torch.maximum(amax.get(name, seen), seen)

                stack.callback(module.register_forward_pre_hook(observe).remove)
        yield amax


def _input_amax(
    model: nn.Module, owner: str, name: str, linears: dict[str, Tensor]
) -> Tensor | None:
    module = model.get_submodule(owner)
    if not isinstance(module, NVFP4MoE):
        return linears.get(owner)
    *_, expert, projection = name.split(".")
    is_down = projection in DOWN_NAMES
    scales = (module.down_proj if is_down else module.first_proj).input_scale
    assert scales is not None
    # Stacked experts, which have no number, share one scale.
    scale = scales[int(expert)].amax() if expert.isdigit() else scales.amax()
    return scale * nvfp4.GLOBAL_SCALE_DIVISOR
