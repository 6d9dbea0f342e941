"""Find the experts of one layer among a checkpoint's tensors and read them one by one.

Two layouts: modules of their own (``prefix.E.gate_proj``, or ``w1`` and so on) and stacked ones
(``prefix.gate_up_proj``). Either way an expert is its segments in the order gate, up, down, the
gate absent where the model has none.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch

from nvfp4_ops.checkpoint import modelopt, mxfp4
from nvfp4_ops.checkpoint.index import CheckpointError, TensorIndex
from nvfp4_ops.checkpoint.linear import (
    INPUT_SCALE_SUFFIXES,
    LinearTensors,
    Producer,
    check_bias,
    check_packed,
)
from nvfp4_ops.checkpoint.modelopt import ModelOpt
from nvfp4_ops.checkpoint.mxfp4 import GptOss

# Gate, up, down as Qwen, DeepSeek and most others name them, then as Mixtral does.
PROJECTION_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
STACKED_NAMES = ("gate_up_proj", "down_proj")

# Model types whose stacked gate_up_proj has even rows for the gate and odd ones for up, or halves.
INTERLEAVED = {
    "gpt_oss": True,
    "openai_privacy_filter": True,
    "llama4": False,
    "llama4_text": False,
}


_EXPERT_TENSOR = re.compile(
    r"(.*\bexperts)\.(?:gate_up_proj|\d+\.(?:gate_proj|up_proj|down_proj|w1|w2|w3)\.)"
)


def find_prefixes(names: Iterable[str]) -> Sequence[str]:
    """Prefixes under which there are experts, quantized or not, in the order of the layers."""
    matched = (_EXPERT_TENSOR.match(name) for name in names)
    prefixes = {match[1] for match in matched if match is not None}
    return sorted(
        prefixes, key=lambda p: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", p)]
    )


class Experts(ABC):
    """The experts of one layer, as stored.

    num_experts, gated, has_input_scale: of all of them. bias_dtype: None without biases.
    hidden_size, intermediate_size: D and F.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    gated: bool
    has_input_scale: bool
    bias_dtype: torch.dtype | None

    @abstractmethod
    def read(self, expert: int) -> tuple[LinearTensors, ...]:
        """The segments of one expert: gate, up, down, or up, down.

        Raises:
            CheckpointError: names the tensor that is missing or wrong.
        """


def find_experts(
    index: TensorIndex, producer: Producer, prefix: str, *, interleaved: bool | None
) -> Experts:
    """The experts under a prefix.

    interleaved: whether rows of a stacked gate_up_proj alternate; None: by the model type.

    Raises:
        CheckpointError: there are none, some are missing, or they are in two layouts at once.
    """
    names = [name.removeprefix(f"{prefix}.") for name in index.under(prefix)]
    stacked = any(name.startswith(STACKED_NAMES) for name in names)
    numbered = any(name.partition(".")[0].isdigit() for name in names)
    if stacked and numbered:
        raise CheckpointError(
            f"{index.directory}: {prefix} has both numbered and stacked experts; keep one of them"
        )
    if stacked:
        return StackedExperts(index, producer, prefix, names, interleaved)
    if numbered:
        return NumberedExperts(index, producer, prefix, names)
    raise CheckpointError(
        f"{index.directory}: has no experts under {prefix}: looked for "
        f"{prefix}.0.{PROJECTION_NAMES[0][0]}.{producer.packed_name}, "
        f"{prefix}.0.{PROJECTION_NAMES[1][0]}.{producer.packed_name} and "
        f"{prefix}.{STACKED_NAMES[0]}"
    )


