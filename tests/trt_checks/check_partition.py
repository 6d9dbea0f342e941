"""What becomes an engine and what stays in PyTorch, by torch_tensorrt's own partitioner."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import without_gpu
from lowered_models import INTERMEDIATE, MODES, Block, blocks, hidden_states
from torch.export import Dim
from torch.fx import GraphModule

without_gpu.import_torch_tensorrt()

from nvfp4_ops.lowering import tensorrt as lowering  # noqa: E402

DYNAMIC = ({1: Dim("tokens", max=512)},)
ROUTED_MOE = ["nvfp4_ops.router_logits", "nvfp4_ops.softmax_top_k", "nvfp4_ops.moe"]

each_mode = pytest.mark.parametrize("mode", MODES, ids=str)


@pytest.fixture(autouse=True)
def _default_routes() -> Iterator[None]:
    lowering.register()
    yield
    lowering.register()


def partition(model: Any, capability: tuple[int, int], **options: Any) -> GraphModule:
    with without_gpu.pretend(capability), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="NVFP4Linear stays in PyTorch")
        return without_gpu.partition(model, hidden_states(2, 5), **options)


def in_torch(split: GraphModule) -> list[list[str]]:
    """Partitions of PyTorch, between engines that have every op of attention and norms."""
    found = without_gpu.parts_of(split)
    kinds = [kind for kind, _ in found]
    assert kinds == ["engine", "torch"] * (len(kinds) // 2) + ["engine"]
    engines = [name for kind, names in found if kind == "engine" for name in names]
    assert {"aten.linear", "aten.scaled_dot_product_attention", "aten.mul.Tensor"} <= set(engines)
    return [names for kind, names in found if kind == "torch"]


def boundary(split: GraphModule) -> set[torch.dtype]:
    """Dtypes of the tensors that partitions of PyTorch take and give."""
    dtypes = set()
    for name, module in split.named_children():
        if name.startswith("_run_on_gpu_"):
            *_, output = module.graph.nodes
            inputs = module.graph.find_nodes(op="placeholder")
            values = [node.meta["val"] for node in [*inputs, *output.all_input_nodes]]
            dtypes |= {value.dtype for value in values if isinstance(value, torch.Tensor)}
    return dtypes


@pytest.mark.parametrize(
    ("mode", "dynamic_shapes"), [*((mode, DYNAMIC) for mode in MODES), ("per_token", None)], ids=str
)
def test_partition_has_one_torch_part_a_layer_with_bf16_around_it(
    mode: Any, dynamic_shapes: Any
) -> None:
    split = partition(blocks(mode, bias=True), (9, 0), dynamic_shapes=dynamic_shapes)
    assert in_torch(split) == [["nvfp4_ops.linear"], ROUTED_MOE] * 2
    assert boundary(split) == {torch.bfloat16}


@pytest.mark.parametrize("mode", [None, "static"], ids=str)
def test_partition_has_native_linears_on_blackwell(mode: Any) -> None:
    split = partition(blocks(mode), (12, 0), dynamic_shapes=DYNAMIC)
    assert in_torch(split) == [ROUTED_MOE] * 2


def test_partition_has_the_router_of_the_model_in_the_engine() -> None:
    model = blocks("per_token", 1, own_router=False, gated=False)
    assert in_torch(partition(model, (9, 0)))[1] == ["nvfp4_ops.moe"]


def test_partition_with_the_default_block_size_is_the_same() -> None:
    """Five ops, which the sum after the last layer alone is not."""
    model = torch.nn.Sequential(*blocks("per_token", 2), Block("per_token").norm)
    found = in_torch(partition(model, (9, 0), min_block_size=5))
    assert found == [["nvfp4_ops.linear"], ROUTED_MOE] * 2


def test_partition_has_an_engine_for_an_activation_of_ones_own() -> None:
    def squared(x: torch.Tensor) -> torch.Tensor:
        return x[:, :INTERMEDIATE].square()

    first, second = in_torch(partition(blocks("static", 1, activation=squared), (9, 0)))[1:]
    assert first[-1] == "nvfp4_ops.grouped_scaled_mm"
    assert second == [
        "nvfp4_ops.round_nvfp4",
        "nvfp4_ops.grouped_scaled_mm",
        "nvfp4_ops.combine",
    ]


@each_mode
def test_partition_computes_the_bits_of_eager(mode: Any) -> None:
    """Run as PyTorch: neither lowering nor partitioning may exchange a tensor.

    Without norms, which torch_tensorrt decomposes into other operations than eager's.
    """
    block = Block(mode, bias=True)
    layers = torch.nn.Sequential(block.out, torch.nn.ReLU(), block.experts)
    with without_gpu.pretend((9, 0)), torch.no_grad():
        split = without_gpu.partition(layers, hidden_states(2, 5), dynamic_shapes=DYNAMIC)
        assert [kind for kind, _ in without_gpu.parts_of(split)].count("torch") == 2
        x = hidden_states(2, 33)
        torch.testing.assert_close(split(x), layers(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("mode", "capability", "reason"),
    [
        ("static", (9, 0), "FP4 from compute capability 10.0 on, this GPU has 9.0"),
        ("per_token", (12, 0), 'activation_scale is "per_token", and TensorRT wants the global'),
        ("per_tensor", (10, 0), 'activation_scale is "per_tensor", and TensorRT wants the global'),
    ],
)
def test_partition_warns_of_linears_that_are_not_native(
    mode: Any, capability: tuple[int, int], reason: str
) -> None:
    from nvfp4_ops.lowering.tensorrt import native

    native.warn_of_torch.cache_clear()
    with without_gpu.pretend(capability), pytest.warns(UserWarning, match=reason):
        without_gpu.partition(blocks(mode, 1), hidden_states(2, 5))


def test_register_native_false_leaves_linears_to_torch_and_warns_of_nothing() -> None:
    lowering.register(native=False)
    model = blocks("static", 1)
    with without_gpu.pretend((12, 0)), warnings.catch_warnings():
        warnings.filterwarnings("error", message="NVFP4Linear stays")
        split = without_gpu.partition(model, hidden_states(2, 5))
    assert in_torch(split) == [["nvfp4_ops.linear"], ROUTED_MOE]
    lowering.register()
    assert in_torch(partition(model, (12, 0))) == [ROUTED_MOE]


def test_register_twice_adds_nothing() -> None:
    from torch_tensorrt.dynamo.conversion._ConverterRegistry import DYNAMO_ATEN_CONVERTERS
    from torch_tensorrt.dynamo.lowering.passes._aten_lowering_pass import ATEN_POST_LOWERING_PASSES

    from nvfp4_ops.lowering.tensorrt.composite import LINEAR

    for _ in range(2):
        lowering.register()
        assert len(DYNAMO_ATEN_CONVERTERS[LINEAR]) == 1
        assert ATEN_POST_LOWERING_PASSES.passes.count(lowering.fuse) == 1


def test_register_refuses_plugins_for_tensorrt_rtx() -> None:
    with pytest.raises(ImportError, match="TensorRT-RTX has no plugins; use torch-tensorrt inst"):
        lowering.register(plugin=True)


def test_torch_executed_ops_keeps_a_native_linear_in_torch() -> None:
    """The user's own way to say it."""
    chosen = {"torch.ops.nvfp4_ops.linear.default"}
    split = partition(blocks("static", 1), (12, 0), torch_executed_ops=chosen)
    assert in_torch(split) == [["nvfp4_ops.linear"], ROUTED_MOE]
