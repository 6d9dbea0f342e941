"""replace_experts: the experts of a float model become NVFP4MoE modules, in place."""

from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from nvfp4_ops.checkpoint import Checkpoint, open_checkpoint
from nvfp4_ops.huggingface.families import ExpertsSpec, experts_modules, experts_spec
from nvfp4_ops.huggingface.names import experts_names
from nvfp4_ops.linear import NVFP4Linear
from nvfp4_ops.moe import ActivationScale, NVFP4MoE
from nvfp4_ops.weight import quantize_weight


def find_experts(model: nn.Module) -> dict[str, ExpertsSpec]:
    """The experts modules of a model by name, read before anything is changed.

    Raises:
        ValueError: one is of a kind that NVFP4MoE does not have (see ``experts_spec``).
    """
    return {name: experts_spec(name, module) for name, module in experts_modules(model).items()}


def replace_experts(
    model: nn.Module,
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
        model: any model of transformers >= 5 whose experts follow its experts interface, or Llama 4.
        checkpoint: directory of an NVFP4 checkpoint, or an open one, to take the experts from; its
            names may be those of the hub. The model's experts may then be on the meta device.
        activation_scale: as NVFP4MoE's; "static" needs a checkpoint with input scales.
        device: where the NVFP4 experts are to live; None: where the float ones are.

    Returns:
        Names of the NVFP4MoE modules.

    Raises:
        ValueError: the model has no experts, or some of a kind, size or flag that is not
            supported; the message names module and flag, and the model is left as it was.
        CheckpointError: the checkpoint lacks or breaks some of the experts.
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
            if model.get_submodule(name).down_proj.is_meta:
                raise ValueError(f"{name}: has no weights (meta device); give a checkpoint")
    else:
        checkpoint = open_checkpoint(checkpoint)
        prefixes = experts_names(model, checkpoint.names())
        lacking = sorted(specs.keys() - prefixes.keys())
        if lacking:
            raise ValueError(f"checkpoint: has no tensors for {', '.join(lacking)}")
    for name, spec in tqdm(specs.items(), desc="NVFP4 experts", unit="layer"):
        module = model.get_submodule(name)
        target = device if device is not None else module.down_proj.device
        if checkpoint is None:
            moe = quantize_experts(spec, module, target)
            moe.activation_scale = activation_scale
        else:
            dtype = module.down_proj.dtype
            moe = load_spec(checkpoint, prefixes[name], spec, target, activation_scale, dtype)
        install(model, name, moe)
    return list(specs)


@torch.no_grad()
def quantize_experts(
    spec: ExpertsSpec, module: nn.Module, device: torch.device | str
) -> NVFP4MoE:
    """Quantize a float experts module expert by expert."""
    biases = [b for name, b in module.named_parameters() if name.endswith("_bias")]
    dtype = biases[0].dtype if biases else torch.bfloat16
    moe = spec.build(device=device, dtype=dtype)
    for projection, name in ((moe.first_proj, spec.first_name), (moe.down_proj, "down_proj")):
        is_first = projection is moe.first_proj
        for expert in range(spec.num_experts):
            rows = spec.rows(module.get_parameter(name), expert).to(device)
            for segment, part in enumerate(spec.segments(rows) if is_first else (rows,)):
                projection.copy_segment(expert, segment, quantize_weight(part.contiguous()))
        if spec.bias:
            assert projection.bias is not None
            for target, source in zip(
                projection.bias, module.get_parameter(f"{name}_bias"), strict=True
            ):
                parts = spec.segments(source) if is_first else (source,)
                target.copy_(torch.cat(parts))
        projection.prepack()
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
    moe = checkpoint.load_experts(
        prefix,
        device=device,
        activation_scale=activation_scale,
        interleaved=spec.interleaved,
        **options,
    )
    for what in ("num_experts", "hidden_size", "intermediate_size", "gated"):
        stored, wanted = getattr(moe, what), getattr(spec, what)
        if stored != wanted:
            raise ValueError(f"{prefix}: {what} is {stored} in the checkpoint, {wanted} in the model")
    if (moe.down_proj.bias is not None) != spec.bias:
        raise ValueError(f"{prefix}: bias must be {'present' if spec.bias else 'absent'}")
    return moe


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
        ValueError: an unknown mode, or "static" where a module has no input scales; the modules
            before that one have been set.
    """
    for module in model.modules():
        if isinstance(module, NVFP4MoE | NVFP4Linear):
            module.activation_scale = mode
