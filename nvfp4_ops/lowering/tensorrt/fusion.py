"""Find the ops of a layer in an FX graph and make them one composite op. Needs torch alone.

The layers are found in the graph, not by module: a graph that was exported elsewhere, or whose
scales were folded to constants, fuses as well. What differs from a layer in any way, such as an
activation of one's own between the projections, is left as it is: the graph stays correct, ops of
this package stay in PyTorch and those between them go where the partitioner likes.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from nvfp4_ops.lowering.graph import arguments as arguments_of
from nvfp4_ops.lowering.graph import is_call
from nvfp4_ops.lowering.tensorrt.composite import LINEAR, MOE

_OPS = torch.ops.nvfp4_ops
_SORT = _OPS.sort_by_expert.default
_OFFS, _TOKEN_OF_ROW, _ROW_OF_SLOT = range(3)
"""Results of sort_by_expert."""


class _NoMatch(Exception):
    """The node is not the last of a layer."""


def _require(condition: bool) -> None:
    if not condition:
        raise _NoMatch


def _call(node: Any, op: torch._ops.OpOverload) -> dict[str, Any]:
    """Arguments of a call of ``op`` by name, defaults included."""
    _require(is_call(node, op))
    return arguments_of(node)


def _source(node: Any, index: int) -> Node:
    """The call whose result ``index`` this is."""
    if not isinstance(node, Node) or node.target is not operator.getitem:
        raise _NoMatch
    source, position = node.args
    if not isinstance(source, Node) or position != index:
        raise _NoMatch
    return source


def _value(node: Any) -> torch.Tensor:
    """The fake tensor that tracing found."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(value, torch.Tensor):
        raise _NoMatch
    return value


class _Rows(NamedTuple):
    """What a grouped mm multiplies: x, rounded by ``mode``; alpha without the scale of x."""

    x: Node
    mode: str | None
    input_scale: Node | None
    alpha: Node


def _read_rows(mm: dict[str, Any], offs: Any, token_of_row: Any) -> _Rows:
    """offs and token_of_row: what rounding must have been given."""
    rows, alpha, row_scale = mm["a"], mm["alpha"], mm["row_scale"]
    if row_scale is not None:
        rounding = _source(rows, 0)
        _require(_source(row_scale, 1) is rounding)
        arguments = _call(rounding, _OPS.round_per_token_nvfp4.default)
        mode, scale = "per_token", None
    elif is_call(rows, _OPS.round_nvfp4.default):
        arguments = _call(rows, _OPS.round_nvfp4.default)
        mode, scale = "static", arguments["global_scale"]
        if is_call(scale, _OPS.global_scale.default):
            measured = _call(scale, _OPS.global_scale.default)
            _require(measured["x"] is arguments["x"] and not measured["per_token"])
            mode, alpha, scale = "per_tensor", _other_factor(alpha, scale), None
    elif token_of_row is not None:
        arguments = _call(rows, _OPS.permute.default) | {"offs": None}
        mode, scale = None, None
    else:
        return _Rows(rows, None, None, alpha)
    _require(_same(arguments["offs"], offs) and _same(arguments["token_of_row"], token_of_row))
    return _Rows(arguments["x"], mode, scale, alpha)


def _other_factor(product: Any, factor: Node) -> Node:
    """w of the product w * factor."""
    arguments = _call(product, torch.ops.aten.mul.Tensor)
    factors = [arguments["self"], arguments["other"]]
    _require(factor in factors)
    factors.remove(factor)
    _require(isinstance(factors[0], Node))
    other: Node = factors[0]
    return other


def _same(node: Any, other: Any) -> bool:
    """One value: the same node, or the same result of the same call."""
    if node is other:
        return True
    if not (isinstance(node, Node) and isinstance(other, Node)):
        return False
    return node.target is other.target is operator.getitem and node.args == other.args


def _read_mm(node: Any) -> dict[str, Any]:
    """Arguments of a grouped mm of float rows."""
    mm = _call(node, _OPS.grouped_scaled_mm.default)
    _require(mm["sf_a"] is None)
    return mm


