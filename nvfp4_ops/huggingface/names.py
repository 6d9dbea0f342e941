"""Which module of a transformers model a checkpoint's tensors belong to.

Checkpoints have the names of the hub; transformers 5 has its own, and renames while it loads. Its
table is applied to the names here, so that no family is listed twice.
"""

import re
from collections.abc import Iterable, Set

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from nvfp4_ops.checkpoint import CheckpointError
from nvfp4_ops.huggingface.families import experts_modules

# "shared_experts" does not match: there is no word boundary within it.
_EXPERTS = re.compile(r"^(?:.*?\.)?experts(?=\.)")
_QUANTIZED = re.compile(r"^(.*)\.(?:weight_scale|weight_scale_inv|weight_packed)$")


class ModelNames:
    """From the tensor names of a checkpoint to the modules of a model.

    model: as transformers builds it, before any module is replaced.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        table = get_model_conversion_mapping(model)
        self._model = model
        self._renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in table if isinstance(entry, WeightConverter)]
        self._experts = experts_modules(model).keys()
        self._linears = {n for n, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        self._base = f"{model.base_model_prefix}."
        # Such as the layers of multi-token prediction.
        dropped = model._keys_to_ignore_on_load_unexpected or ()
        self._dropped = [re.compile(pattern) for pattern in dropped]

    def experts(self, tensors: Iterable[str]) -> dict[str, str]:
        """{experts module of the model: prefix of its tensors in the checkpoint}.

        tensors: every tensor name of the checkpoint.

        Raises:
            CheckpointError: experts that the model does not have.
        """
        first: dict[str, str] = {}
        for tensor in tensors:
            if prefix := self.experts_prefix(tensor):
                first.setdefault(prefix, tensor)
        names: dict[str, str] = {}
        for prefix, tensor in first.items():
            renamed = self._rename(tensor.replace(".weight_packed", ".weight"))[0]
            self._enter(names, self._experts, self.experts_prefix(renamed) or renamed, prefix)
        return names

    @staticmethod
    def experts_prefix(tensor: str) -> str | None:
        """Name of the experts that a tensor belongs to: up to and with "experts"."""
        found = _EXPERTS.match(tensor)
        return found.group() if found else None

    def linears(self, tensors: Iterable[str]) -> dict[str, str]:
        """{linear layer of the model: its name in the checkpoint}, of those with weight scales.

        Experts are not among them.

        Raises:
            CheckpointError: a layer that the model does not have, or merges with others.
        """
        stored = dict.fromkeys(
            found.group(1)
            for tensor in tensors
            if (found := _QUANTIZED.match(tensor)) and not self.experts_prefix(tensor)
        )
        names: dict[str, str] = {}
        for name in stored:
            renamed, converted = self._rename(f"{name}.weight")
            if converted:
                raise CheckpointError(
                    f"{name}: {type(self._model).__name__} merges, splits or permutes this weight "
                    f"while loading (into {renamed}), which a quantized weight does not allow"
                )
            self._enter(names, self._linears, renamed.removesuffix(".weight"), name)
        return names

    def linear(self, tensor: str) -> str | None:
        """The linear layer whose weight this float tensor is, if it is loaded as it is."""
        renamed, converted = self._rename(tensor)
        module = self._find(self._linears, renamed.removesuffix(".weight"))
        return None if converted or not renamed.endswith(".weight") else module

    def is_dropped(self, tensor: str) -> bool:
        """Whether the model leaves this tensor out on purpose."""
        renamed = self._rename(tensor)[0]
        return any(pattern.search(name) for pattern in self._dropped for name in (tensor, renamed))

    def _rename(self, name: str) -> tuple[str, bool]:
        """The model's name, and whether the tensor is converted on the way."""
        renamed, pattern = rename_source_key(name, self._renamings, self._converters)
        return renamed, pattern is not None

    def _find(self, modules: Set[str], renamed: str) -> str | None:
        """The one of ``modules`` that ``renamed`` is, with or without the base model's prefix."""
        candidates = (renamed, self._base + renamed, renamed.removeprefix(self._base))
        return next((name for name in candidates if name in modules), None)

    def _enter(self, names: dict[str, str], modules: Set[str], renamed: str, stored: str) -> None:
        """Enter ``stored`` under its module, unless the model drops it."""
        name = self._find(modules, renamed)
        if name in names:
            raise CheckpointError(f"{stored} and {names[name]}: both are {name} of the model")
        if name is not None:
            names[name] = stored
        elif not self.is_dropped(f"{stored}.weight"):
            raise CheckpointError(
                f"{stored}: {type(self._model).__name__} has no such layer ({renamed})"
            )
