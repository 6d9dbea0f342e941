"""register: make torch_tensorrt know the layers, by what of them each call asks for."""

import threading
from typing import Any

import torch
from torch.fx import Node

from nvfp4_ops.lowering.tensorrt.composite import LINEAR
from nvfp4_ops.lowering.tensorrt.fusion import fuse
from nvfp4_ops.lowering.tensorrt.versions import advice, import_torch_tensorrt

_LOCK = threading.Lock()
_enabled: set[str] = set()
"""Routes of the last call of ``register``."""
_added: set[str] = set()
"""What torch_tensorrt's process-wide tables have been given; they take everything twice."""


def register(*, native: bool = True, plugin: bool = False) -> None:
    """Make torch_tensorrt lower NVFP4MoE and NVFP4Linear, in this process from now on.

    Each layer becomes one op for the partitioner, so a model breaks at a layer once, with its
    activations (and the routing) at the boundary, never within it. Where nothing below applies the
    layer runs in PyTorch. Call it before ``torch_tensorrt.compile``, and before an engine with
    plugins is loaded. A further call changes the routes of compilations to come; the same call
    again does nothing.

    Args:
        native: run an NVFP4Linear with static scales or weight-only by TensorRT's own FP4 layers
            on GPUs of compute capability 10.0 or newer; a warning says why one is not.
        plugin: keep the layers that are not native inside the engine, as plugins that call
            PyTorch. Needs TensorRT (TensorRT-RTX has no plugins), and such an engine needs Python.

    Raises:
        ImportError: torch_tensorrt is absent, is made for another torch or cannot be imported, or
            plugin is asked of one without plugins; the message names the versions that fit.
    """
    import_torch_tensorrt()
    with _LOCK:
        if plugin:
            _check_plugins()
        _add_pass()
        if native:
            _add_native()
        if plugin:
            _add_plugin()
        routes = {"native": native, "plugin": plugin}
        _enabled.clear()
        _enabled.update(name for name, wanted in routes.items() if wanted)


def _first_time(what: str) -> bool:
    if what in _added:
        return False
    _added.add(what)
    return True


def _add_pass() -> None:
    # The package's name of it is its module's.
    from torch_tensorrt.dynamo.lowering.passes._aten_lowering_pass import _aten_lowering_pass

    if _first_time("pass"):
        _aten_lowering_pass(fuse)


def _add_native() -> None:
    from torch_tensorrt.dynamo.conversion import ConverterPriority, dynamo_tensorrt_converter

    from nvfp4_ops.lowering.tensorrt import native

    def applies(node: Node, settings: Any = None) -> bool:
        if "native" not in _enabled:
            return False
        reason = native.why_no_native_linear(node, settings)
        if reason is not None and "plugin" not in _enabled:
            native.warn_of_torch(reason)
        return reason is None

    if _first_time("native"):
        dynamo_tensorrt_converter(
            LINEAR,
            capability_validator=applies,
            # Before the plugin, whichever is added first.
            priority=ConverterPriority.HIGH,
            supports_dynamic_shapes=True,
        )(native.convert_linear)


def _check_plugins() -> None:
    import tensorrt

    if getattr(tensorrt, "_package_name", "tensorrt") == "tensorrt_rtx":
        raise ImportError(
            "plugin: TensorRT-RTX has no plugins; use torch-tensorrt instead of "
            f"torch-tensorrt-rtx: {advice(torch.__version__)}"
        )


def _add_plugin() -> None:
    from torch_tensorrt.dynamo.conversion import dynamo_tensorrt_converter

    from nvfp4_ops.lowering.tensorrt import plugin

    def applies(node: Node, settings: Any = None) -> bool:
        return "plugin" in _enabled and plugin.why_no_plugin(node) is None

    for op in plugin.PLUGIN_OPS:
        if _first_time(f"plugin {op}"):
            plugin.register_plugin(op)
            dynamo_tensorrt_converter(
                op, capability_validator=applies, supports_dynamic_shapes=True
            )(plugin.convert_to_plugin)
