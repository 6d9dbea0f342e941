"""FX graphs after autograd, as passes of Inductor see them: look at nodes, insert and replace them.

Values are aten nodes whose ``meta["val"]`` is a fake tensor; sizes may be symbolic.
"""

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten, prims, ops = torch.ops.aten, torch.ops.prims, torch.ops.nvfp4_ops

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def is_call(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def calls(graph: fx.Graph, *targets: Any) -> Iterator[fx.Node]:
    """Calls of the targets that something uses, safe to iterate while the graph changes."""
    for node in list(graph.nodes):
        if is_call(node, *targets) and node.users:
            yield node


def value(node: fx.Node) -> Tensor:
    """Fake tensor of a node."""
    val: Tensor = node.meta["val"]
    return val


def size(number: Any) -> Any:
    """An integer argument of a call, which is a node where it is symbolic."""
    return number.meta["val"] if isinstance(number, fx.Node) else number


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of a call by name, in the order of the schema, defaults included."""
    target: Any = node.target
    names = target._schema.arguments
    given = dict(zip((argument.name for argument in names), node.args, strict=False))
    given.update(node.kwargs)
    return {argument.name: given.get(argument.name, argument.default_value) for argument in names}


def output(node: Any, index: int, *targets: Any) -> fx.Node | None:
    """The call of a target whose output ``index`` the node is."""
    if (
        is_call(node, operator.getitem)
        and node.args[1] == index
        and is_call(node.args[0], *targets)
    ):
        origin: fx.Node = node.args[0]
        return origin
    return None


def outputs(node: fx.Node, index: int) -> list[fx.Node]:
    """The nodes that are output ``index`` of a call."""
    return [user for user in node.users if user.args[1] == index]


def strip_casts(node: Any, seen: set[fx.Node]) -> Any:
    """What a float node was before casts between float dtypes; they are added to ``seen``."""
    while is_call(node, prims.convert_element_type.default, aten._to_copy.default):
        source = node.args[0]
        if value(node).dtype not in FLOAT_DTYPES or value(source).dtype not in FLOAT_DTYPES:
            break
        seen.add(node)
        node = source
    return node


def strip_index_casts(node: Any, *, clamped: bool) -> Any:
    """What an integer node was before casts and reshapes and, if ``clamped``, a clamp to 0."""
    while True:
        if is_call(node, prims.convert_element_type.default, aten._to_copy.default):
            if value(node).dtype not in (torch.int32, torch.int64):
                return node
        elif is_call(node, aten.clamp_min.default, aten.clamp.default):
            if not clamped or node.args[1:] not in ((0,), (0, None)):
                return node
        elif not is_call(node, aten.view.default, aten.reshape.default):
            return node
        node = node.args[0]


def same_shape(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether two shapes are the same whatever their symbols are."""
    return len(left) == len(right) and all(
        statically_known_true(a == b) for a, b in zip(left, right, strict=True)
    )


def used_only_within(nodes: set[fx.Node], root: fx.Node) -> bool:
    """Whether nothing but the nodes and the root, which replaces them, uses the nodes."""
    inner = nodes - {root}
    return all(user is root or user in inner for node in inner for user in node.users)


def depends_on(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node is computed from another, or from outputs of the call that made it."""
    if source.op != "call_function":
        return True  # what a graph is given is there before all that it computes
    origin = source.args[0] if source.target is operator.getitem else source
    seen: set[fx.Node] = set()
    left = [node]
    while left:
        each = left.pop()
        if each is origin:
            return True
        if each not in seen:
            seen.add(each)
            left += each.all_input_nodes
    return False


def insert(graph: fx.Graph, before: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A call before a node, with its fake value."""
    with graph.inserting_before(before):
        node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.map_arg(args, value))
    if "stack_trace" in before.meta:
        node.meta["stack_trace"] = before.meta["stack_trace"]
    return node


def insert_output(graph: fx.Graph, before: fx.Node, node: fx.Node, index: int) -> fx.Node:
    with graph.inserting_before(before):
        item = graph.call_function(operator.getitem, (node, index))
    item.meta["val"] = node.meta["val"][index]
    return item


def replace_outputs(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    """Use the outputs of the call ``new`` instead of those of ``old``, which has the same."""
    for item in list(old.users):
        index = item.args[1]
        assert isinstance(index, int)
        item.replace_all_uses_with(insert_output(graph, item, new, index))
