"""quantize_checkpoint: a float model on disk to ModelOpt's NVFP4 layout, shard by shard.

What goes where is planned from the headers alone. Every shard is written under another name and
renamed when it is whole, in a directory beside the destination that is renamed at the very end: an
interrupted run goes on where it stopped, and a destination that exists is complete.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from nvfp4_ops import format as nvfp4
from nvfp4_ops.checkpoint.config import HF_CONFIG, MODELOPT_CONFIG, read_model_config
from nvfp4_ops.checkpoint.experts import INTERLEAVED, STACKED_NAMES
from nvfp4_ops.checkpoint.index import (
    FLOAT_DTYPES,
    SAFETENSORS_FILE,
    SAFETENSORS_INDEX,
    CheckpointError,
    TensorIndex,
    TensorInfo,
    open_file,
    read_json,
)
from nvfp4_ops.checkpoint.progress import track
from nvfp4_ops.checkpoint.scheme import ModuleNames
from nvfp4_ops.checkpoint.write import hf_quantization_config, quantization_config
from nvfp4_ops.reference import global_scale_of_amax
from nvfp4_ops.weight import quantize_weight

EXPERTS_ONLY = ("*.experts.*",)
MAX_SHARD_BYTES = 4 << 30

# Layers that other engines run as one and give one global scale, as ModelOpt's export does.
FUSED = (("gate_proj", "up_proj"), ("w1", "w3"), ("q_proj", "k_proj", "v_proj"))

# Rows whose temporaries stay in a CPU's cache take half the time of a whole matrix.
_CHUNK_ELEMENTS = 1 << 18

_PLAN_FILE = "quantize_plan.json"
_TEMPORARY = ".tmp"
_WEIGHT_FILES = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx)$|.*\.index\.json$")


def quantize_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    include: Sequence[str] = EXPERTS_ONLY,
    input_amax: Mapping[str, float] | None = None,
    device: torch.device | str = "cpu",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Write an NVFP4 copy of a float checkpoint, in the bytes ModelOpt's export would have.

    Needs the memory of one shard of the result. After an interruption, call it again.

    Args:
        source: directory of a Hugging Face checkpoint with bf16, fp16 or fp32 weights.
        destination: must not exist yet.
        include: wildcards of the linear modules to quantize, by their names in the checkpoint.
        input_amax: {module: largest magnitude of its input} of every quantized module, for static
            input scales; see ``calibrate``. None: weight-only.
        device: where to quantize. The bytes are the same everywhere.
        max_shard_bytes: size of a shard, if no single tensor is larger.
        progress: show a bar (needs tqdm).

    Raises:
        CheckpointError: a tensor can not be quantized; nothing is there but what the next call
            goes on with.
        ValueError: destination exists, nothing is included, or input_amax lacks a module.
    """
    index, destination = TensorIndex(source), Path(destination)
    if "quantization_config" in read_model_config(index.directory):
        raise CheckpointError(f"{index.directory / HF_CONFIG}: is quantized already")
    if destination.exists():
        raise ValueError(f"destination: {destination} exists already")
    plan = _plan(index, include, max_shard_bytes)
    if input_amax is not None:
        _check_amax(plan, input_amax)
    partial = destination.with_name(f"{destination.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    _begin(partial, plan.fingerprint(index, input_amax))
    written: dict[str, TensorInfo] = {}
    files = _shard_files(len(plan.shards))
    items = track(plan.shards, progress, "quantize")
    for file, names in zip(files, items, strict=True):
        if not (partial / file).exists():
            tensors: dict[str, Tensor] = {}
            for name in names:
                tensors |= _convert(index, plan, name, input_amax, device)
            _save(tensors, partial / file)
        written |= open_file(partial / file)[1]
    if len(files) > 1:
        size = sum(info.num_bytes for info in written.values())
        weight_map = {name: info.file for name, info in sorted(written.items())}
        content = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(partial / SAFETENSORS_INDEX, content)
    _write_configs(Path(source), partial, plan.excluded(index), static=input_amax is not None)
    partial.rename(destination)
    (destination / _PLAN_FILE).unlink()


@dataclass(frozen=True)
class _Plan:
    """linear, stacked: names of tensors to quantize. shards: source names for each file."""

    linear: frozenset[str]
    stacked: frozenset[str]
    shards: tuple[tuple[str, ...], ...]

    def modules(self) -> Sequence[str]:
        return sorted({_module(name) for name in self.linear} | self.stacked)

    def excluded(self, index: TensorIndex) -> Sequence[str]:
        """Modules with a matrix that stays as it is."""
        matrices = (n for n in index.names() if n.endswith(".weight") and n not in self.linear)
        return [_module(name) for name in matrices if len(index.info(name).shape) == 2]

    def fingerprint(self, index: TensorIndex, input_amax: Mapping[str, float] | None) -> str:
        """Of all that decides on the content of the shards."""
        infos = [(name, str(index.info(name))) for name in index.names()]
        files = {index.info(name).file for name in index.names()}
        stats = [(file, (index.directory / file).stat()) for file in sorted(files)]
        times = [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]
        amax = None if input_amax is None else sorted((k, float(v)) for k, v in input_amax.items())
        content = infos, times, self.modules(), self.shards, amax
        return sha256(repr(content).encode()).hexdigest()


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _plan(index: TensorIndex, include: Sequence[str], max_shard_bytes: int) -> _Plan:
    included = ModuleNames.from_wildcards(include)
    linear, stacked = set(), set()
    for name in index.names():
        rank = len(index.info(name).shape)
        if name.endswith(".weight") and rank == 2 and _module(name) in included:
            _check_source(index, name, -1)
            linear.add(name)
        elif name.endswith(STACKED_NAMES) and rank == 3 and name in included:
            _check_stacked(index, name)
            stacked.add(name)
    if not linear and not stacked:
        raise ValueError(f"include: {list(include)} match no linear module of {index.directory}")
    shards: list[list[str]] = [[]]
    size = 0
    for name in index.names():
        num_bytes = _result_bytes(index, name, quantized=name in linear or name in stacked)
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    return _Plan(frozenset(linear), frozenset(stacked), tuple(map(tuple, shards)))


def _check_source(index: TensorIndex, name: str, k_dimension: int) -> None:
    info = index.info(name)
    if info.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{index.where(name)} must be bf16, fp16 or fp32 to be quantized, got {info.dtype}; "
            "convert the checkpoint first, or leave the module out of include"
        )
    if info.shape[k_dimension] % nvfp4.BLOCK_SIZE:
        raise CheckpointError(
            f"{index.where(name)}: K must be a multiple of {nvfp4.BLOCK_SIZE}, got "
            f"{info.shape[k_dimension]}; leave the module out of include"
        )


