"""Which module of a transformers model a checkpoint's tensors belong to.

Checkpoints have the names of the hub; transformers 5 has its own, and renames while it loads. Its
table is applied to the names here, so that no family is listed twice.
"""

import re
from collections.abc import Callable, Iterable, Set

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from nvfp4_ops.checkpoint import CheckpointError
from nvfp4_ops.huggingface.families import experts_modules

# "shared_experts" does not match: there is no word boundary within it.
_EXPERTS = re.compile(r"^(?:.*?\.)?experts(?=\.)")
_QUANTIZED = re.compile(r"^(.*)\.(?:weight_scale|weight_packed)$")


def experts_names(model: PreTrainedModel, tensors: Iterable[str]) -> dict[str, str]:
    """{experts module of ``model``: prefix of its tensors in the checkpoint}.

    Args:
        model: as transformers builds it, before any module is replaced.
        tensors: every tensor name of the checkpoint.

    Raises:
        CheckpointError: experts that the model does not have.
    """
    first: dict[str, str] = {}
    for tensor in tensors:
        if found := _EXPERTS.match(tensor):
            first.setdefault(found.group(), tensor)
    modules = experts_modules(model).keys()
    rename = _renaming(model)
    names: dict[str, str] = {}
    for prefix, tensor in first.items():
        renamed = rename(tensor.replace(".weight_packed", ".weight"))[0]
        found = _EXPERTS.match(renamed)
        _add(names, model, modules, found.group() if found else renamed, prefix)
    return names


def linear_names(model: PreTrainedModel, tensors: Iterable[str]) -> dict[str, str]:
    """{linear layer of ``model``: its name in the checkpoint}, of those with block scales.

    Experts are not among them. Arguments as ``experts_names``'s.

    Raises:
        CheckpointError: a layer that the model does not have, or merges with others.
    """
    stored = dict.fromkeys(
        found.group(1)
        for tensor in tensors
        if (found := _QUANTIZED.match(tensor)) and not _EXPERTS.match(tensor)
    )
    modules = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    rename = _renaming(model)
    names: dict[str, str] = {}
    for name in stored:
        renamed, converted = rename(f"{name}.weight")
        if converted:
            raise CheckpointError(
                f"{name}: {type(model).__name__} merges, splits or permutes this layer's weight "
                f"while loading (into {renamed}), which a quantized weight does not allow"
            )
        _add(names, model, modules, renamed.removesuffix(".weight"), name)
    return names


def _renaming(model: PreTrainedModel) -> Callable[[str], tuple[str, bool]]:
    """From a checkpoint's name to the model's, and whether the tensor is converted on the way."""
    table = get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]

    def rename(name: str) -> tuple[str, bool]:
        renamed, pattern = rename_source_key(name, renamings, converters)
        return renamed, pattern is not None

    return rename


def _add(
    names: dict[str, str], model: PreTrainedModel, modules: Set[str], renamed: str, stored: str
) -> None:
    """Enter ``renamed``, with or without the prefix of the base model, if it is in ``modules``."""
    base = f"{model.base_model_prefix}."
    for name in (renamed, base + renamed, renamed.removeprefix(base)):
        if name in modules:
            if name in names:
                raise CheckpointError(f"{stored} and {names[name]}: both are {name} of the model")
            names[name] = stored
            return
    # Layers that transformers drops on purpose, such as those of multi-token prediction.
    dropped = model._keys_to_ignore_on_load_unexpected or ()
    if not any(re.search(pattern, f"{renamed}.weight") for pattern in dropped):
        raise CheckpointError(f"{stored}: {type(model).__name__} has no such layer ({renamed})")
