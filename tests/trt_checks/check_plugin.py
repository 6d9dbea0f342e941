"""The plugins: registered with TensorRT's real bindings, described, converted, called on the CPU.

No engine: TensorRT's libraries are not here. What an engine would do, calling the plugin with the
addresses of its tensors, is done by hand, up to torch's view of device memory.
"""

import ctypes
from typing import Any
from unittest import mock

import numpy as np
import pytest
import stub_tensorrt
import torch
import without_gpu
from compare import assert_bytes_equal
from lowered_models import (
    EXPERTS,
    HIDDEN,
    MODES,
    TOP_K,
    Block,
    blocks,
    hidden_states,
    linear,
    moe,
)
from torch import Tensor
from torch.export import Dim
from torch.fx import Node

trt = stub_tensorrt.import_tensorrt()
without_gpu.import_torch_tensorrt()

import tensorrt.plugin as trtp  # noqa: E402
from tensorrt.plugin._lib import QDP_REGISTRY  # noqa: E402
from tensorrt.plugin._tensor import SymIntExpr  # noqa: E402
from torch_tensorrt.dynamo.conversion import ConversionContext  # noqa: E402

from nvfp4_ops.lowering import tensorrt as lowering  # noqa: E402

lowering.register(native=False, plugin=True)

from nvfp4_ops.lowering.tensorrt import plugin  # noqa: E402
from nvfp4_ops.lowering.tensorrt.composite import LINEAR, MOE  # noqa: E402

each_mode = pytest.mark.parametrize("mode", MODES, ids=str)
TRT_DTYPES = {dtype: name for name, dtype in plugin._TORCH_DTYPES.items()}


class Expr:
    """A dimension: a number, where TensorRT has an expression."""

    def __init__(self, value: int) -> None:
        self.value = value


class ExprBuilder:
    def constant(self, value: int) -> Expr:
        return Expr(value)


@pytest.fixture(autouse=True)
def _register() -> Any:
    lowering.register(native=False, plugin=True)
    SymIntExpr._exprBuilder = ExprBuilder()
    yield
    SymIntExpr._exprBuilder = None


def test_plugins_are_registered_once() -> None:
    lowering.register(plugin=True)
    assert {"nvfp4_ops::moe", "nvfp4_ops::linear"} == set(QDP_REGISTRY)
    for definition in QDP_REGISTRY.values():
        assert definition.impl_func is not None
        assert definition.aot_impl_func is None


def expressions(desc: Any) -> list[Expr]:
    """What TensorRT is given of a shape."""
    return [size._expr for size in desc.shape_expr]


def described(op: Any, num_rows: int, columns: int, dtype: Any) -> Any:
    definition = QDP_REGISTRY[op._schema.name]
    shape = tuple(trtp.ShapeExpr(size) for size in (num_rows, HIDDEN))
    desc = trtp.from_shape_expr(shape, dtype)
    others = [desc] * (len(definition.input_tensor_names) - 1)
    options = plugin._encode({"out_features": columns})
    return definition.register_func(desc, *others, options=options)


@pytest.mark.parametrize("dtype", ["BF16", "HALF", "FLOAT"])
@pytest.mark.parametrize("num_rows", [1, 4096])
@pytest.mark.parametrize("op", [MOE, LINEAR], ids=str)
def test_plugin_describes_its_output(op: Any, num_rows: int, dtype: str) -> None:
    output = described(op, num_rows, 48, getattr(trt.DataType, dtype))
    assert output.dtype == getattr(trt.DataType, dtype)
    assert [size.value for size in expressions(output)] == [num_rows, 48]


