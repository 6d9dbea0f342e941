"""NVFP4Quantizer: how ``from_pretrained`` of transformers loads an NVFP4 checkpoint.

Transformers builds the model on the meta device and loads whatever is not NVFP4: it renames,
casts, ties and initialises as for any model. Before, the quantizer takes the NVFP4 modules out, so
that their tensors are not read; afterwards it streams those in as NVFP4MoE and NVFP4Linear.
"""

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from nvfp4_ops import format as nvfp4
from nvfp4_ops.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from nvfp4_ops.huggingface.families import ExpertsSpec
from nvfp4_ops.huggingface.names import ModelNames
from nvfp4_ops.huggingface.replace import find_experts, install, load_spec
from nvfp4_ops.linear import NVFP4Linear
from nvfp4_ops.operand import ActivationScale, check_activation_scale

METHOD = "nvfp4_ops"
"""quant_method that stands for any checkpoint ``open_checkpoint`` reads."""

MODELOPT_METHOD = "modelopt"
"""quant_method that ModelOpt writes and transformers does not know."""


class NVFP4Config(QuantizationConfigMixin):
    """Quantization config of a model with NVFP4 modules.

    Args:
        activation_scale: as NVFP4MoE's, of every NVFP4 module.
        device: where ``load_pretrained`` puts the model; None: where transformers does.
        producer: what the checkpoint's own config says.
    """

    def __init__(
        self,
        activation_scale: ActivationScale | None = None,
        device: torch.device | str | None = None,
        **producer: Any,
    ) -> None:
        self.quant_method = producer.pop("quant_method", METHOD)
        self.activation_scale = check_activation_scale(activation_scale)
        self.device = device
        self.producer = producer

    def to_dict(self) -> dict[str, Any]:
        """What config.json would hold: the producer's entry again."""
        return {"quant_method": self.quant_method, **self.producer}


@dataclass
class _Plan:
    """What is left to load: NVFP4 modules by the model's names, and their checkpoint names.

    sizes: (N, K) of the linears. floats: shape and dtype of what transformers is to load.
    """

    checkpoint: Checkpoint
    dtype: torch.dtype
    specs: dict[str, ExpertsSpec] = field(default_factory=dict)
    experts: dict[str, str] = field(default_factory=dict)
    linears: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    floats: dict[str, tuple[torch.Size, torch.dtype]] = field(default_factory=dict)


class _Pending(nn.Module):
    """Holds the place of an NVFP4 module: without tensors, so that none are read for it."""

    def forward(self, *_: Tensor) -> Tensor:
        raise RuntimeError("the weights of this NVFP4 module have not been loaded")


