"""ModelOpt: its quantization config, its linear layers and its stacked experts.

===================  ========================  ================================================
X.weight             uint8 (N, K/2)            codes
X.weight_scale       float8_e4m3fn (N, K/16)   block scales, linear
X.weight_scale_2     fp32 ()                   global scale, decode
X.input_scale        fp32 ()                   of the input, decode; absent when weight-only
===================  ========================  ================================================

Stacked experts (gpt-oss, Llama 4) are transposed: X (E, K/2, N), X_weight_scale (E, K/16, N), one
X_weight_scale_2 and X_input_scale for all experts or for each, X_bias (E, N).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from nvfp4_ops import format as nvfp4
from nvfp4_ops.checkpoint.index import CheckpointError, TensorIndex
from nvfp4_ops.checkpoint.linear import (
    LinearTensors,
    check_bias,
    check_block_scale,
    check_packed,
    read_bias,
    read_global_scale,
)
from nvfp4_ops.checkpoint.scheme import ModuleNames, Scheme

SCHEMES: dict[str, Scheme] = {"NVFP4": "nvfp4", "W4A16_NVFP4": "w4a16_nvfp4"}
SUPPORTED_ALGORITHMS = (*SCHEMES, "MIXED_PRECISION")


@dataclass(frozen=True)
class ModelOpt:
    """A ModelOpt checkpoint, by its quantization config.

    algorithm: of every layer not excluded; "MIXED_PRECISION": that of ``quantized_layers``.
    exclude_modules: unquantized ones. quantized_layers: those of each algorithm.
    """

    algorithm: str
    exclude_modules: ModuleNames = field(default_factory=ModuleNames)
    quantized_layers: Mapping[str, ModuleNames] = field(default_factory=dict)
    weight_only: bool = False

    packed_name = "weight"
    # k_scale and v_scale are of the KV cache: they lie beside k_proj and v_proj, of which they say
    # nothing.
    tensor_names = frozenset(
        {
            "weight",
            "weight_scale",
            "weight_scale_2",
            "input_scale",
            "bias",
            "k_scale",
            "v_scale",
        }
    )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> "ModelOpt":
        """Parse ``quantization`` of hf_quant_config.json, or config.json's quantization_config.

        Raises:
            CheckpointError: an algorithm that is not supported, or a broken entry.
        """
        algorithm = config.get("quant_algo")
        if algorithm not in SUPPORTED_ALGORITHMS:
            raise CheckpointError(
                f"{where}: quant_algo must be one of {SUPPORTED_ALGORITHMS}, got {algorithm!r} "
                f"(quant_method {config.get('quant_method')!r}){_advice(algorithm)}"
            )
        group_size = config.get("group_size", nvfp4.BLOCK_SIZE)
        if algorithm in SCHEMES and group_size != nvfp4.BLOCK_SIZE:
            raise CheckpointError(
                f"{where}: group_size must be {nvfp4.BLOCK_SIZE}, got {group_size!r}"
            )
        exclude = config.get("exclude_modules", config.get("ignore")) or []
        layers = config.get("quantized_layers") or {}
        if not isinstance(exclude, list) or not isinstance(layers, dict):
            raise CheckpointError(
                f"{where}: exclude_modules must be a list and quantized_layers an object"
            )
        groups = (config.get("config_groups") or {}).values()
        return cls(
            algorithm,
            ModuleNames.from_wildcards(exclude),
            _by_algorithm(layers),
            weight_only=bool(groups) and all(not g.get("input_activations") for g in groups),
        )

    def scheme(self, module: str) -> Scheme | None:
        if module in self.exclude_modules:
            return None
        algorithm = self.algorithm
        if algorithm == "MIXED_PRECISION":
            listed = next(
                (a for a, modules in self.quantized_layers.items() if module in modules), None
            )
            if listed is None:
                return None
            algorithm = listed
            if algorithm not in SCHEMES:
                raise CheckpointError(
                    f"{module}: quant_algo must be one of {tuple(SCHEMES)}, got {algorithm!r}"
                    f"{_advice(algorithm)}"
                )
        scheme = SCHEMES[algorithm]
        return "w4a16_nvfp4" if self.weight_only else scheme

    def read_linear(self, index: TensorIndex, module: str) -> LinearTensors:
        rows, columns = check_packed(index, f"{module}.weight")
        scale = f"{module}.weight_scale"
        index.check(scale, torch.float8_e4m3fn, (rows, nvfp4.num_blocks(columns)))
        input_scale = f"{module}.input_scale"
        return LinearTensors(
            index.tensor(f"{module}.weight"),
            check_block_scale(index.where(scale), index.tensor(scale)),
            read_global_scale(index, f"{module}.weight_scale_2"),
            read_global_scale(index, input_scale) if input_scale in index else None,
            read_bias(index, f"{module}.bias", rows),
        )


class StackedProjection:
    """One projection of all experts, stored as one tensor ``name`` of codes.

    Either transposed, (E, K/2, N), or not, (E, N, K/2): the block scales tell.
    """

    tensor_names = frozenset({"", "_weight_scale", "_weight_scale_2", "_input_scale", "_bias"})

    def __init__(self, index: TensorIndex, name: str) -> None:
        self.index, self.name = index, name
        info, scale = index.info(name), index.info(f"{name}_weight_scale")
        if info.dtype != torch.uint8 or len(info.shape) != 3:
            raise CheckpointError(
                f"{index.where(name)} must be packed NVFP4, torch.uint8 (E, K/2, N) or (E, N, "
                f"K/2), got {info.dtype} {info.shape}"
            )
        self.num_experts, first, last = info.shape
        bytes_per_block = nvfp4.BLOCK_SIZE // nvfp4.CODES_PER_BYTE
        self.transposed = scale.shape == (self.num_experts, first // bytes_per_block, last)
        packed, self.num_rows = (first, last) if self.transposed else (last, first)
        self.num_columns = packed * nvfp4.CODES_PER_BYTE
        if self.num_columns % nvfp4.BLOCK_SIZE:
            raise CheckpointError(
                f"{index.where(name)}: K must be a multiple of {nvfp4.BLOCK_SIZE}, got "
                f"{self.num_columns}"
            )
        blocks = nvfp4.num_blocks(self.num_columns)
        shape = (blocks, self.num_rows) if self.transposed else (self.num_rows, blocks)
        index.check(f"{name}_weight_scale", torch.float8_e4m3fn, (self.num_experts, *shape))
        self.has_input_scale = f"{name}_input_scale" in index
        lead = self.num_experts, self.num_rows
        self.bias_dtype = check_bias(index, f"{name}_bias", lead)

    def expert(self, expert: int) -> LinearTensors:
        codes = self.index.row(self.name, expert)
        scale_name = f"{self.name}_weight_scale"
        block_scale = check_block_scale(
            f"{self.index.where(scale_name)}[{expert}]", self.index.row(scale_name, expert)
        )
        if self.transposed:
            codes, block_scale = codes.T, block_scale.T
        input_name, bias_name = f"{self.name}_input_scale", f"{self.name}_bias"
        return LinearTensors(
            codes,
            block_scale,
            read_global_scale(self.index, f"{self.name}_weight_scale_2", expert),
            read_global_scale(self.index, input_name, expert) if self.has_input_scale else None,
            self.index.row(bias_name, expert) if self.bias_dtype else None,
        )


def _by_algorithm(layers: Mapping[str, Any]) -> dict[str, ModuleNames]:
    names: dict[str, list[str]] = {}
    for name, layer in layers.items():
        algorithm = layer.get("quant_algo") if isinstance(layer, dict) else layer
        names.setdefault(str(algorithm), []).append(name)
    return {algorithm: ModuleNames.from_wildcards(modules) for algorithm, modules in names.items()}


def _advice(algorithm: object) -> str:
    if algorithm in ("NVFP4_AWQ", "NVFP4_SVD", "W4A8_AWQ"):
        return "; its scaled or low-rank inputs are not supported: export with NVFP4 instead"
    return ""