def _check_stacked(index: TensorIndex, name: str) -> None:
    model_type = read_model_config(index.directory).get("model_type")
    if model_type not in INTERLEAVED:
        raise CheckpointError(
            f"{index.where(name)} is stacked; of model_type {model_type!r} it is not known how. "
            f"Known: {', '.join(INTERLEAVED)}"
        )
    _check_source(index, name, -2)


def _result_bytes(index: TensorIndex, name: str, *, quantized: bool) -> int:
    info = index.info(name)
    if not quantized:
        return info.num_bytes
    num_elements = torch.Size(info.shape).numel()
    return num_elements // nvfp4.CODES_PER_BYTE + num_elements // nvfp4.BLOCK_SIZE


def _convert(
    index: TensorIndex,
    plan: _Plan,
    name: str,
    input_amax: Mapping[str, float] | None,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """What the result has for one tensor of the source."""
    if name not in plan.linear and name not in plan.stacked:
        return {name: index.tensor(name)}
    w = index.tensor(name, device)
    members = _fused_with(name, plan)
    amax = torch.stack([_amax(index, n, w if n == name else None) for n in members]).amax()
    global_scale = global_scale_of_amax(amax)
    if name in plan.stacked:
        # w is (E, K, N); one expert after the other, for their fp32 temporaries.
        quantized = [_quantize_rows(expert.T, global_scale.to(device)) for expert in w]
        codes, sf_bytes = (
            torch.stack([part.T for part in parts]) for parts in zip(*quantized, strict=True)
        )
        separator, module = "_", name
    else:
        codes, sf_bytes = _quantize_rows(w, global_scale.to(device))
        separator, module = ".", _module(name)
    tensors = {name: codes}
    tensors[f"{module}{separator}weight_scale"] = sf_bytes.view(torch.float8_e4m3fn)
    tensors[f"{module}{separator}weight_scale_2"] = global_scale
    if input_amax is not None:
        amax = torch.tensor(float(input_amax[module]), dtype=torch.float32)
        tensors[f"{module}{separator}input_scale"] = global_scale_of_amax(amax)
    return {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}


def _quantize_rows(w: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and the bytes of block scales of (N, K)."""
    rows = len(w) if w.is_cuda else max(1, _CHUNK_ELEMENTS // w.shape[1])
    parts = [quantize_weight(part, global_scale) for part in w.split(rows)]
    codes = torch.cat([part.codes for part in parts])
    return codes, torch.cat([part.block_scale.view(torch.uint8) for part in parts])


def _fused_with(name: str, plan: _Plan) -> Sequence[str]:
    """The weights that share a global scale with this one, itself among them."""
    parent, _, last = _module(name).rpartition(".")
    for names in FUSED:
        if last in names:
            fused = (f"{parent}.{other}.weight" for other in names)
            return [weight for weight in fused if weight in plan.linear] or [name]
    return [name]


def _amax(index: TensorIndex, name: str, w: Tensor | None) -> Tensor:
    # Not w.abs().amax(), which would take the memory of w once more.
    low, high = (index.tensor(name) if w is None else w).aminmax()
    amax = torch.maximum(-low, high).float().cpu()
    if not amax.isfinite():
        raise CheckpointError(f"{index.where(name)} holds Inf or NaN and can not be quantized")
    return amax


def _check_amax(plan: _Plan, input_amax: Mapping[str, float]) -> None:
    for module in plan.modules():
        amax = torch.tensor(float(input_amax.get(module, torch.nan)))
        if not amax.isfinite() or amax <= 0:
            raise ValueError(
                f"input_amax: must have a positive, finite value for {module}, got "
                f"{input_amax.get(module)}"
            )


def _begin(partial: Path, fingerprint: str) -> None:
    """Make sure that what is there already belongs to this run."""
    path = partial / _PLAN_FILE
    if not path.exists():
        if any(file.suffix != _TEMPORARY for file in partial.iterdir()):
            raise ValueError(f"{partial}: is in the way; delete it")
        write_json(path, {"fingerprint": fingerprint})
    elif read_json(path).get("fingerprint") != fingerprint:
        raise ValueError(
            f"{partial}: was begun with other options or another source; delete it to start anew"
        )


def _shard_files(number: int) -> Sequence[str]:
    if number == 1:
        return [SAFETENSORS_FILE]
    return [f"model-{i + 1:05d}-of-{number:05d}.safetensors" for i in range(number)]


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    temporary = path.with_name(path.name + _TEMPORARY)
    save_file(tensors, temporary, metadata={"format": "pt"})
    # safetensors makes files for their owner alone; this one is to be read like the others.
    shutil.copymode(path.with_name(_PLAN_FILE), temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, content: object) -> None:
    """Write a file that is there whole or not at all."""
    temporary = path.with_name(path.name + _TEMPORARY)
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def _write_configs(source: Path, target: Path, excluded: Iterable[str], *, static: bool) -> None:
    """Both forms of the quantization config, and every file that holds no weights."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not _WEIGHT_FILES.match(path.name):
            shutil.copyfile(path, target / path.name)
    config = quantization_config(list(excluded), static=static)
    import nvfp4_ops

    producer = {"name": nvfp4_ops.__name__, "version": nvfp4_ops.__version__}
    write_json(target / MODELOPT_CONFIG, {"producer": producer, "quantization": config})
    model_config = read_model_config(source)
    if model_config:
        model_config["quantization_config"] = {
            **hf_quantization_config(config),
            "producer": producer,
        }
        write_json(target / HF_CONFIG, model_config)
