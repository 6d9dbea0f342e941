"""Import torch_tensorrt where there is no GPU, and take its steps one by one, up to the engine.

torch_tensorrt asks torch.cuda for the device when it is imported and loads a C++ runtime that needs
libtorch_cuda. Here the questions are answered for a GPU that is not there, and the runtime is
reported absent, which its Python part is made for. That is for the whole process, so tests that
use it run in one of their own (tests/test_tensorrt.py).
"""

import importlib
import importlib.metadata
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.fx import GraphModule

GIB = 1 << 30


def _properties(capability: tuple[int, int]) -> Any:
    return SimpleNamespace(
        name="no GPU",
        major=capability[0],
        minor=capability[1],
        total_memory=80 * GIB,
        multi_processor_count=100,
        L2_cache_size=1 << 20,
        is_integrated=0,
        uuid="0",
    )


@contextmanager
def pretend(capability: tuple[int, int]) -> Iterator[None]:
    """torch.cuda answers for a GPU of this compute capability."""
    properties = _properties(capability)
    answers = {
        "get_device_capability": capability,
        "get_device_properties": properties,
        "get_device_name": properties.name,
        "current_device": 0,
        "mem_get_info": (properties.total_memory, properties.total_memory),
        "synchronize": None,
    }
    patches = [
        mock.patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer)
        for name, answer in answers.items()
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def import_torch_tensorrt() -> ModuleType:
    """The module, imported as for a GPU with FP4."""
    if not hasattr(torch._C, "_CudaDeviceProperties"):  # in CPU builds of torch
        torch._C._CudaDeviceProperties = type("_CudaDeviceProperties", (), {})
    isfile = os.path.isfile

    def no_runtime(file: str) -> bool:
        return "torchtrt" not in os.path.basename(os.fspath(file)) and isfile(file)

    with pretend((12, 0)), mock.patch("os.path.isfile", no_runtime):
        return importlib.import_module("torch_tensorrt")


def settings(**options: Any) -> Any:
    from torch_tensorrt.dynamo._settings import CompilationSettings

    # The default asks for five ops, which a small model does not have between its layers.
    return CompilationSettings(**{"min_block_size": 1, **options})


def partition(
    model: nn.Module, *inputs: torch.Tensor, dynamic_shapes: Any = None, **options: Any
) -> GraphModule:
    """What torch_tensorrt.compile makes of a model, before it builds engines."""
    from torch_tensorrt.dynamo import partitioning
    from torch_tensorrt.dynamo.conversion import DYNAMO_CONVERTERS
    from torch_tensorrt.dynamo.lowering import (
        get_decompositions,
        post_lowering,
        pre_export_lowering,
    )

    choices = settings(**options)
    DYNAMO_CONVERTERS.set_compilation_settings(choices)
    with torch.no_grad():
        program = torch.export.export(model.eval(), inputs, dynamic_shapes=dynamic_shapes)
        program = pre_export_lowering(program, choices).run_decompositions(
            get_decompositions(False)
        )
        lowered = post_lowering(program.module(), choices)
    split, _ = partitioning.fast_partition(
        lowered,
        min_block_size=choices.min_block_size,
        torch_executed_ops=choices.torch_executed_ops,
    )
    return split


def ops_of(module: GraphModule) -> list[str]:
    """Names of the ops it calls, in order, without views and indexing."""
    names = [
        str(node.target).removesuffix(".default")
        for node in module.graph.nodes
        if node.op == "call_function"
    ]
    ignored = ("aten.reshape", "aten.view", "aten.sym_size", "<built-in function getitem>")
    return [name for name in names if not name.startswith(ignored)]


def parts_of(split: GraphModule) -> list[tuple[str, list[str]]]:
    """("engine" or "torch", ops) of every partition, in order."""
    children = [(name, x) for name, x in split.named_children() if name.startswith("_run_on_")]
    if not children:
        return [("engine", ops_of(split))]
    kinds = {"_run_on_acc_": "engine", "_run_on_gpu_": "torch"}
    return [(kinds[name.rstrip("0123456789")], ops_of(module)) for name, module in children]


def network_of(module: GraphModule, *inputs: Any, **options: Any) -> Any:
    """torch_tensorrt's interpreter with the network of an engine partition."""
    from torch_tensorrt.dynamo.conversion._TRTInterpreter import TRTInterpreter

    *_, output = module.graph.nodes
    interpreter = TRTInterpreter(
        module,
        list(inputs),
        output_dtypes=[node.meta["val"].dtype for node in output.all_input_nodes],
        compilation_settings=settings(**options),
    )
    interpreter._construct_trt_network_def()
    return interpreter


def build(interpreter: Any, target: str) -> Any:
    """The serialized engine for a compute capability such as "SM120"; None where it is refused."""
    import tensorrt as trt

    config = interpreter._populate_trt_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
    return interpreter.builder.build_serialized_network(interpreter.ctx.net, config)
