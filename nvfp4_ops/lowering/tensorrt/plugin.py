"""The composite ops as TensorRT plugins that call PyTorch, so that a layer stays in the engine.

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
from torch.fx import Node
from torch_tensorrt.dynamo.conversion import ConversionContext

from nvfp4_ops.lowering.tensorrt.composite import LINEAR, MOE
from nvfp4_ops.lowering.tensorrt.constants import LAYER_INPUTS, add_constant, constants_of

PLUGIN_OPS = (MOE, LINEAR)
# npt.NDArray is no longer this from numpy 2.5 on, and TensorRT wants this.
Options = np.ndarray[Any, np.dtype[np.int8]]
_ONE_BYTE = {str(dtype): dtype for dtype in (torch.uint8, torch.float8_e4m3fn)}
_TORCH_DTYPES = {
    trt.DataType.FLOAT: torch.float32,
    trt.DataType.HALF: torch.float16,
    trt.DataType.BF16: torch.bfloat16,
    trt.DataType.INT8: torch.int8,
    trt.DataType.INT32: torch.int32,
}


def _names(op: torch._ops.OpOverload, tensors: bool) -> list[str]:
    """Arguments that are tensors, or the others."""
    return [x.name for x in op._schema.arguments if ("Tensor" in str(x.type)) == tensors]


def register_plugin(op: torch._ops.OpOverload) -> None:
    """Tell TensorRT of the plugin; once in a process."""
    tensors = _names(op, tensors=True)

    def describe(*descs: trtp.TensorDesc, options: Options) -> trtp.TensorDesc:
        return describe_output(descs[0], options)

    def run(*inputs: Any, stream: int) -> None:
        *arguments, options, outputs = inputs
        call_op(op, dict(zip(tensors, arguments, strict=True)), options, outputs[0], stream)

    # TensorRT reads the inputs from the signature.
    _sign(describe, dict.fromkeys(tensors, trtp.TensorDesc) | {"options": Options}, trtp.TensorDesc)
    run_signature = dict.fromkeys(tensors, trtp.Tensor) | {"options": Options}
    _sign(run, run_signature | {"outputs": tuple[trtp.Tensor], "stream": int}, None)
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


def describe_output(x: trtp.TensorDesc, options: Options) -> trtp.TensorDesc:
    """(rows of x, out_features) of the dtype of x."""
    columns = _decode(options)["out_features"]
    return trtp.from_shape_expr((x.shape_expr[0], columns), x.dtype)


def call_op(
    op: torch._ops.OpOverload,
    tensors: dict[str, trtp.Tensor],
    options: Options,
    output: trtp.Tensor,
    stream: int,
) -> None:
    """Run the op on the tensors of an engine and copy its result into the output."""
    how = _decode(options)
    arguments = {name: as_torch(tensor) for name, tensor in tensors.items()}
    for name, dtype in how["views"].items():
        arguments[name] = arguments[name].view(_ONE_BYTE[dtype])
    absent = dict.fromkeys(how["absent"])
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.ExternalStream(stream)):
        result = op(**(arguments | absent), **how["values"])
        as_torch(output).copy_(result)


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
    """Why the plugin cannot run this composite op; None where it can."""
    constants = constants_of(node)
    return constants if isinstance(constants, str) else None


def convert_to_plugin(
    ctx: ConversionContext,
    target: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    name: str,
) -> trt.ITensor:
    """One plugin layer, whose constants are the layer's tensors as they are on the device."""
    arguments = dict(zip((x.name for x in target._schema.arguments), args, strict=True))
    tensors = {key: arguments.pop(key) for key in _names(target, tensors=True)}
    inputs, views, absent = [], {}, []
    for key, tensor in tensors.items():
        if key in LAYER_INPUTS:
            inputs.append(_as_input(ctx, tensor))
            continue
        if tensor is None:
            absent.append(key)
            tensor = torch.zeros(1)
        elif str(tensor.dtype) in _ONE_BYTE:
            views[key] = str(tensor.dtype)
            tensor = tensor.view(torch.int8)
        inputs.append(add_constant(ctx, tensor, f"{name}_{key}"))
    options = {
        "values": arguments,
        "views": views,
        "absent": absent,
        "out_features": _out_features(target, tensors, arguments),
    }
    namespace, op_name = target._schema.name.split("::")
    plugin = getattr(getattr(trtp.op, namespace), op_name)
    layer = ctx.net.add_plugin(plugin(*inputs, options=_encode(options)), aot=False)
    layer.name = name
    output: trt.ITensor = layer.get_output(0)
    return output


def _as_input(ctx: ConversionContext, tensor: trt.ITensor) -> trt.ITensor:
    """Indices as int32, which every version of TensorRT gives to plugins."""
    if tensor.dtype != trt.DataType.INT64:
        return tensor
    return ctx.net.add_cast(tensor, trt.DataType.INT32).get_output(0)


def _out_features(
    op: torch._ops.OpOverload, tensors: dict[str, Any], values: dict[str, Any]
) -> int:
    weight, num_columns = ("weight", "num_columns") if op is LINEAR else _DOWN
    columns = values[num_columns]
    return int(tensors[weight].shape[1] if columns is None else columns)


_DOWN: Sequence[str] = ("down_weight", "down_num_columns")
