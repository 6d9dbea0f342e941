"""compressed-tensors (llm-compressor): its config groups and its linear layers.

======================  ========================  =============================================
X.weight_packed         uint8 (N, K/2)            codes
X.weight_scale          float8_e4m3fn (N, K/16)   block scales, linear
X.weight_global_scale   fp32 (1,)                 RECIPROCAL of the global scale
X.input_global_scale    fp32 (1,)                 reciprocal too; absent when weight-only
======================  ========================  =============================================

This is the only place where a scale is inverted. In ``mxfp4-pack-quantized`` layers weight_scale
is uint8 (N, K/32) and there is no global scale.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from nvfp4_ops import format as nvfp4
from nvfp4_ops.checkpoint import mxfp4
from nvfp4_ops.checkpoint.index import CheckpointError, TensorIndex
from nvfp4_ops.checkpoint.linear import (
    LinearTensors,
    check_block_scale,
    check_packed,
    read_bias,
    read_global_scale,
)
from nvfp4_ops.checkpoint.scheme import ModuleNames, Scheme

NVFP4_FORMAT, MXFP4_FORMAT = "nvfp4-pack-quantized", "mxfp4-pack-quantized"

# Of the modules' classes a checkpoint knows only that quantized ones are linear.
_LINEAR_CLASS = "Linear"


@dataclass(frozen=True)
class Group:
    """Modules quantized alike: the named ones and, with ``all_linear``, the rest."""

    modules: ModuleNames
    all_linear: bool
    format: str
    has_activations: bool

    @property
    def scheme(self) -> Scheme | None:
        """None: not supported."""
        if self.format == MXFP4_FORMAT:
            return "mxfp4"
        if self.format == NVFP4_FORMAT:
            return "nvfp4" if self.has_activations else "w4a16_nvfp4"
        return None


@dataclass(frozen=True)
class CompressedTensors:
    """A compressed-tensors checkpoint, by its quantization config."""

    groups: tuple[Group, ...]
    ignore: ModuleNames = field(default_factory=ModuleNames)

    packed_name = "weight_packed"
    tensor_names = frozenset(
        {"weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", "bias"}
    )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> "CompressedTensors":
        """Parse config.json's quantization_config.

        Raises:
            CheckpointError: no group has a supported format, or the weights are not compressed.
        """
        status = config.get("quantization_status")
        if status != "compressed":
            raise CheckpointError(
                f"{where}: quantization_status must be 'compressed', got {status!r}; save the "
                "model with save_compressed=True"
            )
        for extra in ("transform_config", "sparsity_config"):
            content = config.get(extra) or {}
            if content and content.get("format") != "dense":
                raise CheckpointError(
                    f"{where}: {extra} is not supported and can not be ignored, got {content}"
                )
        _check_patterns(config, where)
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise CheckpointError(f"{where}: has no config_groups")
        parsed = tuple(_group(group, str(config.get("format")), where) for group in groups.values())
        if all(group.scheme is None for group in parsed):
            raise CheckpointError(
                f"{where}: format must be {NVFP4_FORMAT!r} or {MXFP4_FORMAT!r}, got "
                f"{', '.join(repr(group.format) for group in parsed)}"
            )
        return cls(parsed, _modules(config.get("ignore") or ()))

    def scheme(self, module: str) -> Scheme | None:
        if module in self.ignore:
            return None
        group = self._group_of(module)
        if group is None:
            return None
        if group.scheme is None:
            raise CheckpointError(
                f"{module}: format must be {NVFP4_FORMAT!r} or {MXFP4_FORMAT!r}, got "
                f"{group.format!r}"
            )
        return group.scheme

    def _group_of(self, module: str) -> Group | None:
        """Names come before classes, as in compressed-tensors."""
        named = next((group for group in self.groups if module in group.modules), None)
        return named or next((group for group in self.groups if group.all_linear), None)

    def read_linear(self, index: TensorIndex, module: str) -> LinearTensors:
        packed, scale = f"{module}.weight_packed", f"{module}.weight_scale"
        rows, columns = check_packed(index, packed)
        bias = read_bias(index, f"{module}.bias", rows)
        if self.scheme(module) == "mxfp4":
            exponents = mxfp4.read_exponents(index, scale, rows, columns)
            weight = mxfp4.to_nvfp4(index.where(scale), index.tensor(packed), exponents)
            return LinearTensors(*weight, None, bias)
        index.check(scale, torch.float8_e4m3fn, (rows, nvfp4.num_blocks(columns)))
        input_scale = f"{module}.input_global_scale"
        return LinearTensors(
            index.tensor(packed),
            check_block_scale(index.where(scale), index.tensor(scale)),
            _read_reciprocal(index, f"{module}.weight_global_scale"),
            _read_reciprocal(index, input_scale) if input_scale in index else None,
            bias,
        )


def _check_patterns(config: Mapping[str, Any], where: str) -> None:
    groups = (config.get("config_groups") or {}).values()
    for target in chain(config.get("ignore") or (), *(g.get("targets") or () for g in groups)):
        try:
            re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
        except re.error as error:
            raise CheckpointError(
                f"{where}: {target!r} is no regular expression: {error}"
            ) from error


def _group(group: Mapping[str, Any], default_format: str, where: str) -> Group:
    weights = group.get("weights") or {}
    format_ = group.get("format") or default_format
    if format_ == NVFP4_FORMAT:
        expected = {"num_bits": 4, "type": "float", "group_size": nvfp4.BLOCK_SIZE}
        wrong = {k: weights.get(k) for k, v in expected.items() if weights.get(k) != v}
        if wrong or weights.get("symmetric") is False:
            raise CheckpointError(
                f"{where}: weights of {NVFP4_FORMAT} must be {expected}, "
                f"symmetric, got {wrong or 'asymmetric ones'}"
            )
    targets = group.get("targets") or ()
    has_activations = bool(group.get("input_activations"))
    return Group(_modules(targets), _LINEAR_CLASS in targets, format_, has_activations)


def _modules(targets: Iterable[str]) -> ModuleNames:
    """From names and "re:" patterns."""
    patterns = [target.removeprefix("re:") for target in targets if target.startswith("re:")]
    return ModuleNames((t for t in targets if not t.startswith("re:")), patterns)


def _read_reciprocal(index: TensorIndex, name: str) -> Tensor:
    scale = 1.0 / read_global_scale(index, name)
    if not scale.isfinite() or scale <= 0:
        raise CheckpointError(
            f"{index.where(name)}: its reciprocal is not a positive, finite float32"
        )
    return scale
