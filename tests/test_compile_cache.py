"""Compiled kernels are built once, found again by later processes, and never trusted blindly."""

import dataclasses
import enum
import functools
import importlib.util
import itertools
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from nvfp4_ops.kernels import compile_cache, machine_code

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("cutlass", "tvm_ffi")),
    reason="needs nvidia-cutlass-dsl and apache-tvm-ffi",
)

ARCH = "sm_90a"
NUM_ELEMENTS = 32


@dataclasses.dataclass(frozen=True)
class Config:
    rows_per_tile: int = 64


class Mode(enum.Enum):
    FAST = object()


def compile_fill() -> object:
    """``fill(x, value)`` sets all 32 elements of x."""
    import cuda.bindings.driver as cuda
    import cutlass
    from cutlass import cute
    from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

    @cute.kernel
    def kernel(mX: cute.Tensor, value: cutlass.Int32):
        mX[cute.arch.thread_idx()[0]] = value

    @cute.jit
    def fill(mX: cute.Tensor, value: cutlass.Int32, stream: cuda.CUstream):
        kernel(mX, value).launch(grid=[1, 1, 1], block=[NUM_ELEMENTS, 1, 1], stream=stream)

    return cute.compile(
        fill,
        make_fake_compact_tensor(cutlass.Int32, (NUM_ELEMENTS,)),
        cutlass.Int32(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi --gpu-arch {ARCH}",
    )


compiled_fill = functools.cache(compile_fill)


class Build:
    """Counts its calls; what it returns was compiled once for all tests."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self) -> object:
        self.num_calls += 1
        return compiled_fill()


def must_not_build() -> object:
    raise AssertionError("the kernel is built again")


def get(build: Callable[[], object], config: object = Config()) -> Callable[..., object]:
    return compile_cache.get("fill", config, ARCH, build)


def assert_is_fill(kernel: Callable[..., object]) -> None:
    """Its code is loaded and knows its arguments; a GPU is not needed to refuse a CPU tensor."""
    with pytest.raises(ValueError, match=r"fill\(mX: Tensor.*expected device_type=cuda"):
        kernel(torch.zeros(NUM_ELEMENTS, dtype=torch.int32), 3)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Empty cache that does not exist yet; kernels of other tests come back afterwards."""
    directory = tmp_path / "cache" / "nvfp4_ops"
    monkeypatch.setenv("NVFP4_OPS_CACHE_DIR", str(directory))
    monkeypatch.delenv("NVFP4_OPS_CACHE", raising=False)
    monkeypatch.setattr(compile_cache, "_memory", {})
    monkeypatch.setattr(compile_cache, "_warned", set())
    # Sources may be edited while tests run; the tests of that set it back.
    monkeypatch.setattr(compile_cache, "_import_time", float("inf"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield directory


def only_entry(directory: Path) -> Path:
    (entry,) = directory.iterdir()
    return entry


def in_new_process(code: str) -> None:
    """Runs code with this file as module t."""
    here = Path(__file__)
    setup = f"import sys; sys.path.insert(0, {str(here.parent)!r}); import {here.stem} as t\n"
    run = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", setup + code],
        cwd=here.parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr


# Where a kernel comes from.


def test_compile_cache_builds_once_in_a_process() -> None:
    build = Build()
    first, second = get(build), get(build)
    assert first is second
    assert build.num_calls == 1
    assert_is_fill(first)


def test_compile_cache_loads_from_disk(directory: Path) -> None:
    get(Build())
    compile_cache.clear_memory()
    assert_is_fill(get(must_not_build))
    assert only_entry(directory).suffix == compile_cache.SUFFIX


def test_compile_cache_new_process_loads_what_this_one_built() -> None:
    """It needs no GPU for that, up to the first launch."""
    get(Build())
    in_new_process("t.assert_is_fill(t.get(t.must_not_build))")


ELF_TYPE, OBJECT, SHARED_LIBRARY = 16, 1, 3


def code_of(entry: Path) -> bytes:
    return entry.read_bytes().split(b"\n", 2)[2]


@pytest.mark.skipif(shutil.which("ld") is None, reason="needs a linker")
def test_compile_cache_new_process_does_not_import_the_dsl(directory: Path) -> None:
    get(Build())
    assert code_of(only_entry(directory))[ELF_TYPE] == SHARED_LIBRARY
    check = "t.get(t.must_not_build); assert 'cutlass' not in sys.modules"
    in_new_process(check)


@pytest.mark.parametrize("linker", [None, shutil.which("false")])
def test_compile_cache_keeps_an_object_where_nothing_links(
    linker: str | None, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_code.shutil, "which", lambda name: linker)
    assert_is_fill(get(Build()))
    assert code_of(only_entry(directory))[ELF_TYPE] == OBJECT
    compile_cache.clear_memory()
    assert_is_fill(get(must_not_build))


def test_compile_cache_keeps_loaded_kernels_apart() -> None:
    """The system's loader takes a library it has seen under the same path for the same."""
    kernels = [get(Build(), Config(rows)) for rows in range(1, 9)]
    assert len(set(map(id, kernels))) == 8
    compile_cache.clear_memory()
    for rows in range(1, 9):
        assert_is_fill(get(must_not_build, Config(rows)))


def test_machine_code_has_a_path_of_its_own_however_many_there_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loader knows a library by its path, of at most 4096 bytes."""
    monkeypatch.setattr(machine_code, "_num_libraries", itertools.count())
    paths = set()
    for i in range(3000):
        content = str(i).encode()
        # Not Path, which would shorten it.
        with machine_code._memory_file(content) as (_, path), open(path, "rb") as file:
            assert file.read() == content
        paths.add(path)
    assert len(paths) == 3000


def test_compile_cache_same_call_whether_built_or_loaded() -> None:
    """The object that cute.compile returns takes keywords, an exported function does not."""
    for build in (Build(), must_not_build):
        with pytest.raises(TypeError, match="keyword"):
            get(build)(torch.zeros(NUM_ELEMENTS, dtype=torch.int32), value=3)
        compile_cache.clear_memory()


def get_after(start: threading.Barrier) -> None:
    start.wait()
    assert_is_fill(get(compile_fill))


def test_compile_cache_concurrent_processes_leave_one_entry(directory: Path) -> None:
    """Forked after the imports, which take far longer than what they race for."""
    code = """
import cutlass, multiprocessing, tvm_ffi
fork = multiprocessing.get_context("fork")
start = fork.Barrier(4)
processes = [fork.Process(target=t.get_after, args=(start,)) for _ in range(4)]
for process in processes: process.start()
for process in processes: process.join()
assert [process.exitcode for process in processes] == [0] * 4
"""
    in_new_process(code)
    assert only_entry(directory).suffix == compile_cache.SUFFIX
    assert_is_fill(get(must_not_build))


def test_compile_cache_threads_build_once() -> None:
    build = Build()
    start = threading.Barrier(8)
    kernels = []

    def slow_build() -> object:
        time.sleep(0.05)
        return build()

    def work() -> None:
        start.wait()
        kernels.append(get(slow_build))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert build.num_calls == 1
    assert len(kernels) == 8
    assert len(set(map(id, kernels))) == 1


def test_compile_cache_failed_build_is_not_kept(directory: Path) -> None:
    def fail() -> object:
        raise ValueError("no such tile")

    with pytest.raises(ValueError, match="no such tile"):
        get(fail)
    assert_is_fill(get(Build()))
    only_entry(directory)


def test_compile_cache_build_may_ask_for_another_kernel() -> None:
    def build() -> object:
        get(Build(), Config(32))
        return compiled_fill()

    get(build)
    assert compile_cache.info().num_entries == 2


# What makes it another kernel.


def edit_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_cache, "_hash_sources", lambda: "of other sources")


def upgrade(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = compile_cache._versions()
    monkeypatch.setattr(compile_cache, "_versions", lambda: {**versions, "dsl": "99.0"})


def move_to_other_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_cache, "_processor", lambda: "x86_64 without AVX")


def set_dsl_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTE_DSL_LINEINFO", "1")


CHANGES = [edit_source, upgrade, move_to_other_processor, set_dsl_variable]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_compile_cache_does_not_find_what_was_built_before(
    change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    get(Build())
    change(monkeypatch)
    compile_cache.clear_memory()
    build = Build()
    get(build)
    assert build.num_calls == 1
    assert compile_cache.info().num_entries == 2


def test_compile_cache_keeps_op_config_and_arch_apart() -> None:
    build = Build()
    keys = [
        ("fill", Config(), ARCH),
        ("fill", Config(32), ARCH),
        ("fill", Config(), "sm_100a"),
        ("nvfp4_ops::other", Config(), ARCH),
    ]
    for key in keys * 2:
        assert_is_fill(compile_cache.get(*key, build))
    assert build.num_calls == len(keys)
    compile_cache.clear_memory()
    for key in keys:
        assert_is_fill(compile_cache.get(*key, must_not_build))


def test_compile_cache_hashes_every_kernel_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    (package / "kernels").mkdir(parents=True)
    files = [package / "format.py", package / "kernels" / "a.py", package / "kernels" / "b.py"]
    for path in files:
        path.write_text("BLOCK_SIZE = 16\n")
    monkeypatch.setattr(compile_cache, "PACKAGE", package)
    hashes = {compile_cache._hash_sources()}
    for path in files:
        path.write_text("BLOCK_SIZE = 32\n")
        hashes.add(compile_cache._hash_sources())
    (package / "kernels" / "b.py").rename(package / "kernels" / "c.py")
    hashes.add(compile_cache._hash_sources())
    assert len(hashes) == 5


def test_compile_cache_describes_config_alike_in_every_process() -> None:
    @dataclasses.dataclass(frozen=True)
    class Nested:
        tile: tuple[int, ...]
        dtype: torch.dtype
        mode: Mode
        bias: bool = dataclasses.field(repr=False)
        inner: Config = Config()

    described = compile_cache._describe(Nested((64, 8), torch.bfloat16, Mode.FAST, True))
    assert described.endswith(
        "Nested(tile=(64, 8), dtype=torch.bfloat16, mode="
        f"{__name__}.Mode.FAST, bias=True, inner={__name__}.Config(rows_per_tile=64))"
    )


def test_compile_cache_rejects_config_without_stable_text() -> None:
    with pytest.raises(TypeError, match=r"config: must hold numbers.*got object"):
        get(must_not_build, Config(object()))  # type: ignore[arg-type]


# Entries that are not to be trusted.


def flip_last_bit(entry: Path) -> None:
    content = entry.read_bytes()
    entry.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def truncate(entry: Path) -> None:
    entry.write_bytes(entry.read_bytes()[:-100])


def empty(entry: Path) -> None:
    entry.write_bytes(b"")


def replace_by_another_kernel(entry: Path) -> None:
    """Intact, but not the kernel that its name says."""
    good = entry.read_bytes()
    compile_cache.get("other", Config(), ARCH, Build())
    (other,) = set(entry.parent.iterdir()) - {entry}
    os.replace(other, entry)
    assert entry.read_bytes() != good


def replace_by_no_object_file(entry: Path) -> None:
    """Its checksum holds, but it cannot be loaded."""
    key = compile_cache._key("fill", Config(), ARCH)
    compile_cache._write(entry, key, b"no object file")


DAMAGES = [flip_last_bit, truncate, empty, replace_by_another_kernel, replace_by_no_object_file]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_compile_cache_replaces_bad_entry(damage: Callable[[Path], None], directory: Path) -> None:
    get(Build())
    entry = only_entry(directory)
    good = entry.read_bytes()
    damage(entry)
    compile_cache.clear_memory()
    build = Build()
    assert_is_fill(get(build))
    assert build.num_calls == 1
    assert only_entry(directory) == entry
    assert entry.read_bytes() == good


def test_compile_cache_does_not_follow_a_link(directory: Path, tmp_path: Path) -> None:
    get(Build())
    entry = only_entry(directory)
    target = entry.rename(tmp_path / "target")
    entry.symlink_to(target)
    compile_cache.clear_memory()
    build = Build()
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        get(build)
    assert build.num_calls == 1
    assert not only_entry(directory).is_symlink()


def test_compile_cache_directory_and_entries_are_private(directory: Path) -> None:
    old = os.umask(0)
    try:
        get(Build())
    finally:
        os.umask(old)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(only_entry(directory).stat().st_mode) == 0o600


@pytest.mark.parametrize("of", ["directory", "entry"])
def test_compile_cache_ignores_what_others_can_write(of: str, directory: Path) -> None:
    get(Build())
    path = directory if of == "directory" else only_entry(directory)
    path.chmod(0o777)
    compile_cache.clear_memory()
    build = Build()
    with pytest.warns(RuntimeWarning, match=r"other users can write .*chmod go-w"):
        assert_is_fill(get(build))
    assert build.num_calls == 1


@pytest.mark.parametrize("of", ["directory", "entry"])
def test_compile_cache_ignores_what_another_user_made(
    of: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get(Build())
    path = directory if of == "directory" else only_entry(directory)
    trusted = compile_cache._is_trusted

    def from_another_user(status: os.stat_result, checked: Path) -> bool:
        if checked == path:
            status = os.stat_result((*status[:4], os.geteuid() + 1, *status[5:]))
        return trusted(status, checked)

    monkeypatch.setattr(compile_cache, "_is_trusted", from_another_user)
    compile_cache.clear_memory()
    build = Build()
    with pytest.warns(RuntimeWarning, match="belongs to another user"):
        assert_is_fill(get(build))
    assert build.num_calls == 1


def test_compile_cache_of_sources_edited_since_import_stays_in_memory(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was imported is then not what a hash of the files says."""
    monkeypatch.setattr(compile_cache, "_import_time", 0.0)
    with pytest.warns(RuntimeWarning, match="edited after it was imported"):
        get(Build())
    assert not directory.exists()


# Machines without a place to write.


def test_compile_cache_works_without_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write to a read-only directory, but makes none below a file either."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("NVFP4_OPS_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="in memory only: the directory cannot be used") as seen:
        kernels = [get(Build()), get(Build(), Config(32))]
    assert len(seen) == 1
    for kernel in kernels:
        assert_is_fill(kernel)
    assert compile_cache.info() == (tmp_path / "file" / "cache", 0, 0, 2)


@pytest.mark.parametrize("function", ["mkstemp", "replace"])
def test_compile_cache_works_where_entries_cannot_be_written(
    function: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    module = compile_cache.tempfile if function == "mkstemp" else compile_cache.os
    monkeypatch.setattr(module, function, fail)
    with pytest.warns(RuntimeWarning, match="cannot be written.*Read-only") as seen:
        kernels = [get(Build()), get(Build(), Config(32))]
    assert len(seen) == 1
    for kernel in kernels:
        assert_is_fill(kernel)
    assert not list(directory.iterdir())


def test_compile_cache_works_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("NVFP4_OPS_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", fail)
    with pytest.warns(RuntimeWarning, match="no home directory"):
        assert_is_fill(get(Build()))


def test_compile_cache_can_be_kept_off_the_disk(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVFP4_OPS_CACHE", "0")
    assert_is_fill(get(Build()))
    assert not directory.exists()
    assert compile_cache.info() == (None, 0, 0, 1)
    assert compile_cache.clear_disk() == 0


@pytest.mark.parametrize(
    ("chosen", "xdg", "expected"),
    [
        pytest.param("~/a", "xdg", "home/a", id="chosen"),
        pytest.param("", "xdg", "xdg/nvfp4_ops", id="xdg"),
        pytest.param("", "", "home/.cache/nvfp4_ops", id="home"),
    ],
)
def test_compile_cache_chooses_directory(
    chosen: str, xdg: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NVFP4_OPS_CACHE_DIR", chosen)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / xdg) if xdg else "relative")
    assert compile_cache.info() == (tmp_path / expected, 0, 0, 0)
    assert not (tmp_path / expected).exists()


def test_compile_cache_clears_disk(directory: Path) -> None:
    get(Build())
    size = only_entry(directory).stat().st_size
    assert compile_cache.info() == (directory, 1, size, 1)
    (directory / f"left{compile_cache.UNFINISHED_SUFFIX}").touch()
    (directory / "notes.txt").touch()
    assert compile_cache.clear_disk() == 1
    assert only_entry(directory).name == "notes.txt"
    assert compile_cache.info() == (directory, 0, 0, 1)


# CUDA graphs.


def test_compile_cache_miss_during_capture_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the disk has it, as loading during a capture is no better."""
    kernel = get(Build())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert get(must_not_build) is kernel
    compile_cache.clear_memory()
    with pytest.raises(RuntimeError, match=r"fill: .*call nvfp4_ops.warmup\(...\) or run the op"):
        get(must_not_build)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert_is_fill(get(must_not_build))


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="sm_90a code"
)
def test_compile_cache_loaded_kernel_runs_on_the_current_stream() -> None:
    get(Build())
    compile_cache.clear_memory()
    kernel = get(must_not_build)
    x = torch.zeros(NUM_ELEMENTS, dtype=torch.int32, device="cuda")
    kernel(x, 3)
    assert x.tolist() == [3] * NUM_ELEMENTS
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(x, 5)
        with pytest.raises(RuntimeError, match="before capturing"):
            get(must_not_build, Config(32))
    assert x.tolist() == [3] * NUM_ELEMENTS
    graph.replay()
    assert x.tolist() == [5] * NUM_ELEMENTS
