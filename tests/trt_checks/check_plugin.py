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
    hidden_states,
    linear,
    moe,
)
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Node

trt = stub_tensorrt.import_tensorrt()
without_gpu.import_torch_tensorrt()

import tensorrt.plugin as trtp  # noqa: E402
from tensorrt.plugin._lib import QDP_REGISTRY  # noqa: E402
from tensorrt.plugin._tensor import SymIntExpr  # noqa: E402
from torch_tensorrt.dynamo.conversion import ConversionContext  # noqa: E402

import nvfp4_ops  # noqa: E402
from nvfp4_ops.lowering import tensorrt as lowering  # noqa: E402

lowering.register(native=False, plugin=True)

from nvfp4_ops.lowering.tensorrt import plugin  # noqa: E402
from nvfp4_ops.lowering.tensorrt.composite import LINEAR, MOE  # noqa: E402

each_mode = pytest.mark.parametrize("mode", MODES, ids=str)
TRT_DTYPES = plugin._TRT_DTYPES


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
    assert {op._schema.name for op in plugin.PLUGIN_OPS} == set(QDP_REGISTRY)
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
    options = plugin._encode({"outputs": [(columns, dtype.name)]})
    return definition.register_func(desc, *others, options=options)


def test_plugin_describes_both_outputs_of_a_router() -> None:
    definition = QDP_REGISTRY["nvfp4_ops::softmax_top_k"]
    shape = tuple(trtp.ShapeExpr(size) for size in (7, EXPERTS))
    logits = trtp.from_shape_expr(shape, trt.DataType.FLOAT)
    options = plugin._encode({"outputs": [(2, "INT32"), (2, "FLOAT")]})
    index, weights = definition.register_func(logits, options=options)
    assert [index.dtype, weights.dtype] == [trt.DataType.INT32, trt.DataType.FLOAT]
    assert [size.value for size in expressions(index)] == [7, 2]


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
    shapes = ({1: Dim("tokens", max=512)},) if dynamic else None
    model = nn.Sequential(Block(mode, bias=True), Block(mode, own_router=False))
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


def plugin_call(layer: Any, *inputs: Tensor) -> Node:
    with torch.no_grad():
        graph = lowering.fuse(torch.export.export(layer, inputs).module()).graph
    (node,) = (node for node in graph.nodes if node.target in plugin.PLUGIN_OPS)
    return node


def converted(node: Node, *inputs: Tensor) -> tuple[list[Any], Any, stub_tensorrt.FakeNetwork]:
    """Plugin inputs and plugin of a call; x and the like are network inputs."""
    network = stub_tensorrt.FakeNetwork()
    context = mock.create_autospec(ConversionContext, instance=True)
    context.net, context.kept = network, []
    context.record_weight.side_effect = lambda name, tensor: context.kept.append(tensor)
    # The number of rows is not known to an engine with dynamic shapes.
    given = iter(stub_tensorrt.fake_tensor(TRT_DTYPES[x.dtype], (-1, *x.shape[1:])) for x in inputs)
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


def enqueue(
    instance: Any, tensors: list[Any], network: Any, inputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Call the plugin with addresses, as TensorRT does; memory is the CPU's."""
    constants = iter(network.kept)
    values = [x.int() if x.dtype == torch.int64 else x for x in inputs]
    memory = [*values, *(next(constants) for _ in tensors[len(values) :])]
    outputs = [
        torch.full((len(inputs[0]), columns), 99).to(
            plugin._TORCH_DTYPES[getattr(trt.DataType, dtype)]
        )
        for columns, dtype in plugin._decode(instance.attrs["options"])["outputs"]
    ]

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
            [desc(TRT_DTYPES[x.dtype], x) for x in outputs],
            [x.data_ptr() for x in memory],
            [x.data_ptr() for x in outputs],
            [x.stride() for x in memory],
            [x.stride() for x in outputs],
            7,
        )
    return tuple(outputs)


class Function(nn.Module):
    """function(inputs, buffer, options)."""

    def __init__(self, function: Any, *buffers: Tensor | None, **options: Any) -> None:
        super().__init__()
        self.function, self.options = function, options
        if buffers:
            self.register_buffer("buffer", buffers[0])

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self._buffers.values(), **self.options)


def layer_and_inputs(what: str, mode: Any, bias: bool) -> tuple[Any, tuple[Tensor, ...]]:
    x, logits = hidden_states(9), torch.randn(9, EXPERTS)
    if what == "linear":
        return linear(mode, bias=bias), (x,)
    if what == "router logits":
        weight = torch.randn(EXPERTS, HIDDEN).bfloat16()
        return Function(nvfp4_ops.router_logits, weight), (x,)
    if what == "softmax":
        return Function(nvfp4_ops.softmax_top_k, top_k=TOP_K, renormalize=bias), (logits,)
    if what == "sigmoid":
        correction = torch.randn(EXPERTS) if bias else None
        return Function(nvfp4_ops.sigmoid_top_k, correction, top_k=TOP_K), (logits,)
    index = torch.randint(EXPERTS, (9, TOP_K))
    layer = moe(mode, bias=bias)
    if what == "prepacked":
        for projection in layer.projections().values():
            projection.weight = projection._prepacked(projection.weight, projection.weight_scale)
            projection.weight_scale = None
    return layer, (x, index, torch.rand(9, TOP_K))


def assert_results_equal(got: tuple[Tensor, ...], want: Tensor | tuple[Tensor, ...]) -> None:
    for x, expected in zip(got, want if isinstance(want, tuple) else (want,), strict=True):
        assert_bytes_equal(x, expected.int() if expected.dtype == torch.int64 else expected)


ROUTERS = ("router logits", "softmax", "sigmoid")


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("what", "mode"),
    [
        *((what, mode) for what in ("moe", "linear") for mode in MODES),
        ("prepacked", "static"),
        *((router, None) for router in ROUTERS),
    ],
)
def test_plugin_called_with_addresses_computes_the_bits_of_eager(
    what: str, mode: Any, bias: bool
) -> None:
    layer, inputs = layer_and_inputs(what, mode, bias)
    tensors, instance, network = converted(plugin_call(layer, *inputs), *inputs)
    assert_results_equal(enqueue(instance, tensors, network, inputs), layer(*inputs))
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
    assert_results_equal(enqueue(again, tensors, network, inputs), layer(*inputs))


def test_plugin_inputs_are_what_plugins_may_take() -> None:
    """No uint8, no FP8; indices as int32."""
    layer, inputs = layer_and_inputs("moe", "static", True)
    tensors, _, network = converted(plugin_call(layer, *inputs), *inputs)
    names = [str(tensor.dtype).removeprefix("DataType.") for tensor in tensors]
    assert names == [
        *("BF16", "INT32", "FLOAT"),
        *("INT8", "INT8", "FLOAT", "FLOAT", "BF16"),
        *("INT8", "INT8", "FLOAT", "FLOAT", "BF16"),
    ]
    assert [dtype for _, dtype in network.casts] == [trt.DataType.INT32]


def test_plugin_refuses_weights_that_are_inputs() -> None:
    class Weightless(nn.Module):
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
