"""Checkpoint: an NVFP4 checkpoint on disk, and loading experts and linear layers from it."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvfp4_ops.checkpoint.config import read_model_config, read_producer
from nvfp4_ops.checkpoint.experts import INTERLEAVED, Experts, find_experts, find_prefixes
from nvfp4_ops.checkpoint.index import FLOAT_DTYPES, CheckpointError, TensorIndex, TensorInfo
from nvfp4_ops.checkpoint.linear import INPUT_SCALE_SUFFIXES, LinearTensors
from nvfp4_ops.checkpoint.load import Module, fill
from nvfp4_ops.checkpoint.scheme import Scheme
from nvfp4_ops.moe import NVFP4MoE
from nvfp4_ops.operand import ActivationScale


def open_checkpoint(directory: str | Path) -> "Checkpoint":
    """Open a checkpoint by ModelOpt, llm-compressor (compressed-tensors) or gpt-oss (MXFP4).

    Reads the configs and the headers of all shards, no data.

    directory: with config.json or hf_quant_config.json, and model.safetensors or shards of it.

    Raises:
        CheckpointError: a file is missing or broken, or the quantization is not supported.
    """
    return Checkpoint(directory)


class Checkpoint:
    """A directory of safetensors files with a quantization config; see ``open_checkpoint``.

    Names are the checkpoint's own, which may differ from those of a model's modules.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: no such directory")
        self.producer = read_producer(self.directory)
        self.config = read_model_config(self.directory)
        self.index = TensorIndex(self.directory)

    def names(self) -> Sequence[str]:
        """The names of all tensors, sorted."""
        return self.index.names()

    def __contains__(self, name: str) -> bool:
        return name in self.index

    def info(self, name: str) -> TensorInfo:
        """File, dtype and shape of a tensor, without reading it."""
        return self.index.info(name)

    def tensor(self, name: str, device: torch.device | str | None = None) -> Tensor:
        """The stored tensor, on ``device`` or the CPU."""
        return self.index.tensor(name, device)

    def scheme(self, module: str) -> Scheme | None:
        """How a linear layer, or the experts of a layer, are quantized; None: not at all.

        Layers that the config takes for quantized but that are stored as floats, or are no
        linear layers, are not quantized.

        Args:
            module: such as ``model.layers.0.self_attn.q_proj`` or ``model.layers.0.mlp.experts``.

        Raises:
            CheckpointError: a format that is not supported; experts quantized in different ways;
                stored as quantized though the config excludes it.
        """
        leaves = {name.rpartition(".")[0] for name in self.index.under(module)}
        schemes = {self._leaf_scheme(leaf): leaf for leaf in sorted(leaves)}
        if len(schemes) > 1:
            mixed = ", ".join(f"{leaf}: {scheme}" for scheme, leaf in schemes.items())
            raise CheckpointError(
                f"{self.directory}: {module} is quantized in different ways ({mixed})"
            )
        return next(iter(schemes), None)

    def _leaf_scheme(self, module: str) -> Scheme | None:
        own = [name for name in self.index.under(module) if name.rpartition(".")[0] == module]
        if all(self.index.info(name).dtype in FLOAT_DTYPES for name in own):
            return None
        stored = self._stored_quantized(module)
        scheme = self.producer.scheme(module)
        if stored and scheme is None:
            raise CheckpointError(
                f"{self.directory}: {module} is stored in 4 bits, but the quantization config "
                "excludes it; correct the config"
            )
        return scheme if stored else None

    def _stored_quantized(self, module: str) -> bool:
        """By its codes or, so that reading says what is wrong with the codes, its block scales."""
        packed = (f"{module}.{self.producer.packed_name}", f"{module}.gate_up_proj")
        dtypes_of = {
            **dict.fromkeys((*packed, f"{module}.gate_up_proj_blocks"), (torch.uint8,)),
            f"{module}.weight_scale": (torch.float8_e4m3fn, torch.uint8),
        }
        return any(
            name in self.index and self.index.info(name).dtype in dtypes
            for name, dtypes in dtypes_of.items()
        )

    def load_linear(self, prefix: str, device: torch.device | str | None = None) -> LinearTensors:
        """The tensors of one quantized linear layer.

        Raises:
            CheckpointError: the layer is not quantized, or names the tensor that is missing or
                wrong.
        """
        if self.scheme(prefix) is None:
            raise CheckpointError(f"{self.directory}: {prefix} is not quantized")
        for name in self.index.under(prefix):
            if name.removeprefix(f"{prefix}.") not in self.producer.tensor_names:
                raise CheckpointError(
                    f"{self.index.where(name)} is not known here and could change the meaning of "
                    "the others; export with plain NVFP4 instead"
                )
        linear = self.producer.read_linear(self.index, prefix)
        return linear if device is None else linear.to(device)

    def expert_prefixes(self) -> Sequence[str]:
        """Where there are experts, quantized or not, in the order of the layers."""
        return find_prefixes(self.index.names())

    def experts(self, prefix: str, *, interleaved: bool | None = None) -> Experts:
        """The experts of one layer, to be read one by one; see ``load_experts``."""
        return self._find_experts(self.index, prefix, interleaved)

    def _find_experts(self, index: TensorIndex, prefix: str, interleaved: bool | None) -> Experts:
        if interleaved is None:
            interleaved = INTERLEAVED.get(str(self.config.get("model_type")))
        return find_experts(index, self.producer, prefix, interleaved=interleaved)

    def check_experts(
        self,
        prefix: str,
        *,
        activation_scale: ActivationScale | None = None,
        interleaved: bool | None = None,
    ) -> None:
        """Find whatever ``load_experts`` would refuse in the experts of one layer, and load none.

        Reads every header and every scale; codes stay on the disk, but for MXFP4's.

        Args:
            prefix, activation_scale, interleaved: as ``load_experts``'s.

        Raises:
            CheckpointError: names the file and the tensor that is missing or wrong.
        """
        experts = self._experts_to_load(self.index, prefix, activation_scale, interleaved)
        for expert in range(experts.num_experts):
            experts.read(expert)

    def _experts_to_load(
        self,
        index: TensorIndex,
        prefix: str,
        activation_scale: ActivationScale | None,
        interleaved: bool | None,
    ) -> Experts:
        experts = self._find_experts(index, prefix, interleaved)
        if self.scheme(prefix) is None:
            raise CheckpointError(f"{self.directory}: {prefix} is not quantized")
        if activation_scale == "static" and not experts.has_input_scale:
            raise CheckpointError(
                f'{self.directory}: {prefix} has no input_scale, which "static" needs; use '
                '"per_token", or calibrate'
            )
        return experts

    @cached_property
    def _index_without_input_scale(self) -> TensorIndex:
        return self.index.without(INPUT_SCALE_SUFFIXES)

    def load_experts(
        self,
        prefix: str,
        module_cls: type[Module] = NVFP4MoE,  # type: ignore[assignment]
        *,
        device: torch.device | str | None = None,
        activation_scale: ActivationScale | None = None,
        interleaved: bool | None = None,
        ignore_input_scale: bool = False,
        **options: Any,
    ) -> Module:
        """Load the experts of one layer, expert by expert, straight to their device and layout.

        Args:
            prefix: name of the experts, such as ``model.layers.0.mlp.experts``.
            module_cls: the class to make, NVFP4MoE or a subclass.
            device: where the module is to live.
            activation_scale: as NVFP4MoE's. "static" needs input scales in the checkpoint.
            interleaved: of a stacked gate_up_proj: whether its rows alternate between gate and
                up. None: as models of this config.json's type have them.
            ignore_input_scale: leave the stored input scales out, for want of good ones.
            options: ``activation``, ``activation_limit``, ``router`` and ``dtype`` of NVFP4MoE.

        Raises:
            CheckpointError: names the file and the tensor that is missing or wrong.
            ValueError: an option that the checkpoint decides.
        """
        refused = options.keys() & {"gated", "bias"}
        if refused:
            raise ValueError(f"{', '.join(sorted(refused))}: the checkpoint decides on it")
        index = self._index_without_input_scale if ignore_input_scale else self.index
        experts = self._experts_to_load(index, prefix, activation_scale, interleaved)
        if experts.bias_dtype is not None:
            options = {"dtype": experts.bias_dtype} | options
        # On meta: a canonical and a prepacked copy at once would be twice the memory.
        moe = module_cls(
            experts.hidden_size,
            experts.intermediate_size,
            experts.num_experts,
            gated=experts.gated,
            bias=experts.bias_dtype is not None,
            device="meta",
            **options,
        )
        fill(moe, experts, device)
        moe.activation_scale = activation_scale
        return moe
