"""Compiled kernels, kept in memory for this process and on disk for later ones.

``cute.compile`` keeps nothing itself, and a new process would compile for seconds before its first
layer ran. A disk entry is machine code that runs in this process, so it is used only if its owner
is this user or root, nobody else can write it, and its checksum and the whole text of its key
agree; otherwise it is compiled again and replaced. An entry is one file:

    sha256 of the rest, in hex
    key as one line of JSON: op, config, architecture, versions, processor, sources
    machine code: a shared library, or an object file where there is no linker

A directory that cannot be used costs one warning, never an error: the kernels then stay in memory.
``NVFP4_OPS_CACHE_DIR`` chooses the directory, ``NVFP4_OPS_CACHE=0`` keeps everything off the disk.
"""

import contextlib
import dataclasses
import enum
import functools
import json
import os
import platform
import re
import stat
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterator
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from nvfp4_ops import plans
from nvfp4_ops.kernels import machine_code

PACKAGE = Path(__file__).resolve().parent.parent
_TOOLKITS = ("nvidia-cutlass-dsl-libs-cu12", "nvidia-cutlass-dsl-libs-cu13")
SUFFIX, UNFINISHED_SUFFIX = ".kernel", ".kernel-unfinished"

# An import of the kernels after this moment may have read other sources than a hash made later.
_import_time = time.time()

# Reentrant, as a build may ask for the kernels it is made of. cute.compile wants one at a time.
_lock = threading.RLock()
_memory: dict[tuple[str, Hashable, str], Callable[..., object]] = {}
_warned: set[str] = set()
_watchers: list[set[Hashable]] = []


class CacheInfo(NamedTuple):
    """What the cache holds; directory is None where the disk is not used."""

    directory: Path | None
    num_entries: int
    num_bytes: int
    num_in_memory: int


def get(op: str, config: Hashable, arch: str, build: Callable[[], object]) -> Callable[..., object]:
    """Kernel of an op in one configuration: from memory, else from disk, else built.

    Args:
        op: name of the kernel; with config and arch it says all that build depends on.
        config: frozen dataclass of plain values: numbers, strings, enums, dtypes, types, tuples.
        arch: what build compiles for, such as ``sm_90a``.
        build: returns ``cute.compile(..., options="--enable-tvm-ffi")``; called on a miss only.

    Returns:
        Function of positional arguments, torch tensors among them, that launches on torch's
        current stream. Its first call on each device loads the code there.

    Raises:
        RuntimeError: the kernel is not in memory and a CUDA graph is being captured.
    """
    key = (op, config, arch)
    for seen in _watchers:
        seen.add(key)
    kernel = _memory.get(key)
    if kernel is None:
        with _lock:
            kernel = _memory.get(key)
            if kernel is None:
                _refuse_during_capture(op)
                kernel = _memory[key] = _load_or_build(op, config, arch, build)
    return kernel


@contextlib.contextmanager
def watch() -> Iterator[set[Hashable]]:
    """The set that every kernel asked for in this context, by any thread, goes to."""
    seen: set[Hashable] = set()
    _watchers.append(seen)
    try:
        # A call that has a plan asks for nothing.
        with plans.suspended():
            yield seen
    finally:
        # By identity: sets that happen to be equal are not the same watcher.
        _watchers[:] = [other for other in _watchers if other is not seen]


def num_in_memory() -> int:
    return len(_memory)


def clear_memory() -> None:
    """Forget this process's kernels, and which warnings it gave."""
    with _lock:
        plans.clear()
        _memory.clear()
        _warned.clear()


def clear_disk() -> int:
    """Delete every entry of the cache directory, of any version; returns how many."""
    entries = _files(SUFFIX)
    for path in (*entries, *_files(UNFINISHED_SUFFIX)):
        path.unlink(missing_ok=True)
    return len(entries)


def info() -> CacheInfo:
    """Where the cache is and what it holds; creates nothing."""
    sizes = []
    for path in _files(SUFFIX):
        with contextlib.suppress(FileNotFoundError):  # another process clears the cache
            sizes.append(path.stat().st_size)
    return CacheInfo(_chosen_directory(), len(sizes), sum(sizes), len(_memory))


def _refuse_during_capture(op: str) -> None:
    # Compiling takes seconds, and the first launch loads a module, which a capture may not do.
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{op}: no kernel for these arguments is loaded, and none can be while a CUDA graph "
            "is captured: call nvfp4_ops.warmup(...) or run the op once before capturing"
        )


def _load_or_build(
    op: str, config: Hashable, arch: str, build: Callable[[], object]
) -> Callable[..., object]:
    key = _key(op, config, arch)
    name = re.sub(r"\W", "_", f"{op}_{arch}_") + sha256(key.encode()).hexdigest()[:32]
    directory = _usable_directory()
    if directory is not None:
        code = _read(directory / (name + SUFFIX), key)
        if code is not None:
            # Whole and ours, yet made for other libraries than its key can tell: build it again.
            with contextlib.suppress(Exception):
                return machine_code.load(code, name)
    code = machine_code.export(build(), name)
    # What build returned takes keywords and makes more of its arguments than an entry from disk
    # does: callers get the latter even now, so that the next process behaves the same.
    kernel = machine_code.load(code, name)
    if directory is not None:
        _write(directory / (name + SUFFIX), key, code)
    return kernel


