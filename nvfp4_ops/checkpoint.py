"""Read and write NVFP4 experts in ModelOpt's checkpoint layout.

Per expert and projection: ``weight`` (N, K/2) uint8, ``weight_scale`` (N, K/16) e4m3,
``weight_scale_2`` () fp32 and, for static activations, ``input_scale`` () fp32. A stored scale is
never recomputed. Only safetensors files are read.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nvfp4_ops import format as nvfp4
from nvfp4_ops.moe import ActivationScale, NVFP4MoE
from nvfp4_ops.weight import NVFP4Weight

SAFETENSORS_FILE = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
SUPPORTED_ALGORITHMS = ("NVFP4", "W4A16_NVFP4")

# Gate, up, down as Qwen, DeepSeek and most others name them, then as Mixtral does.
PROJECTION_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


Experts = TypeVar("Experts", bound=NVFP4MoE)


class CheckpointError(ValueError):
    """A checkpoint that can not be loaded as it is; says which file and tensor, and why."""


class Checkpoint:
    """A directory of safetensors files with ModelOpt's quantization config.

    Files are mapped when first needed and a tensor is read when asked for.

    Raises:
        CheckpointError: a file is missing or unreadable, or the algorithm is not NVFP4.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: no such directory")
        self._open: dict[str, Any] = {}
        self.quantization = self._read_quantization()
        self._file_of = self._read_index()

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.directory / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: can not be read: {error}") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{path}: must hold a JSON object")
        return content

    def _read_quantization(self) -> dict[str, Any]:
        """Older checkpoints have only hf_quant_config.json, newer ones both."""
        if (self.directory / "hf_quant_config.json").exists():
            config = self._read_json("hf_quant_config.json").get("quantization")
        elif (self.directory / "config.json").exists():
            config = self._read_json("config.json").get("quantization_config")
        else:
            raise CheckpointError(f"{self.directory}: has no hf_quant_config.json or config.json")
        if not isinstance(config, dict):
            raise CheckpointError(f"{self.directory}: has no quantization config: not NVFP4")
        algorithm = config.get("quant_algo")
        if algorithm not in SUPPORTED_ALGORITHMS:
            raise CheckpointError(
                f"{self.directory}: quant_algo must be one of {SUPPORTED_ALGORITHMS}, "
                f"got {algorithm!r} (quant_method {config.get('quant_method')!r})"
            )
        return config

    def _read_index(self) -> dict[str, str]:
        if (self.directory / SAFETENSORS_INDEX).exists():
            weight_map = self._read_json(SAFETENSORS_INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                isinstance(file, str) for file in weight_map.values()
            ):
                raise CheckpointError(f"{self.directory / SAFETENSORS_INDEX}: has no weight_map")
            return weight_map
        path = self.directory / SAFETENSORS_FILE
        if not path.exists():
            raise CheckpointError(
                f"{self.directory}: has neither {SAFETENSORS_FILE} nor {SAFETENSORS_INDEX}"
            )
        return dict.fromkeys(self._file(SAFETENSORS_FILE).keys(), SAFETENSORS_FILE)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self.directory / name
            try:
                self._open[name] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: can not be read: {error}") from error
        return self._open[name]

    def names(self) -> Sequence[str]:
        return list(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def tensor(self, name: str) -> Tensor:
        """The stored tensor, on the CPU."""
        if name not in self._file_of:
            raise CheckpointError(f"{self.directory}: tensor {name} is missing")
        file = self._file_of[name]
        try:
            return self._file(file).get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.directory / file}: tensor {name} can not be read: {error}"
            ) from error

    def checked(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The stored tensor, after checking its dtype and shape."""
        tensor = self.tensor(name)
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self.directory / self._file_of[name]}: {name} must be {dtype} {shape}, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
        return tensor

    def global_scale(self, name: str) -> Tensor:
        """A stored fp32 scalar; one-element vectors are taken too."""
        stored = self.tensor(name)
        scale = stored.reshape(()) if stored.numel() == 1 else stored
        if scale.dtype != torch.float32 or scale.ndim or not scale.isfinite() or scale <= 0:
            raise CheckpointError(
                f"{self.directory / self._file_of[name]}: {name} must be one positive, finite "
                f"float32, got {stored.dtype} {stored.tolist()}; the checkpoint is broken here"
            )
        return scale


def _expert_layout(
    checkpoint: Checkpoint, prefix: str
) -> tuple[int, Sequence[str], tuple[int, int]]:
    """Number of experts, projection names, and (F, D)."""
    for names in PROJECTION_NAMES:
        if f"{prefix}.0.{names[0]}.weight" in checkpoint:
            break
    else:
        raise CheckpointError(
            f"{checkpoint.directory}: has no experts under {prefix}: looked for "
            + " and ".join(f"{prefix}.0.{names[0]}.weight" for names in PROJECTION_NAMES)
        )
    numbers = {
        int(rest.split(".", 1)[0])
        for name in checkpoint.names()
        if name.startswith(f"{prefix}.")
        and (rest := name.removeprefix(f"{prefix}."))[: rest.find(".")].isdigit()
    }
    missing = sorted(set(range(max(numbers) + 1)) - numbers)
    if missing:
        raise CheckpointError(f"{checkpoint.directory}: {prefix} has no experts {missing}")
    first = checkpoint.tensor(f"{prefix}.0.{names[0]}.weight")
    if first.dtype != torch.uint8 or first.ndim != 2:
        raise CheckpointError(
            f"{checkpoint.directory}: {prefix}.0.{names[0]}.weight must be packed NVFP4, uint8 "
            f"(F, D/2), got {first.dtype} {tuple(first.shape)}"
        )
    return len(numbers), names, (first.shape[0], first.shape[1] * nvfp4.CODES_PER_BYTE)


def load_experts(
    source: Checkpoint | str | Path,
    prefix: str,
    *,
    activation_scale: ActivationScale | None = None,
    device: torch.device | str | None = None,
    module: type[Experts] = NVFP4MoE,  # type: ignore[assignment]
    **options: Any,
) -> Experts:
    """Load the experts of one layer, expert by expert.

    Args:
        source: directory of a ModelOpt checkpoint, or an open Checkpoint.
        prefix: name of the experts, such as ``model.layers.0.mlp.experts`` (or, for Mixtral,
            ``model.layers.0.block_sparse_moe.experts``).
        activation_scale: as NVFP4MoE's. "static" needs input scales in the checkpoint.
        device: where the module is to live.
        module: the class to make, NVFP4MoE or a subclass.
        options: ``activation``, ``activation_limit`` and ``router`` of NVFP4MoE; the experts are
            gated and have no biases.

    Raises:
        CheckpointError: names the file and the tensor that is missing or wrong.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
    refused = options.keys() & {"gated", "bias"}
    if refused:
        raise ValueError(f"{', '.join(sorted(refused))}: this layout is gated and has no biases")
    num_experts, names, (intermediate, hidden) = _expert_layout(checkpoint, prefix)
    moe = module(hidden, intermediate, num_experts, device=device, **options)
    has_input_scale = f"{prefix}.0.{names[0]}.input_scale" in checkpoint
    if activation_scale == "static" and not has_input_scale:
        raise CheckpointError(
            f'{checkpoint.directory}: {prefix} has no input_scale, which "static" needs; use '
            '"per_token", or calibrate'
        )
    shapes = (intermediate, hidden), (intermediate, hidden), (hidden, intermediate)
    gate_up_input_scale, down_input_scale = torch.empty(num_experts, 2), torch.empty(num_experts, 1)
    targets = (
        (moe.first_proj, 0, gate_up_input_scale),
        (moe.first_proj, 1, gate_up_input_scale),
        (moe.down_proj, 0, down_input_scale),
    )
    for expert in range(num_experts):
        for name, shape, target in zip(names, shapes, targets, strict=True):
            projection, segment, input_scale = target
            key = f"{prefix}.{expert}.{name}"
            projection.copy_segment(expert, segment, _read_weight(checkpoint, key, *shape))
            if has_input_scale:
                input_scale[expert, segment] = checkpoint.global_scale(f"{key}.input_scale")
    if has_input_scale:
        moe.first_proj.set_input_scale(gate_up_input_scale)
        moe.down_proj.set_input_scale(down_input_scale.squeeze(1))
    moe.activation_scale = activation_scale
    for projection in moe.projections().values():
        projection.prepack()
    return moe


def _read_weight(checkpoint: Checkpoint, key: str, rows: int, columns: int) -> NVFP4Weight:
    """One expert's projection, checked."""
    codes = checkpoint.checked(f"{key}.weight", torch.uint8, (rows, nvfp4.packed_size(columns)))
    block_scale = checkpoint.checked(
        f"{key}.weight_scale", torch.float8_e4m3fn, (rows, nvfp4.num_blocks(columns))
    )
    if bool(block_scale.float().isnan().any()):
        raise CheckpointError(f"{checkpoint.directory}: {key}.weight_scale holds NaN")
    return NVFP4Weight(codes, block_scale, checkpoint.global_scale(f"{key}.weight_scale_2"))


def expert_tensors(moe: NVFP4MoE, prefix: str) -> dict[str, Tensor]:
    """The experts of a gated module as ModelOpt names and stores them; inverse of load_experts.

    Args:
        moe: gated, without biases.
        prefix: such as ``model.layers.0.mlp.experts``.

    Returns:
        {tensor name: tensor on the CPU}, the projections named gate_proj, up_proj and down_proj.
    """
    if not moe.gated or moe.down_proj.bias is not None:
        raise ValueError("moe: only gated experts without biases have this layout")
    tensors: dict[str, Tensor] = {}
    targets = ((moe.first_proj, 0), (moe.first_proj, 1), (moe.down_proj, 0))
    for name, (projection, segment) in zip(PROJECTION_NAMES[0], targets, strict=True):
        codes, block_scale = projection.canonical()
        rows = projection.segment_rows(segment)
        for expert in range(moe.num_experts):
            scale_2 = projection.segment(projection.weight_scale_2)
            parts = {
                "weight": codes[expert, rows],
                "weight_scale": block_scale[expert, rows],
                "weight_scale_2": scale_2[expert, segment],
            }
            if projection.input_scale is not None:
                parts["input_scale"] = projection.segment(projection.input_scale)[expert, segment]
            key = f"{prefix}.{expert}.{name}"
            # Clones: safetensors refuses tensors that share storage.
            tensors.update({f"{key}.{k}": v.detach().cpu().clone() for k, v in parts.items()})
    return tensors


def quantization_config(exclude_modules: Sequence[str], *, static: bool) -> dict[str, Any]:
    """ModelOpt's ``quantization`` entry of hf_quant_config.json.

    exclude_modules: names of the modules left unquantized, wildcards allowed.
    static: whether input scales are stored.
    """
    return {
        "quant_algo": "NVFP4" if static else "W4A16_NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": nvfp4.BLOCK_SIZE,
        "exclude_modules": list(exclude_modules),
    }
