"""Layers and routers as TensorRT plugins that call PyTorch, so that they stay in the engine.

Quickly deployable plugins, just in time: TensorRT calls Python, which calls the op on TensorRT's
stream. Such an engine runs only where ``register(plugin=True)`` was called before, with this
package, and not without Python. It saves the graph breaks; the kernels are the same.

Plugins have neither optional inputs nor uint8: a missing tensor is a placeholder, one-byte weights
are int8, and ``options``, the plugin's one attribute, is JSON that says which and what for. It is
an array of bytes: TensorRT serializes an attribute by its address, which a str does not keep.
Imports TensorRT: only ``register`` imports this.
"""

import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorrt as trt
import tensorrt.plugin as trtp
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import Node
from torch_tensorrt.dynamo.conversion import ConversionContext

from nvfp4_ops.lowering.tensorrt.composite import LINEAR, MOE
from nvfp4_ops.lowering.tensorrt.constants import LAYER_INPUTS, add_constant, constants_of

PLUGIN_OPS = (
    MOE,
    LINEAR,
    torch.ops.nvfp4_ops.router_logits.default,
    torch.ops.nvfp4_ops.softmax_top_k.default,
    torch.ops.nvfp4_ops.sigmoid_top_k.default,
)
# npt.NDArray is no longer this from numpy 2.5 on, and TensorRT wants this.
Options = np.ndarray[Any, np.dtype[np.int8]]
_ONE_BYTE = {str(dtype): dtype for dtype in (torch.uint8, torch.float8_e4m3fn)}
_TORCH_DTYPES = {
    trt.DataType.FLOAT: torch.float32,
    trt.DataType.HALF: torch.float16,
    trt.DataType.BF16: torch.bfloat16,
    trt.DataType.INT8: torch.int8,
    trt.DataType.INT32: torch.int32,
    trt.DataType.INT64: torch.int64,
}
_TRT_DTYPES = {dtype: name for name, dtype in _TORCH_DTYPES.items()}
_ANY_ROWS = 2


def _names(op: torch._ops.OpOverload, tensors: bool) -> list[str]:
    """Arguments that are tensors, or the others."""
    return [x.name for x in op._schema.arguments if ("Tensor" in str(x.type)) == tensors]


def register_plugin(op: torch._ops.OpOverload) -> None:
    """Tell TensorRT of the plugin; once in a process."""
    tensors = _names(op, tensors=True)
    num_outputs = len(op._schema.returns)

    def describe(*descs: trtp.TensorDesc, options: Options) -> Any:
        outputs = describe_outputs(descs[0], options)
        return outputs if num_outputs > 1 else outputs[0]

    def run(*inputs: Any, stream: int) -> None:
        *arguments, options, outputs = inputs
        call_op(op, dict(zip(tensors, arguments, strict=True)), options, outputs, stream)

    # TensorRT reads inputs and outputs from the signatures.
    desc, tensor, tuple_of = trtp.TensorDesc, trtp.Tensor, tuple.__class_getitem__
    described = tuple_of((desc,) * num_outputs) if num_outputs > 1 else desc
    others = {"options": Options, "outputs": tuple_of((tensor,) * num_outputs), "stream": int}
    _sign(describe, dict.fromkeys(tensors, desc) | {"options": Options}, described)
    _sign(run, dict.fromkeys(tensors, tensor) | others, None)
    name = op._schema.name
    trtp.register(name, lazy_register=False)(describe)
    trtp.impl(name)(run)


def _sign(function: Callable[..., Any], arguments: dict[str, Any], returns: Any) -> None:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, annotation=x) for name, x in arguments.items()]
    signature = inspect.Signature(parameters, return_annotation=returns)
    function.__signature__ = signature  # type: ignore[attr-defined]


def _encode(options: dict[str, Any]) -> Options:
    return np.frombuffer(json.dumps(options).encode(), dtype=np.int8)


def _decode(options: Options) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(options.tobytes())
    return decoded


def describe_outputs(x: trtp.TensorDesc, options: Options) -> tuple[trtp.TensorDesc, ...]:
    """A row for each of x; ``options["outputs"]`` has columns and dtype."""
    return tuple(
        trtp.from_shape_expr((x.shape_expr[0], columns), getattr(trt.DataType, dtype))
        for columns, dtype in _decode(options)["outputs"]
    )