# The key: all that the machine code depends on.


def _key(op: str, config: Hashable, arch: str) -> str:
    """One line of JSON; the file name is its hash."""
    key = {
        "op": op,
        "config": _describe(config),
        "arch": arch,
        **_versions(),
        "processor": _processor(),
        # Some change the code, all of them are asked for by someone who compiles.
        "environment": {k: v for k, v in os.environ.items() if k.startswith("CUTE_DSL_")},
        "sources": _hash_sources(),
    }
    return json.dumps(key, sort_keys=True)


def _describe(value: object) -> str:
    """Text that is the same in every process: a default repr holds an address."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = (field.name for field in dataclasses.fields(value))
        fields = ", ".join(f"{name}={_describe(getattr(value, name))}" for name in names)
        return f"{_describe(type(value))}({fields})"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, enum.Enum):
        return f"{_describe(type(value))}.{value.name}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_describe, value))})"
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return repr(value)
    raise TypeError(
        "config: must hold numbers, strings, enums, dtypes, types, tuples and dataclasses of them, "
        f"got {type(value).__name__}"
    )


@functools.cache
def _versions() -> dict[str, object]:
    """Versions of what compiles the kernel and of the libraries that its code calls.

    Of the installed packages: importing the DSL to ask it would take most of a warm start.
    """
    versions: dict[str, object] = {}
    # The packages for CUDA 12 and 13 bring different assemblers; of several the driver chooses.
    for package in ("nvidia-cutlass-dsl", *_TOOLKITS, "apache-tvm-ffi"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    get_driver_version = getattr(torch._C, "_cuda_getDriverVersion", None)
    versions["driver"] = get_driver_version and get_driver_version() // 1000
    return versions


@functools.cache
def _processor() -> str:
    """The launch code is compiled for this very CPU (AVX and more); a home may be on several."""
    features = ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        # Of the first processor: reading on takes milliseconds where there are hundreds.
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {sha256(features.encode()).hexdigest()[:16]}"


def _sources() -> list[Path]:
    """Files that any kernel may be made of: kernels import format.py and nothing else."""
    return [*sorted((PACKAGE / "kernels").rglob("*.py")), PACKAGE / "format.py"]


def _hash_sources() -> str:
    total = sha256()
    for path in _sources():
        total.update(f"{path.relative_to(PACKAGE)}\n".encode())
        total.update(sha256(path.read_bytes()).digest())
    return total.hexdigest()


# The directory.


def _chosen_directory() -> Path | None:
    """None where the user wants no disk cache, or has no home."""
    if os.environ.get("NVFP4_OPS_CACHE") == "0":
        return None
    try:
        if chosen := os.environ.get("NVFP4_OPS_CACHE_DIR"):
            return Path(chosen).expanduser().absolute()
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not base.is_absolute():  # its specification says to ignore such a value
            base = Path("~/.cache").expanduser()
    except RuntimeError:
        _warn("there is no home directory")
        return None
    return base / "nvfp4_ops"


def _usable_directory() -> Path | None:
    """The chosen directory, made if need be; None, after a warning, if it cannot be relied on."""
    directory = _chosen_directory()
    if directory is None:
        return None
    try:
        if max(path.stat().st_mtime for path in _sources()) > _import_time:
            _warn("its sources were edited after it was imported")
            return None
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError as error:
        _warn(f"the directory cannot be used: {error}")
        return None
    return directory if _is_trusted(status, directory) else None


def _is_trusted(status: os.stat_result, path: Path) -> bool:
    """Whether only this user, or root, can have written it; warns if not."""
    if status.st_uid not in (0, os.geteuid()):
        _warn(f"{path} belongs to another user; choose another directory with NVFP4_OPS_CACHE_DIR")
        return False
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        _warn(f"other users can write {path}; run `chmod go-w` on it")
        return False
    return True


def _files(suffix: str) -> list[Path]:
    directory = _chosen_directory()
    if directory is None or not directory.is_dir():
        return []
    return [path for path in directory.iterdir() if path.name.endswith(suffix)]


def _warn(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        message = f"nvfp4_ops keeps compiled kernels in memory only: {reason}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)


# Entries.


def _read(path: Path, key: str) -> bytes | None:
    """Code of an entry; None if there is none, or none to rely on."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            # Of the open file: whoever swaps the path after the check gains nothing.
            if not _is_trusted(os.fstat(file.fileno()), path):
                return None
            digest, _, content = file.read().partition(b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn(f"an entry cannot be read: {error}")
        return None
    stored_key, _, code = content.partition(b"\n")
    intact = digest == sha256(content).hexdigest().encode() and stored_key == key.encode()
    return code if intact else None


def _write(path: Path, key: str, code: bytes) -> None:
    """Whole or not at all; of several processes that write one entry, the last one's stays."""
    content = key.encode() + b"\n" + code
    try:
        handle, unfinished = tempfile.mkstemp(UNFINISHED_SUFFIX, path.stem, path.parent)
        try:
            with open(handle, "wb") as file:
                file.write(sha256(content).hexdigest().encode() + b"\n" + content)
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
            raise
    except OSError as error:
        _warn(f"an entry cannot be written: {error}")
