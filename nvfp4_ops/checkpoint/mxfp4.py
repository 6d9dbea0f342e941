"""MXFP4 read as NVFP4, exactly or not at all; and gpt-oss' own layout of it.

MXFP4 has the same 4-bit codes in groups of 32 with a power-of-two scale 2^(byte - 127) and no
global scale. e4m3 holds the powers 2^-9 to 2^8, so a group of 32 is two blocks of 16 with that
scale, and a power of two common to the tensor goes into the global scale. Only a tensor whose
exponents span more than 18 powers does not fit.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nvfp4_ops import format as nvfp4
from nvfp4_ops.checkpoint.index import CheckpointError, TensorIndex
from nvfp4_ops.checkpoint.linear import LinearTensors, check_bias
from nvfp4_ops.checkpoint.scheme import ModuleNames, Scheme
from nvfp4_ops.weight import NVFP4Weight

GROUP_SIZE = 32
_BIAS, _NAN_BYTE = 127, 255
_MIN_EXPONENT, _MAX_EXPONENT = -9, 8
_MAGNITUDES = 0x77
"""The bits of two codes but for their signs."""


def read_exponents(index: TensorIndex, name: str, rows: int, columns: int) -> Tensor:
    """The stored uint8 (N, K / 32), checked."""
    if columns % GROUP_SIZE:
        raise CheckpointError(
            f"{index.where(name)}: K must be a multiple of {GROUP_SIZE}, got {columns}"
        )
    index.check(name, (torch.uint8, torch.float8_e8m0fnu), (rows, columns // GROUP_SIZE))
    return index.tensor(name).view(torch.uint8)


def to_nvfp4(where: str, codes: Tensor, exponents: Tensor) -> NVFP4Weight:
    """The same values in NVFP4.

    Args:
        where: names the tensor in messages.
        codes: (N, K / 2) uint8. exponents: (N, K / 32) uint8, biased by 127.

    Raises:
        CheckpointError: a scale is NaN, or the exponents span more than e4m3 has powers of two.
    """
    if bool((exponents == _NAN_BYTE).any()):
        raise CheckpointError(f"{where} holds NaN scales; the checkpoint is broken here")
    group_bytes = GROUP_SIZE // nvfp4.CODES_PER_BYTE
    is_zero = ((codes & _MAGNITUDES) == 0).unflatten(1, (-1, group_bytes)).all(-1)
    exponent = exponents.int() - _BIAS
    shift = 0
    if not bool(is_zero.all()):
        used = exponent[~is_zero]
        low, high = int(used.min()), int(used.max())
        if high - low > _MAX_EXPONENT - _MIN_EXPONENT:
            raise CheckpointError(
                f"{where} spans the scales 2^{low} to 2^{high}: NVFP4 holds "
                f"{_MAX_EXPONENT - _MIN_EXPONENT + 1} powers of two exactly; quantize the "
                "original weights instead"
            )
        # As near to 1 as all exponents allow.
        shift = min(max(0, high - _MAX_EXPONENT), low - _MIN_EXPONENT)
    # Any scale suits a group of zeros.
    exponent = (exponent - shift).clamp(_MIN_EXPONENT, _MAX_EXPONENT)
    block_scale = torch.exp2(exponent.float()).to(torch.float8_e4m3fn)
    twice = block_scale.view(torch.uint8).repeat_interleave(GROUP_SIZE // nvfp4.BLOCK_SIZE, dim=1)
    return NVFP4Weight(
        codes,
        twice.view(torch.float8_e4m3fn),
        torch.tensor(2.0**shift, dtype=torch.float32, device=codes.device),
    )


@dataclass(frozen=True)
class GptOss:
    """A checkpoint of transformers' ``mxfp4`` method, by its quantization config."""

    modules_to_not_convert: ModuleNames = field(default_factory=ModuleNames)

    packed_name = "weight_packed"
    tensor_names = frozenset({"weight_packed"})

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> "GptOss":
        return cls(ModuleNames.from_wildcards(config.get("modules_to_not_convert") or ()))

    def scheme(self, module: str) -> Scheme | None:
        if module in self.modules_to_not_convert:
            return None
        # transformers converts the experts and nothing else.
        return "mxfp4" if re.search(r"\.experts(\.|$)", f".{module}") else None

    def read_linear(self, index: TensorIndex, module: str) -> LinearTensors:
        raise CheckpointError(
            f"{index.directory}: {module}: mxfp4 checkpoints quantize experts only"
        )


class StackedProjection:
    """One projection of all experts: ``X_blocks`` (E, N, K/32, 16), ``X_scales`` (E, N, K/32)."""

    tensor_names = frozenset({"_blocks", "_scales", "_bias"})
    has_input_scale = False

    def __init__(self, index: TensorIndex, name: str) -> None:
        self.index, self.name = index, name
        info = index.info(f"{name}_blocks")
        group_bytes = GROUP_SIZE // nvfp4.CODES_PER_BYTE
        if info.dtype != torch.uint8 or len(info.shape) != 4 or info.shape[3] != group_bytes:
            raise CheckpointError(
                f"{index.where(f'{name}_blocks')} must be torch.uint8 (E, N, K/{GROUP_SIZE}, "
                f"{group_bytes}), got {info.dtype} {info.shape}"
            )
        self.num_experts, self.num_rows, groups, _ = info.shape
        self.num_columns = groups * GROUP_SIZE
        index.check(
            f"{name}_scales",
            (torch.uint8, torch.float8_e8m0fnu),
            (self.num_experts, self.num_rows, groups),
        )
        lead = self.num_experts, self.num_rows
        self.bias_dtype = check_bias(index, f"{name}_bias", lead)

    def expert(self, expert: int) -> LinearTensors:
        codes = self.index.row(f"{self.name}_blocks", expert).flatten(1)
        scales = self.index.row(f"{self.name}_scales", expert).view(torch.uint8)
        where = f"{self.index.where(f'{self.name}_scales')}[{expert}]"
        bias = self.index.row(f"{self.name}_bias", expert) if self.bias_dtype else None
        return LinearTensors(*to_nvfp4(where, codes, scales), None, bias)