def call_op(
    op: torch._ops.OpOverload,
    tensors: dict[str, trtp.Tensor],
    options: Options,
    outputs: Sequence[trtp.Tensor],
    stream: int,
) -> None:
    """Run the op on the tensors of an engine and copy its results into the outputs."""
    how = _decode(options)
    arguments = {name: as_torch(tensor) for name, tensor in tensors.items()}
    for name, dtype in how["views"].items():
        arguments[name] = arguments[name].view(_ONE_BYTE[dtype])
    absent = dict.fromkeys(how["absent"])
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.ExternalStream(stream)):
        results = op(**(arguments | absent), **how["values"])
        for output, result in zip(outputs, _as_tuple(results), strict=True):
            as_torch(output).copy_(result)


def _as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


class _DeviceBytes:
    """Bytes at a device address, for torch.as_tensor: TensorRT's own interface has no bf16."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def as_torch(tensor: trtp.Tensor) -> Tensor:
    """A view of a tensor that TensorRT owns."""
    dtype = _TORCH_DTYPES[tensor.dtype]
    shape = torch.Size(tensor.shape)
    if shape.numel() == 0:
        return torch.empty(shape, dtype=dtype, device="cuda")
    raw = _DeviceBytes(tensor.data_ptr, shape.numel() * dtype.itemsize)
    return torch.as_tensor(raw, device="cuda").view(dtype).view(shape)


def why_no_plugin(node: Node) -> str | None:
    """Why the plugin cannot run this op; None where it can."""
    constants = constants_of(node)
    return constants if isinstance(constants, str) else None


def convert_to_plugin(
    ctx: ConversionContext,
    target: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    name: str,
) -> Any:
    """One plugin layer, whose constants are the layer's tensors as they are on the device."""
    schema = target._schema.arguments
    values = {x.name: x.default_value for x in schema if x.has_default_value()}
    values |= dict(zip((x.name for x in schema), args, strict=False)) | kwargs
    tensors = {key: values.pop(key) for key in _names(target, tensors=True)}
    results = _results(target, tensors, values)
    inputs, views, absent = [], {}, []
    for key, tensor in tensors.items():
        if key in LAYER_INPUTS:
            inputs.append(_cast(ctx, tensor, trt.DataType.INT64, trt.DataType.INT32))
            continue
        if tensor is None:
            absent.append(key)
            tensor = torch.zeros(1)
        elif str(tensor.dtype) in _ONE_BYTE:
            views[key] = str(tensor.dtype)
            tensor = tensor.view(torch.int8)
        inputs.append(add_constant(ctx, tensor, f"{name}_{key}"))
    # Indices are int32 within the engine, which plugins of every version of TensorRT may have.
    outputs = [
        (x.shape[1], "INT32" if x.dtype == torch.int64 else _TRT_DTYPES[x.dtype].name)
        for x in results
    ]
    options = {"values": values, "views": views, "absent": absent, "outputs": outputs}
    namespace, op_name = target._schema.name.split("::")
    plugin = getattr(getattr(trtp.op, namespace), op_name)
    layer = ctx.net.add_plugin(plugin(*inputs, options=_encode(options)), aot=False)
    layer.name = name
    given = [layer.get_output(i) for i in range(len(results))]
    for i, result in enumerate(results):
        if result.dtype == torch.int64:
            given[i] = _cast(ctx, given[i], trt.DataType.INT32, trt.DataType.INT64)
    return given if len(given) > 1 else given[0]


def _results(
    op: torch._ops.OpOverload, tensors: dict[str, Any], values: dict[str, Any]
) -> tuple[Tensor, ...]:
    """What the op returns for some number of rows, as fake tensors."""
    with FakeTensorMode() as mode:
        fakes = {
            name: torch.empty(_ANY_ROWS, *tuple(x.shape)[1:], dtype=_TORCH_DTYPES[x.dtype])
            if name in LAYER_INPUTS
            else x
            if x is None
            else mode.from_tensor(x.cpu())
            for name, x in tensors.items()
        }
        return _as_tuple(op(**fakes, **values))


def _cast(
    ctx: ConversionContext, tensor: trt.ITensor, old: trt.DataType, new: trt.DataType
) -> trt.ITensor:
    """The tensor, as ``new`` where it is ``old``."""
    return ctx.net.add_cast(tensor, new).get_output(0) if tensor.dtype == old else tensor