@pytest.mark.parametrize(
    ("mode", "dynamic"), [*((mode, True) for mode in MODES), ("per_token", False)], ids=str
)
def test_plugin_keeps_a_model_in_one_engine(mode: Any, dynamic: bool) -> None:
    """But for the router, an op of this package that is no plugin."""
    shapes = ({1: Dim("tokens", max=512)},) if dynamic else None
    model = blocks(mode, own_router=False, bias=True)
    with without_gpu.pretend((9, 0)):
        split = without_gpu.partition(model, hidden_states(2, 5), dynamic_shapes=shapes)
    ((kind, names),) = without_gpu.parts_of(split)
    assert kind == "engine"
    assert names.count("nvfp4_ops.moe") == names.count("nvfp4_ops.linear") == 2


def test_plugin_leaves_linears_to_native_layers() -> None:
    from torch_tensorrt.dynamo.conversion import DYNAMO_CONVERTERS

    from nvfp4_ops.lowering.tensorrt import native

    lowering.register(native=True, plugin=True)
    converters = {}
    for capability in ((9, 0), (12, 0)):
        with without_gpu.pretend(capability):
            split = without_gpu.partition(linear("static"), hidden_states(5))
            graph = next(iter(split.children()), split).graph
            (node,) = graph.find_nodes(op="call_function", target=LINEAR)
            converters[capability] = DYNAMO_CONVERTERS[node][0]
    assert converters == {
        (9, 0): plugin.convert_to_plugin,
        (12, 0): native.convert_linear,
    }


def test_register_plugin_false_takes_plugins_back() -> None:
    lowering.register(native=False)
    with without_gpu.pretend((9, 0)):
        split = without_gpu.partition(Block(None, own_router=False), hidden_states(2, 5))
    torch_parts = [names for kind, names in without_gpu.parts_of(split) if kind == "torch"]
    assert torch_parts == [["nvfp4_ops.linear"], ["nvfp4_ops.moe"]]


# A call as an engine makes it.


def composite_call(layer: Any, *inputs: Tensor) -> Node:
    with torch.no_grad():
        graph = lowering.fuse(torch.export.export(layer, inputs).module()).graph
    (node,) = (node for node in graph.nodes if node.target in (MOE, LINEAR))
    return node


def converted(node: Node, *inputs: Tensor) -> tuple[list[Any], Any, stub_tensorrt.FakeNetwork]:
    """Plugin inputs and plugin of a call; x and the like are network inputs."""
    network = stub_tensorrt.FakeNetwork()
    context = mock.create_autospec(ConversionContext, instance=True)
    context.net, context.kept = network, []
    context.record_weight.side_effect = lambda name, tensor: context.kept.append(tensor)
    dtypes = TRT_DTYPES | {torch.int64: trt.DataType.INT64}
    given = iter(stub_tensorrt.fake_tensor(dtypes[x.dtype], tuple(x.shape)) for x in inputs)
    module = node.graph.owning_module

    def value(argument: Any) -> Any:
        if not isinstance(argument, Node):
            return argument
        return module.get_buffer(argument.target) if argument.op == "get_attr" else next(given)

    arguments = tuple(value(argument) for argument in node.args)
    plugin.convert_to_plugin(context, node.target, arguments, {}, "layer")
    ((tensors, instance),) = network.plugins
    network.kept = context.kept
    return tensors, instance, network


