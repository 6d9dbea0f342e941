"""TensorRT's real Python bindings without its libraries, which no package index carries.

The bindings link nine functions. Libraries that define them and return 0 let the bindings be
imported: enums, descriptors, the plugin decorators with all their validation, the class that a
plugin becomes. What lives in the libraries has a stand-in here: the plugin registry, expressions of
dimensions, and a network that records what a converter adds. For a process of its own.
"""

import ctypes
import importlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)


def _preload_stubs(major: str) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler, for libraries that let TensorRT's bindings be imported")
    source = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "stub.c").write_text(source)
        for library in LIBRARIES:
            soname = f"{library}.so.{major}"
            command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", soname]
            subprocess.run([*command, "stub.c"], cwd=folder, check=True)
            ctypes.CDLL(str(Path(folder) / soname), mode=ctypes.RTLD_GLOBAL)


class Registry:
    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str = "") -> bool:
        self.creators[creator.name, creator.plugin_version, namespace] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str = "") -> Any:
        return self.creators.get((name, version, namespace))


def import_tensorrt() -> Any:
    """The module tensorrt, and torch_tensorrt to be imported as the package that goes with it."""
    from importlib.metadata import version

    _preload_stubs(version("tensorrt-cu13-bindings").split(".")[0])
    tensorrt = importlib.import_module("tensorrt_bindings")
    registry = Registry()
    tensorrt.get_plugin_registry = lambda: registry
    tensorrt._package_name = "tensorrt"
    # The plugin package imports tensorrt, whose distribution is these aliases.
    sys.modules["tensorrt"] = tensorrt
    importlib.import_module("tensorrt_bindings.plugin")
    for name in [name for name in sys.modules if name.startswith("tensorrt_bindings")]:
        sys.modules[name.replace("tensorrt_bindings", "tensorrt", 1)] = sys.modules[name]
    # torch-tensorrt-rtx has the files of torch-tensorrt but for a legacy folder.
    for legacy in ("fx", "fx.lower", "fx.utils"):
        sys.modules[f"torch_tensorrt.{legacy}"] = mock.MagicMock()
    packages = {"torch_tensorrt": ["torch-tensorrt"]}
    mock.patch("importlib.metadata.packages_distributions", return_value=packages).start()
    return tensorrt


def fake_tensor(dtype: Any, shape: tuple[int, ...]) -> Any:
    """An ITensor by type; TensorRT alone can make a real one."""
    import tensorrt as trt

    class FakeTensor(trt.ITensor):
        dtype: Any = None
        shape: Any = None

    tensor = FakeTensor.__new__(FakeTensor)
    tensor.dtype, tensor.shape = dtype, shape
    return tensor


class FakeLayer:
    def __init__(self, *outputs: Any) -> None:
        self.outputs = outputs
        self.name = ""

    def get_output(self, index: int) -> Any:
        return self.outputs[index]


class FakeNetwork:
    """Records constants, casts and plugins."""

    def __init__(self) -> None:
        self.weights: list[Any] = []
        self.casts: list[Any] = []
        self.plugins: list[tuple[list[Any], Any]] = []

    def add_constant(self, shape: Any, weights: Any) -> FakeLayer:
        self.weights.append(weights)
        return FakeLayer(fake_tensor(weights.dtype, tuple(shape)))

    def add_cast(self, tensor: Any, dtype: Any) -> FakeLayer:
        self.casts.append((tensor, dtype))
        return FakeLayer(fake_tensor(dtype, tensor.shape))

    def add_plugin(self, create: Any, aot: bool) -> FakeLayer:
        assert not aot
        inputs, shape_inputs, plugin = create()
        assert not shape_inputs
        self.plugins.append((inputs, plugin))
        dtypes = plugin.get_output_data_types(
            [x.dtype for x in inputs], [len(x.shape) for x in inputs]
        )
        return FakeLayer(*(fake_tensor(dtype, inputs[0].shape) for dtype in dtypes))
