"""Machine code of a compiled kernel as bytes: exported, linked and loaded.

cute exports an object file and links one in memory, which takes its whole compiler: most of the
time of a warm start. So an object is linked here, once, to a shared library that the system's
loader takes. Where there is no linker the object is kept, and cute loads it.
"""

import contextlib
import ctypes
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

_SYMBOL_PREFIX = "__tvm_ffi_"
_TYPE_OFFSET, _SHARED_LIBRARY = 16, 3
"""Where an ELF file says what it is, and what a shared library says."""

_num_libraries = itertools.count()


def export(compiled: object, name: str) -> bytes:
    """Code that defines function ``name``, of what ``cute.compile`` returned."""
    with _memory_file() as (descriptor, path):
        compiled.export_to_c(path, function_name=name)
        code = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    return _link(code) or code


def load(code: bytes, name: str) -> Callable[..., object]:
    """Function ``name`` of exported code; touches no GPU until its first call."""
    if code[_TYPE_OFFSET] != _SHARED_LIBRARY:
        from cutlass import cute

        with _memory_file(code) as (_, path):
            return cute.runtime.load_module(path, enable_tvm_ffi=True)[name]
    import tvm_ffi

    with _memory_file(code) as (_, path):
        library = ctypes.CDLL(path)
    address = ctypes.cast(library[_SYMBOL_PREFIX + name], ctypes.c_void_p).value
    return tvm_ffi.Function.__from_extern_c__(address, keep_alive_object=library)


def _link(code: bytes) -> bytes | None:
    """An object file as a shared library that finds its own libraries; None without a linker."""
    from cutlass import cute

    linker = shutil.which("ld")
    if linker is None:
        return None
    libraries = cute.runtime.find_runtime_libraries(enable_tvm_ffi=True)
    folders = ":".join(str(Path(library).parent) for library in libraries)
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory) / "kernel.o", Path(directory) / "kernel.so"
        source.write_bytes(code)
        command = [linker, "-shared", "-rpath", folders, "-o", target, source, *libraries]
        # -z: else the loader would make the stack executable. --no-undefined: fail here, not there.
        flags = ["-z", "noexecstack", "--no-undefined", "--eh-frame-hdr"]
        if subprocess.run([*command, *flags], capture_output=True).returncode == 0:
            return target.read_bytes()
    return None


@contextlib.contextmanager
def _memory_file(content: bytes = b"") -> Iterator[tuple[int, str]]:
    """Descriptor and path of a file that exists in memory only.

    cute exports to a path, and loaders load from one. This way they load the very bytes that were
    checked, and a machine without a writable directory can do both.
    """
    with open(os.memfd_create("nvfp4_ops"), "w+b", buffering=0) as file:
        file.write(content)
        # The system's loader knows a library by its path, and descriptors are used again.
        # Its number in base 2, in steps that lead nowhere: paths have a limited length.
        unique = "".join("./" if bit == "1" else "/" for bit in f"{next(_num_libraries):b}")
        yield file.fileno(), f"/proc/self/fd/{unique}{file.fileno()}"