def enqueue(instance: Any, tensors: list[Any], network: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    """Call the plugin with addresses, as TensorRT does; memory is the CPU's."""
    constants = iter(network.kept)
    values = [x.int() if x.dtype == torch.int64 else x for x in inputs]
    memory = [*values, *(next(constants) for _ in tensors[len(values) :])]
    output = torch.full((inputs[0].shape[0], HIDDEN), torch.nan).to(inputs[0].dtype)

    def desc(dtype: Any, x: Tensor) -> Any:
        plain = trt.PluginTensorDesc()
        plain.type, plain.dims = dtype, trt.Dims(tuple(x.shape))
        plain.format, plain.scale = trt.TensorFormat.LINEAR, 1.0
        return plain

    def as_torch(tensor: Any) -> Tensor:
        dtype = plugin._TORCH_DTYPES[tensor.dtype]
        shape = torch.Size(tensor.shape)
        raw = (ctypes.c_uint8 * (shape.numel() * dtype.itemsize)).from_address(tensor.data_ptr)
        return torch.frombuffer(raw, dtype=torch.uint8).view(dtype).view(shape)

    with (
        mock.patch.object(plugin, "as_torch", as_torch),
        mock.patch("torch.cuda.ExternalStream"),
        mock.patch("torch.cuda.stream"),
    ):
        instance.enqueue(
            [desc(t.dtype, x) for t, x in zip(tensors, memory, strict=True)],
            [desc(TRT_DTYPES[output.dtype], output)],
            [x.data_ptr() for x in memory],
            [output.data_ptr()],
            [x.stride() for x in memory],
            [output.stride()],
            7,
        )
    return output


def layer_and_inputs(what: str, mode: Any, bias: bool) -> tuple[Any, tuple[Tensor, ...]]:
    x = hidden_states(9)
    if what == "linear":
        return linear(mode, bias=bias), (x,)
    index = torch.randint(EXPERTS, (9, TOP_K))
    layer = moe(mode, bias=bias)
    if what == "prepacked":
        for projection in layer.projections().values():
            projection.weight = projection._prepacked(projection.weight, projection.weight_scale)
            projection.weight_scale = None
    return layer, (x, index, torch.rand(9, TOP_K))


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("what", ["moe", "prepacked", "linear"])
@each_mode
def test_plugin_called_with_addresses_computes_the_bits_of_eager(
    mode: Any, what: str, bias: bool
) -> None:
    layer, inputs = layer_and_inputs(what, mode, bias)
    tensors, instance, network = converted(composite_call(layer, *inputs), *inputs)
    assert_bytes_equal(enqueue(instance, tensors, network, inputs), layer(*inputs))
    # Again, from what an engine keeps of the plugin.
    fields = instance.get_fields_to_serialize()
    # TensorRT reads the fields by address after the call that made them.
    garbage = [bytes(200) for _ in range(1000)]
    creator = trt.get_plugin_registry().get_creator(
        instance.plugin_name, instance.plugin_version, instance.plugin_namespace
    )
    again = creator.create_plugin(
        instance.plugin_name, instance.plugin_namespace, fields, trt.TensorRTPhase.RUNTIME
    )
    del garbage
    assert_bytes_equal(enqueue(again, tensors, network, inputs), layer(*inputs))


def test_plugin_inputs_are_what_plugins_may_take() -> None:
    """No uint8, no FP8; indices as int32."""
    layer, inputs = layer_and_inputs("moe", "static", True)
    tensors, _, network = converted(composite_call(layer, *inputs), *inputs)
    names = [str(tensor.dtype).removeprefix("DataType.") for tensor in tensors]
    assert names == [
        *("BF16", "INT32", "FLOAT"),
        *("INT8", "INT8", "FLOAT", "FLOAT", "BF16"),
        *("INT8", "INT8", "FLOAT", "FLOAT", "BF16"),
    ]
    assert [dtype for _, dtype in network.casts] == [trt.DataType.INT32]


def test_plugin_refuses_weights_that_are_inputs() -> None:
    class Weightless(torch.nn.Module):
        def forward(self, x: Tensor, *tensors: Tensor) -> Tensor:
            weight, weight_scale, alpha = tensors
            return LINEAR(x, weight, weight_scale, alpha, None, None, None, None)

    projection = linear(None).projection
    tensors = (projection.weight, projection.weight_scale, projection.weight_scale_2)
    graph = torch.export.export(Weightless(), (hidden_states(3), *tensors)).module().graph
    (node,) = graph.find_nodes(op="call_function", target=LINEAR)
    assert "its weight is not a constant of the graph" in plugin.why_no_plugin(node)


def test_options_survive_as_an_array_of_bytes() -> None:
    options = {"values": {"limit": 0.5, "activation": None}, "absent": ["bias"]}
    encoded = plugin._encode(options)
    assert encoded.dtype == np.int8
    assert plugin._decode(encoded) == options
