"""Constants of a TensorRT network, of dtypes that torch_tensorrt's own helper does not take."""

import operator

import tensorrt as trt
import torch
from torch import Tensor
from torch.fx import Node
from torch_tensorrt.dynamo.conversion import ConversionContext

LAYER_INPUTS = ("x", "logits", "top_k_index", "top_k_weights")
"""Arguments of the ops that every call of a layer brings."""

_DTYPES = {
    torch.float32: trt.DataType.FLOAT,
    torch.float16: trt.DataType.HALF,
    torch.bfloat16: trt.DataType.BF16,
    torch.float8_e4m3fn: trt.DataType.FP8,
    torch.int8: trt.DataType.INT8,
}


def add_constant(
    ctx: ConversionContext,
    tensor: Tensor,
    name: str,
    dtype: trt.DataType | None = None,
    shape: tuple[int, ...] | None = None,
) -> trt.ITensor:
    """A constant of the bytes of ``tensor``; dtype, shape: what they mean, if not what it says."""
    tensor = tensor.detach().cpu().contiguous()
    shape = tuple(tensor.shape) if shape is None else shape
    dtype = _DTYPES[tensor.dtype] if dtype is None else dtype
    # TensorRT keeps the address only; the context keeps the tensor.
    ctx.record_weight(name, tensor)
    num_elements = torch.Size(shape).numel()
    weights = trt.Weights(dtype, tensor.data_ptr(), num_elements)
    layer = ctx.net.add_constant(trt.Dims(shape), weights)
    layer.name = name
    output: trt.ITensor = layer.get_output(0)
    return output


def constants_of(node: Node) -> dict[str, Tensor | None] | str:
    """The tensors of a call that belong to the layer, by name; or which of them is not constant.

    All but LAYER_INPUTS; None where the op has none.
    """
    assert isinstance(node.target, torch._ops.OpOverload)
    module = node.graph.owning_module
    constants: dict[str, Tensor | None] = {}
    for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
        if argument.name in LAYER_INPUTS or "Tensor" not in str(argument.type):
            continue
        if value is None:
            constants[argument.name] = None
        elif isinstance(value, Node) and value.op == "get_attr":
            constants[argument.name] = operator.attrgetter(str(value.target))(module)
        else:
            return (
                f"its {argument.name} is not a constant of the graph; compile with "
                'torch_tensorrt.compile(..., ir="dynamo"), where weights are'
            )
    return constants
