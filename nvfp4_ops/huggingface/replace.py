"""replace_experts: the experts of a float model become NVFP4MoE modules, in place."""

from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from nvfp4_ops.checkpoint import Checkpoint, open_checkpoint
from nvfp4_ops.checkpoint.experts import Experts
from nvfp4_ops.checkpoint.index import FLOAT_DTYPES
from nvfp4_ops.huggingface.families import ExpertsSpec, experts_modules, experts_spec
from nvfp4_ops.huggingface.names import ModelNames
from nvfp4_ops.linear import NVFP4Linear
from nvfp4_ops.moe import NVFP4MoE
from nvfp4_ops.operand import ActivationScale
from nvfp4_ops.weight import quantize_weight


def find_experts(model: nn.Module) -> dict[str, ExpertsSpec]:
    """The experts modules of a model by name, read before anything is changed.

    Raises:
        ValueError: one is of a kind that NVFP4MoE does not have (see ``experts_spec``).
    """
    return {name: experts_spec(name, module) for name, module in experts_modules(model).items()}


def replace_experts(
    model: PreTrainedModel,
    checkpoint: Checkpoint | str | Path | None = None,
    *,
    activation_scale: ActivationScale | None = None,
    device: torch.device | str | None = None,
) -> list[str]:
    """Replace every experts module of a transformers model by an NVFP4MoE, in place.

    Routers and shared experts stay as they are. Without a checkpoint the model's own weights are
    quantized (see ``quantize_weight``), one expert at a time, and each layer's float weights are
    dropped before the next: memory peaks at the float model plus one layer's NVFP4 weights.

    An activation that no fused one equals runs unfused, as the model's own function.

    Args:
        model: of transformers, with experts that follow its experts interface, or of Llama 4.
        checkpoint: directory of an NVFP4 checkpoint, or an open one, to take the experts from; its
            names may be those of the hub. The model's experts may then be on the meta device.
        activation_scale: as NVFP4MoE's; "static" needs a checkpoint with input scales.
        device: where the NVFP4 experts are to live; None: where the float ones are.

    Returns:
        Names of the NVFP4MoE modules.

    Raises:
        ValueError: the model has no experts, or some of a kind, size or flag that is not
            supported, or weights that are not finite; the message names the module.
        CheckpointError: the checkpoint lacks or breaks some of the experts.

    All of this is found before anything is replaced: the model is then as it was.
    """
    specs = find_experts(model)
    if not specs:
        raise ValueError(
            f"model: {type(model).__name__} has no experts that can be replaced: no module with "
            "stacked weights gate_up_proj or up_proj, and down_proj"
        )
    if checkpoint is None:
        if activation_scale == "static":
            raise ValueError(
                'activation_scale: "static" needs input scales; load a checkpoint that has them, '
                "or replace, run the model under nvfp4_ops.calibrate, then assign"
            )
        for name in specs:
            _check_weights(name, model.get_submodule(name))
    else:
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = open_checkpoint(checkpoint)
        prefixes = ModelNames(model).experts(checkpoint.names())
        lacking = sorted(specs.keys() - prefixes.keys())
        if lacking:
            raise ValueError(f"checkpoint: has no tensors for {', '.join(lacking)}")
        # Float experts make room for NVFP4 ones layer by layer, so that there is no way back.
        for name, spec in specs.items():
            _check_stored(checkpoint, prefixes[name], spec, activation_scale)
    for name, spec in tqdm(specs.items(), desc="NVFP4 experts", unit="layer"):
        module = model.get_submodule(name)
        down = module.get_parameter("down_proj")
        target = device if device is not None else down.device
        if checkpoint is None:
            moe = quantize_experts(spec, module, target)
            moe.activation_scale = activation_scale
        else:
            prefix = prefixes[name]
            moe = load_spec(checkpoint, prefix, spec, target, activation_scale, down.dtype)
        install(model, name, moe)
    return list(specs)