class NumberedExperts(Experts):
    """``prefix.0.gate_proj.*``, ``prefix.0.up_proj.*``, ..."""

    def __init__(
        self, index: TensorIndex, producer: Producer, prefix: str, names: Sequence[str]
    ) -> None:
        self._index, self._producer, self._prefix = index, producer, prefix
        parts = [name.split(".", 2) for name in names]
        self.num_experts = self._count({part[0] for part in parts})
        self._names = self._choose_names({part[1] for part in parts if len(part) > 1})
        self.gated = len(self._names) == 3
        suffixes = set()
        for part in parts:
            if len(part) != 3 or part[1] not in self._names or part[2] not in producer.tensor_names:
                raise CheckpointError(
                    f"{index.where('.'.join((prefix, *part)))} is not known here and could change "
                    "the meaning of the others (as pre_quant_scale and svdquant_lora do); export "
                    "with plain NVFP4 instead"
                )
            suffixes.add(part[2])
        self.has_input_scale = not suffixes.isdisjoint(INPUT_SCALE_SUFFIXES)
        first, down = (
            check_packed(index, f"{prefix}.0.{name}.{producer.packed_name}")
            for name in (self._names[0], self._names[-1])
        )
        self.intermediate_size, self.hidden_size = first
        bias = f"{prefix}.0.{self._names[0]}.bias"
        self.bias_dtype = check_bias(index, bias, (self.intermediate_size,))
        if down != first[::-1]:
            raise CheckpointError(
                f"{index.where(f'{prefix}.0.{self._names[-1]}.{producer.packed_name}')} is "
                f"(N, K) = {down}, which does not fit {self._names[0]}'s {first}"
            )

    def _count(self, numbers: set[str]) -> int:
        where = f"{self._index.directory}: {self._prefix}"
        odd = sorted(n for n in numbers if not n.isdigit() or n != str(int(n)))
        if odd:
            raise CheckpointError(f"{where} has {odd} among its experts' numbers")
        missing = sorted(set(range(max(map(int, numbers)) + 1)) - set(map(int, numbers)))
        if missing:
            raise CheckpointError(f"{where} has no experts {missing}; download or export it again")
        return len(numbers)

    def _choose_names(self, found: set[str]) -> tuple[str, ...]:
        fitting = [names for names in PROJECTION_NAMES if found & set(names)]
        if len(fitting) != 1:
            raise CheckpointError(
                f"{self._index.directory}: the experts of {self._prefix} must have projections "
                f"{' or '.join(map(str, PROJECTION_NAMES))}, got {sorted(found)}"
            )
        gate, *others = fitting[0]
        return (gate, *others) if gate in found else tuple(others)

    def read(self, expert: int) -> tuple[LinearTensors, ...]:
        read = []
        for name in self._names:
            module = f"{self._prefix}.{expert}.{name}"
            self._check_size(module, is_down=name == self._names[-1])
            segment = self._producer.read_linear(self._index, module)
            self._check_optional(module, segment)
            read.append(segment)
        return tuple(read)

    def _check_size(self, module: str, *, is_down: bool) -> None:
        name = f"{module}.{self._producer.packed_name}"
        size = check_packed(self._index, name)
        expected = self.intermediate_size, self.hidden_size
        if is_down:
            expected = expected[::-1]
        if size != expected:
            raise CheckpointError(
                f"{self._index.where(name)} must be (N, K) = {expected} as in expert 0, got {size}"
            )

    def _check_optional(self, module: str, segment: LinearTensors) -> None:
        """What one expert has all must have."""
        where = f"{self._index.directory}: tensor {module}"
        if self.has_input_scale and segment.input_scale is None:
            (name,) = self._producer.tensor_names.intersection(INPUT_SCALE_SUFFIXES)
            raise CheckpointError(
                f"{where}.{name} is missing, though other experts have one; calibrate again so "
                "that every expert sees a token, or pass ignore_input_scale=True and quantize "
                "activations dynamically"
            )
        if (segment.bias is None) != (self.bias_dtype is None):
            raise CheckpointError(
                f"{where}.bias is {'missing' if segment.bias is None else 'there'}, unlike that of "
                "other projections; export it again"
            )


class StackedExperts(Experts):
    """``prefix.gate_up_proj*`` and ``prefix.down_proj*`` for all experts at once."""

    gated = True

    def __init__(
        self,
        index: TensorIndex,
        producer: Producer,
        prefix: str,
        names: Sequence[str],
        interleaved: bool | None,
    ) -> None:
        projection: type[modelopt.StackedProjection] | type[mxfp4.StackedProjection]
        if isinstance(producer, ModelOpt):
            projection = modelopt.StackedProjection
        elif isinstance(producer, GptOss):
            projection = mxfp4.StackedProjection
        else:
            raise CheckpointError(
                f"{index.directory}: {prefix} is stacked, as only ModelOpt and gpt-oss store them"
            )
        if interleaved is None:
            raise CheckpointError(
                f"{index.directory}: {prefix}.{STACKED_NAMES[0]} is stacked, and config.json's "
                "model_type does not tell how: pass interleaved=True if its rows alternate between "
                "gate and up, False if all gate rows come first"
            )
        known = {name + suffix for name in STACKED_NAMES for suffix in projection.tensor_names}
        unknown = sorted(set(names) - known)
        if unknown:
            raise CheckpointError(
                f"{index.where(f'{prefix}.{unknown[0]}')} is not known here and could change the "
                "meaning of the others; export with plain NVFP4 instead"
            )
        self._interleaved = interleaved
        self._first, self._down = (projection(index, f"{prefix}.{name}") for name in STACKED_NAMES)
        first, down = self._first, self._down
        self.num_experts, self.hidden_size = first.num_experts, first.num_columns
        self.intermediate_size = first.num_rows // 2
        expected = self.num_experts, self.hidden_size, self.intermediate_size
        if (down.num_experts, down.num_rows, down.num_columns) != expected or first.num_rows % 2:
            raise CheckpointError(
                f"{index.directory}: {down.name} must be (E, N, K) = {expected} to fit "
                f"{first.name}, got {(down.num_experts, down.num_rows, down.num_columns)}"
            )
        for suffix in ("_bias", "_input_scale"):
            lacking = [p.name for p in (first, down) if f"{p.name}{suffix}" not in index]
            if len(lacking) == 1:
                raise CheckpointError(f"{index.directory}: tensor {lacking[0]}{suffix} is missing")
        self.bias_dtype, self.has_input_scale = first.bias_dtype, first.has_input_scale

    def read(self, expert: int) -> tuple[LinearTensors, ...]:
        gate_up, half = self._first.expert(expert), self.intermediate_size
        gate, up = slice(None, half), slice(half, None)
        if self._interleaved:
            gate, up = slice(0, None, 2), slice(1, None, 2)
        return gate_up.rows(gate), gate_up.rows(up), self._down.expert(expert)
