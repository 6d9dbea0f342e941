"""Which tensor is in which safetensors file, with its dtype and shape; data is read when asked for.

Knows nothing of NVFP4. Only safetensors files are read, never pickles.
"""

import json
from bisect import bisect_left
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SAFETENSORS_FILE = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"

_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class CheckpointError(ValueError):
    """A checkpoint that can not be loaded as it is; says which file and tensor, and what to do."""


class TensorInfo(NamedTuple):
    """What a file's header says of a tensor. dtype is safetensors' name where torch has none."""

    file: str
    dtype: torch.dtype | str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of its data; a dtype that torch lacks counts one byte an element."""
        itemsize = self.dtype.itemsize if isinstance(self.dtype, torch.dtype) else 1
        return torch.Size(self.shape).numel() * itemsize


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; CheckpointError names the file where it can not be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: can not be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return content


def open_file(path: Path) -> tuple[Any, dict[str, TensorInfo]]:
    """A mapped safetensors file and what its header says of each tensor."""
    try:
        opened = safe_open(path, framework="pt")
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: can not be read: {error}; download it again") from error
    return opened, {
        name: TensorInfo(path.name, _DTYPES.get(s.get_dtype(), s.get_dtype()), tuple(s.get_shape()))
        for name, s in slices.items()
    }


class TensorIndex:
    """The tensors of a directory: ``model.safetensors``, or shards with an index file.

    Every header is read, no data. Reading from several threads is safe.

    Raises:
        CheckpointError: a file is missing or truncated, or the index and the shards disagree.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: no such directory")
        self._open: dict[str, Any] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._unlisted: dict[str, str] = {}
        if (self.directory / SAFETENSORS_INDEX).exists():
            self._read_shards()
        elif (self.directory / SAFETENSORS_FILE).exists():
            self._infos = self._read_header(SAFETENSORS_FILE)
        else:
            raise CheckpointError(
                f"{self.directory}: has neither {SAFETENSORS_FILE} nor {SAFETENSORS_INDEX}; "
                "only safetensors files are read"
            )
        self._sorted = sorted(self._infos)

    def _read_header(self, file: str) -> dict[str, TensorInfo]:
        self._open[file], infos = open_file(self.directory / file)
        return infos

    def _read_shards(self) -> None:
        path = self.directory / SAFETENSORS_INDEX
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) for file in weight_map.values()
        ):
            raise CheckpointError(f"{path}: has no weight_map of tensor names to file names")
        files = sorted(set(weight_map.values()))
        missing = [file for file in files if not (self.directory / file).exists()]
        if missing:
            raise CheckpointError(
                f"{path}: names {_some(missing)}, missing from the directory; download them"
            )
        for file in files:
            for name, info in self._read_header(file).items():
                listed = weight_map.get(name)
                if listed == file:
                    self._infos[name] = info
                elif listed is None:
                    self._unlisted[name] = file
                else:
                    raise CheckpointError(
                        f"{self.directory / file}: holds {name}, which the index says is in "
                        f"{listed}: the shards are of different exports; download them again"
                    )
        absent = [name for name in weight_map if name not in self._infos]
        if absent:
            raise CheckpointError(
                f"{self.directory / weight_map[absent[0]]}: does not hold {_some(absent)}, which "
                "the index says it does; download the files again"
            )

    def names(self) -> Sequence[str]:
        """All names, sorted."""
        return self._sorted

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def under(self, prefix: str) -> Sequence[str]:
        """Names that begin with ``prefix`` and a dot, sorted."""
        start = bisect_left(self._sorted, f"{prefix}.")
        return self._sorted[start : bisect_left(self._sorted, f"{prefix}/", start)]

    def without(self, suffixes: tuple[str, ...]) -> Self:
        """The same files as if no tensor's name ended in one of ``suffixes``."""
        other = copy(self)
        other._sorted = [name for name in self._sorted if not name.endswith(suffixes)]
        other._infos = {name: self._infos[name] for name in other._sorted}
        return other

    def info(self, name: str) -> TensorInfo:
        """File, dtype and shape of a tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name in self._infos:
            return self._infos[name]
        hint = ""
        if name in self._unlisted:
            hint = f"; {self._unlisted[name]} holds it, but {SAFETENSORS_INDEX} does not list it"
        raise CheckpointError(f"{self.directory}: tensor {name} is missing{hint}")

    def where(self, name: str) -> str:
        """``file: tensor``, to begin an error message with."""
        return f"{self.directory / self.info(name).file}: {name}"

    def tensor(self, name: str, device: torch.device | str | None = None) -> Tensor:
        """The stored tensor, read now."""
        file = self.info(name).file
        return self._read(name, lambda: self._open[file].get_tensor(name), device)

    def row(self, name: str, row: int, device: torch.device | str | None = None) -> Tensor:
        """``tensor(name)[row]``, reading no more than that."""
        file = self.info(name).file
        return self._read(name, lambda: self._open[file].get_slice(name)[row], device)

    def _read(self, name: str, read: Any, device: torch.device | str | None) -> Tensor:
        try:
            tensor: Tensor = read()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.where(name)} can not be read: {error}") from error
        return tensor if device is None else tensor.to(device)

    def check(
        self, name: str, dtype: torch.dtype | Sequence[torch.dtype], shape: tuple[int, ...]
    ) -> None:
        """Raise CheckpointError unless the header says dtype (or one of them) and shape."""
        info = self.info(name)
        dtypes = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
        if info.dtype not in dtypes or info.shape != shape:
            raise CheckpointError(
                f"{self.where(name)} must be {' or '.join(map(str, dtypes))} {shape}, "
                f"got {info.dtype} {info.shape}"
            )


def _some(names: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