@torch.no_grad()
def quantize_experts(spec: ExpertsSpec, module: nn.Module, device: torch.device | str) -> NVFP4MoE:
    """Quantize a float experts module expert by expert, into the layout of ``device``."""
    weights = dict(module.named_parameters())
    moe = spec.build(device="meta", dtype=weights["down_proj"].dtype)
    for name, projection in moe.projections().items():
        projection.allocate(device)
        for expert in range(spec.num_experts):
            parts: tuple[Tensor, ...] = (spec.rows(weights[name], expert),)
            bias = weights[f"{name}_bias"][expert] if spec.bias else None
            if projection is moe.first_proj:
                parts = spec.segments(parts[0])
                bias = None if bias is None else torch.cat(spec.segments(bias))
            quantized = [quantize_weight(part.to(device).contiguous()) for part in parts]
            projection.copy_expert(expert, quantized, bias)
    return moe


def load_spec(
    checkpoint: Checkpoint,
    prefix: str,
    spec: ExpertsSpec,
    device: torch.device | str,
    activation_scale: ActivationScale | None,
    dtype: torch.dtype,
) -> NVFP4MoE:
    """Load one layer's experts and check that they are those of the model; dtype: of biases."""
    options = spec.options() | ({"dtype": dtype} if spec.bias else {})
    experts = checkpoint.experts(prefix, interleaved=spec.interleaved)
    _check_sizes(prefix, spec, experts)
    return checkpoint.load_experts(
        prefix,
        device=device,
        activation_scale=activation_scale,
        interleaved=spec.interleaved,
        **options,
    )


def _check_sizes(prefix: str, spec: ExpertsSpec, experts: Experts) -> None:
    """Raise ValueError unless stored experts are of the sizes of the model's."""
    for what in ("num_experts", "hidden_size", "intermediate_size", "gated"):
        stored, wanted = getattr(experts, what), getattr(spec, what)
        if stored != wanted:
            raise ValueError(
                f"{prefix}: {what} is {stored} in the checkpoint, {wanted} in the model"
            )
    if (experts.bias_dtype is not None) != spec.bias:
        raise ValueError(f"{prefix}: bias must be {'present' if spec.bias else 'absent'}")


def _check_stored(
    checkpoint: Checkpoint,
    prefix: str,
    spec: ExpertsSpec,
    activation_scale: ActivationScale | None,
) -> None:
    """Raise whatever ``load_spec`` would, reading no more than headers and scales."""
    _check_sizes(prefix, spec, checkpoint.experts(prefix, interleaved=spec.interleaved))
    checkpoint.check_experts(
        prefix, activation_scale=activation_scale, interleaved=spec.interleaved
    )


def _check_weights(name: str, module: nn.Module) -> None:
    """Raise ValueError unless float experts can be quantized."""
    for weight_name, weight in module.named_parameters():
        if weight.is_meta:
            raise ValueError(f"{name}: has no weights (meta device); give a checkpoint")
        if weight.ndim != 3:
            continue
        if weight.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{name}.{weight_name}: must be bfloat16, float16 or float32 to be quantized, got "
                f"{weight.dtype}; load the model in bfloat16"
            )
        # By extremes, as quantize_weight does: a mask of all elements might find no room.
        if not all(bool(extreme.isfinite()) for extreme in weight.detach().aminmax()):
            raise ValueError(f"{name}.{weight_name}: must be finite, has Inf or NaN")


def install(model: nn.Module, name: str, moe: NVFP4MoE) -> None:
    """Put ``moe`` in the place of the experts ``name``."""
    moe.train(model.training)
    parent_name, _, own_name = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if type(parent).__name__ == "Llama4TextMoe":
        from nvfp4_ops.huggingface import llama4

        llama4.convert(parent, moe)
    else:
        setattr(parent, own_name, moe)


def set_activation_scale(model: nn.Module, mode: ActivationScale | None) -> None:
    """Run every NVFP4MoE and NVFP4Linear of ``model`` with ``mode``.

    Raises:
        ValueError: an unknown mode, or "static" and a module has no input scales; the message
            names it, and nothing is changed.
    """
    before: list[tuple[NVFP4MoE | NVFP4Linear, ActivationScale | None]] = []
    for name, module in model.named_modules():
        if not isinstance(module, NVFP4MoE | NVFP4Linear):
            continue
        before.append((module, module.activation_scale))
        try:
            module.activation_scale = mode
        except ValueError as error:
            for changed, previous in before:
                changed.activation_scale = previous
            raise ValueError(f"{name}: {error}") from error