class NVFP4Quantizer(HfQuantizer):
    """Loads NVFP4 checkpoints: ModelOpt's in ``from_pretrained``, any in ``load_pretrained``.

    Attention and shared experts become NVFP4Linear where they are NVFP4. Scales of an FP8 KV cache
    are not used: the cache has the model's dtype.
    """

    requires_calibration = True
    quantization_config: NVFP4Config

    def __init__(self, quantization_config: NVFP4Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._plan: _Plan | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse several devices before anything is loaded; called again when a map is inferred.

        Raises:
            ValueError: names the devices of the map.
        """
        if isinstance(device_map, dict) and len(set(device_map.values())) > 1:
            _refuse_devices(device_map.values())

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        if not checkpoint_files:
            raise ValueError("NVFP4 weights are loaded from safetensors files, not a state dict")
        checkpoint = open_checkpoint(Path(checkpoint_files[0]).parent)
        plan = _make_plan(model, checkpoint, dtype or torch.get_default_dtype())
        ignored = {_any_layer(model, name) for name in (*plan.experts, *plan.linears)}
        ignored.add(r"\.[kv]_scale$")
        model._keys_to_ignore_on_load_unexpected = ignored.union(
            model._keys_to_ignore_on_load_unexpected or ()
        )
        for name in (*plan.experts, *plan.linears):
            model.set_submodule(name, _Pending())
        plan.floats = _float_tensors(model, plan.dtype)
        self._plan = plan

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        plan, self._plan = self._plan, None
        assert plan is not None
        _settle_floats(model, plan)
        config = self.quantization_config
        if config.device is not None:
            nn.Module.to(model, config.device)
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) != 1:
            _refuse_devices(devices)
        _load_modules(model, plan, devices.pop(), config.activation_scale)
        model.requires_grad_(False)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _refuse_devices(devices: Iterable[Any]) -> NoReturn:
    some = ", ".join(sorted({str(device) for device in devices}))
    raise ValueError(
        f"device_map: a model with NVFP4 modules must be on one device, got {some}; pass "
        'device="cuda:0" to load_pretrained, or device_map="cuda:0" to from_pretrained'
    )


def _make_plan(model: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype) -> _Plan:
    plan = _Plan(checkpoint, dtype)
    names, tensors = ModelNames(model), checkpoint.names()
    for name, prefix in names.experts(tensors).items():
        if checkpoint.scheme(prefix) is not None:
            plan.experts[name] = prefix
    if plan.experts:
        specs = find_experts(model)
        plan.specs = {name: specs[name] for name in plan.experts}
    for name, prefix in names.linears(tensors).items():
        if checkpoint.scheme(prefix) is None:
            raise CheckpointError(
                f"{checkpoint.directory}: {prefix} has scales but is not quantized in a way that "
                "is supported"
            )
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if type(linear).forward is not nn.Linear.forward:
            raise CheckpointError(
                f"{checkpoint.directory}: {prefix} is quantized, but the model's {name} is a "
                f"{type(linear).__name__}, which does more than multiply: not supported"
            )
        if linear.out_features % nvfp4.BLOCK_SIZE:
            raise CheckpointError(
                f"{checkpoint.directory}: {prefix} has {linear.out_features} rows; NVFP4 layers "
                f"with other than multiples of {nvfp4.BLOCK_SIZE} are not supported: export it "
                "unquantized"
            )
        plan.linears[name] = prefix
        plan.sizes[name] = (linear.out_features, linear.in_features)
    _refuse_other_formats(plan, names)
    return plan


def _refuse_other_formats(plan: _Plan, names: ModelNames) -> None:
    """Transformers would cast such weights as if they were values."""
    loaded = tuple(f"{prefix}." for prefix in (*plan.experts.values(), *plan.linears.values()))
    for name in plan.checkpoint.names():
        dtype = plan.checkpoint.info(name).dtype
        packed = isinstance(dtype, str) or (dtype.itemsize == 1 and dtype != torch.bool)
        if packed and not name.startswith(loaded) and not names.is_dropped(name):
            raise CheckpointError(
                f"{plan.checkpoint.directory}: {name} is {dtype}, but belongs to no NVFP4 layer "
                "of the model: mixed formats are not supported"
            )


def _float_tensors(
    model: PreTrainedModel, dtype: torch.dtype
) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype that each tensor of the state dict is to have."""
    fp32 = model._get_dtype_plan(dtype)
    pattern = build_glob_alternation(list(fp32))[0] if fp32 else None
    return {
        name: (
            tensor.shape,
            torch.float32 if pattern is not None and pattern.search(name) else tensor.dtype,
        )
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }


def _settle_floats(model: PreTrainedModel, plan: _Plan) -> None:
    """Check shapes and cast: transformers up to 5.17 does neither for a quantized checkpoint.

    It takes any shape, and leaves tensors that it has renamed in the checkpoint's dtype.
    """
    tensors = model.state_dict(keep_vars=True)
    for name, (shape, dtype) in plan.floats.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{plan.checkpoint.directory}: {name} must be {tuple(shape)}, "
                f"got {tuple(tensor.shape)}"
            )
        if tensor.dtype != dtype:
            tensor.data = tensor.data.to(dtype)


def _any_layer(model: PreTrainedModel, name: str) -> str:
    """Pattern of the tensors of module ``name`` in all layers, with or without the base model."""
    bare = name.removeprefix(f"{model.base_model_prefix}.")
    return re.sub(r"\d+", r"\\d+", re.escape(f"{bare}."))


@torch.no_grad()
def _load_modules(
    model: PreTrainedModel,
    plan: _Plan,
    device: torch.device,
    activation_scale: ActivationScale | None,
) -> None:
    for name, prefix in tqdm(plan.experts.items(), **_progress("experts", plan.experts)):
        spec = plan.specs[name]
        moe = load_spec(plan.checkpoint, prefix, spec, device, activation_scale, plan.dtype)
        install(model, name, moe)
    for name, prefix in tqdm(plan.linears.items(), **_progress("linear layers", plan.linears)):
        tensors = plan.checkpoint.load_linear(prefix, device)
        if activation_scale == "static" and tensors.input_scale is None:
            raise CheckpointError(
                f'{plan.checkpoint.directory}: {prefix} has no input scale, which "static" needs; '
                'use "per_token", or calibrate'
            )
        linear = NVFP4Linear.from_weight(
            tensors.weight,
            input_scale=tensors.input_scale,
            bias=tensors.bias,
            activation_scale=activation_scale,
            dtype=plan.dtype,
        )
        stored = (linear.out_features, linear.in_features)
        if stored != plan.sizes[name]:
            raise CheckpointError(
                f"{plan.checkpoint.directory}: {prefix} is (N, K) = {stored}, the model's {name} "
                f"{plan.sizes[name]}"
            )
        model.set_submodule(name, linear.eval())


def _progress(what: str, modules: dict[str, str]) -> dict[str, Any]:
    return {"desc": f"NVFP4 {what}", "unit": "layer", "disable": not modules}


def register() -> None:
    """Make ``from_pretrained`` of transformers load ModelOpt checkpoints."""
    for method in (METHOD, MODELOPT_METHOD):
        if method in AUTO_QUANTIZER_MAPPING:
            warnings.warn(
                f"transformers has a quantizer {method!r} already, which from_pretrained goes on "
                "to use; nvfp4_ops.load_pretrained is not affected",
                stacklevel=2,
            )
            continue
        register_quantization_config(method)(NVFP4Config)
        register_quantizer(method)(NVFP4Quantizer)