def _projection(mm: dict[str, Any], rows: _Rows) -> tuple[Any, ...]:
    return mm["b"], mm["sf_b"], rows.alpha, rows.input_scale, mm["bias"]


def _match_moe(node: Node) -> tuple[Any, ...]:
    """Arguments of the MoE whose last op ``node`` is."""
    end = _call(node, _OPS.combine.default)
    sort = _source(end["row_of_slot"], _ROW_OF_SLOT)
    plan = _call(sort, _SORT)
    down = _read_mm(end["rows"])
    offs = down["offs"]
    _require(_source(offs, _OFFS) is sort and down["activation"] == "none")
    hidden = _read_rows(down, offs, None)
    first = _read_mm(hidden.x)
    _require(_same(first["offs"], offs))
    tokens = _read_rows(first, None, _token_of_row(first, sort))
    _require(tokens.mode == hidden.mode)
    # The composite op has one dtype.
    _require(_value(tokens.x).dtype == _value(hidden.x).dtype == _value(end["rows"]).dtype)
    return (
        tokens.x,
        plan["top_k_index"],
        end["top_k_weights"],
        *_projection(first, tokens),
        *_projection(down, hidden),
        tokens.mode,
        first["activation"],
        first["limit"],
        first["num_columns"],
        down["num_columns"],
    )


def _token_of_row(mm: dict[str, Any], sort: Node) -> Node:
    """The node that holds result ``token_of_row`` of ``sort``, as the rows of ``mm`` use it."""
    rows = mm["a"] if mm["row_scale"] is None else _source(mm["a"], 0)
    for node in rows.all_input_nodes:
        if node.target is operator.getitem and node.args == (sort, _TOKEN_OF_ROW):
            return node
    raise _NoMatch


def _match_linear(node: Node) -> tuple[Any, ...]:
    """Arguments of the linear layer whose grouped mm ``node`` is."""
    mm = _read_mm(node)
    _require(mm["activation"] == "none")
    rows = _read_rows(mm, mm["offs"], None)
    x = _value(rows.x)
    _require(_ends_with(mm["offs"], x.shape[0]) and _value(node).dtype == x.dtype)
    return (rows.x, *_projection(mm, rows), rows.mode, mm["num_columns"])


def _ends_with(offs: Any, num_rows: int | torch.SymInt) -> bool:
    """Whether offs is known to be [num_rows]: all rows are of the only expert."""
    _require(isinstance(offs, Node))
    if offs.op == "get_attr":
        module = offs.graph.owning_module
        assert module is not None
        constant = operator.attrgetter(str(offs.target))(module)
        return constant.numel() == 1 and isinstance(num_rows, int) and int(constant) == num_rows
    arguments = _call(offs, torch.ops.aten.full.default)
    size = arguments["fill_value"]
    size = size.meta.get("val") if isinstance(size, Node) else size
    return arguments["size"] == [1] and size is not None and statically_known_true(size == num_rows)


def fuse(graph_module: GraphModule, settings: Any = None) -> GraphModule:
    """Replace every layer in the graph by its composite op, in place.

    Args:
        graph_module: of ``torch.export.export(...).module()`` or the like: ATen and nvfp4_ops ops
            with fake tensors in ``meta["val"]``.
        settings: not used; torch_tensorrt passes its own to every pass.

    Returns:
        graph_module. It computes the same bits.
    """
    # A MoE first: its second projection looks like a linear layer where there is one expert.
    _replace(graph_module, _OPS.combine.default, _match_moe, MOE)
    _replace(graph_module, _OPS.grouped_scaled_mm.default, _match_linear, LINEAR)
    graph_module.graph.eliminate_dead_code()
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


def _replace(
    graph_module: GraphModule,
    last_op: torch._ops.OpOverload,
    match: Callable[[Node], tuple[Any, ...]],
    composite: torch._ops.OpOverload,
) -> None:
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_function", target=last_op):
        try:
            arguments = match(node)
        except _NoMatch:
            continue
        with graph.inserting_before(node):
            fused = graph.call_function(composite, arguments)
        fused.meta = dict(node.meta)
        node.replace_all_uses_with(fused)
        graph.erase_node(node)
    graph.eliminate_dead_code()
