"""Where an op is decomposed: where its aten form is fused with a neighbour, with the same bytes.

An op that stands between other ops, or inputs, of its own kind has nothing to be fused with: its
kernel is the faster. What a decomposition does not cover (NotImplemented) keeps its kernel too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from nvfp4_ops.activation import Activation
from nvfp4_ops.lowering import decompositions as aten_form
from nvfp4_ops.lowering.graph import arguments, aten, calls, is_call, ops, prims, value

DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    ops.quantize_nvfp4.default: aten_form.quantize_nvfp4,
    ops.activate_and_quantize_nvfp4.default: aten_form.activate_and_quantize_nvfp4,
    ops.dequantize_nvfp4.default: aten_form.dequantize_nvfp4,
    ops.swizzle_sf.default: aten_form.swizzle_sf,
}

_MOVES = (
    aten.view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.slice.Tensor,
)
# Exponentials of compilers and kernels differ in the last place.
_EXACT_ACTIVATIONS = ("none", "relu2", "relu2_mul")


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Every decomposition there is: {op overload: function}, for tables of one's own.

    For ``torch.export``'s ``run_decompositions`` or AOTAutograd; with them the rewrites of
    ``patterns`` see no more ops to rewrite.
    """
    return dict(DECOMPOSITIONS)


def _is_elementwise(node: Any) -> bool:
    """Whether a compiler computes the node element by element, and so within its neighbours."""
    while is_call(node, *_MOVES):
        node = node.args[0]
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target is prims.convert_element_type.default:
        return True
    return torch.Tag.pointwise in node.target.tags


def gains_by_fusing(node: fx.Node) -> bool:
    """Whether the op has an elementwise neighbour, and fused with it would give the same bytes."""
    given = arguments(node)
    if node.target is ops.dequantize_nvfp4.default:
        # An fp32 product may be contracted with a consumer's sum; a rounded one may not.
        rounded = given["dtype"] in (torch.bfloat16, torch.float16)
        return rounded and all(_is_elementwise(user) for user in node.users)
    if node.target is ops.swizzle_sf.default:
        # Its bytes are those of another op, or of a decomposition that writes them row by row.
        return False
    if Activation(given.get("activation", "none"), given.get("limit")).name not in (
        _EXACT_ACTIVATIONS
    ):
        return False
    return _is_elementwise(given["x"])


def _trace(node: fx.Node) -> tuple[fx.GraphModule, list[fx.Node]] | None:
    """The decomposition of a call as a graph of its tensor arguments, which come second."""
    from torch._dispatch.python import enable_python_dispatcher
    from torch._inductor.decomposition import select_decomp_table

    given = arguments(node)
    names = [name for name, argument in given.items() if isinstance(argument, fx.Node)]
    nodes = [given[name] for name in names]
    supported = True

    def run(*tensors: Tensor) -> Any:
        nonlocal supported
        result = DECOMPOSITIONS[node.target](**(given | dict(zip(names, tensors, strict=True))))
        supported = result is not NotImplemented
        return result if supported else ()

    values = [value(argument) for argument in nodes]
    fake_mode: Any = values[0].fake_mode  # type: ignore[attr-defined]
    with fake_mode, enable_python_dispatcher():
        traced = make_fx(run, select_decomp_table())(*values)
    return (traced, nodes) if supported else None


def _inline(graph: fx.Graph, node: fx.Node, traced: fx.GraphModule, nodes: list[fx.Node]) -> None:
    """Replace a call by a graph of its tensor arguments."""
    placeholders = [inner for inner in traced.graph.nodes if inner.op == "placeholder"]
    with graph.inserting_before(node):
        result: Any = graph.graph_copy(traced.graph, dict(zip(placeholders, nodes, strict=True)))
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for item in list(node.users):
            item.replace_all_uses_with(result[item.args[1]])
    graph.eliminate_dead_code()


def decompose(graph: fx.Graph) -> int:
    """Decompose the calls that gain by it; returns how many."""
    count = 0
    for node in calls(graph, *DECOMPOSITIONS):
        traced = _trace(node) if gains_by_fusing(node) else None
        if traced is not None:
            _inline(graph, node, *traced)
            count += 1
    return count
