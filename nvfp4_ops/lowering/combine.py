"""Weighted sums of the experts' outputs, as models write them, become ``combine``.

With y (R, H) of grouped_scaled_mm, and offs, token_of_row, row_of_slot of one sort_by_expert:

    gathered    (y[row_of_slot] * w_TK[..., None]).sum(1)
    scattered   zeros(T, H).index_add(0, token_of_row, y * w_R[:, None]), also as index_put or
                scatter_add, where w_R is w_TK scattered to row_of_slot

y is zero past the last expert's rows, so a slot without a row, whose index is -1, adds nothing in
either; the same holds of combine. Its sums are in fp32 and in the order of the slots, so that they
are the same in every run, which those of a scatter on a GPU are not.
"""

from typing import Any, NamedTuple

from torch import fx

from nvfp4_ops.lowering.graph import (
    FLOAT_DTYPES,
    arguments,
    aten,
    calls,
    insert,
    is_call,
    ops,
    output,
    same_shape,
    strip_casts,
    strip_index_casts,
    value,
)

MM = ops.grouped_scaled_mm.default
SORT = ops.sort_by_expert.default
_RESHAPES = (aten.view.default, aten.reshape.default, aten.unsqueeze.default)
_SCATTERS = (aten.index_put.default, aten.scatter_add.default, aten.index_add.default)


class Weighted(NamedTuple):
    """What combine takes."""

    rows: fx.Node
    row_of_slot: fx.Node
    weights: fx.Node


def _strip_reshapes(node: Any) -> Any:
    """What a node was before casts and reshapes."""
    while True:
        before = node
        node = strip_casts(node, set())
        if is_call(node, *_RESHAPES):
            node = node.args[0]
        if node is before:
            return node


def _is_sorted_output(rows: Any, sort: fx.Node | None) -> bool:
    """Whether rows come from a grouped mm over this sort, and so are zero past its end."""
    return (
        sort is not None and is_call(rows, MM) and output(arguments(rows)["offs"], 0, SORT) is sort
    )


def _row_of_slot(index: Any) -> tuple[fx.Node, fx.Node] | None:
    """row_of_slot and its sort, of an index made of it."""
    node = strip_index_casts(index, clamped=False)
    sort = output(node, 2, SORT)
    return None if sort is None else (node, sort)


def _slot_weights(node: Any, row_of_slot: fx.Node) -> fx.Node | None:
    """w_TK (T, top_k) that a node is, casts and reshapes aside."""
    while not same_shape(value(node).shape, value(row_of_slot).shape):
        node = strip_casts(node, set())
        if not is_call(node, *_RESHAPES):
            return None
        node = node.args[0]
    weights: fx.Node = node
    return weights if value(weights).dtype in FLOAT_DTYPES else None


def _match_gathered(total: fx.Node) -> Weighted | None:
    given = arguments(total)
    product = strip_casts(given["self"], set())
    if given["keepdim"] or given["dim"] not in ([1], [-2]) or not is_call(product, aten.mul.Tensor):
        return None
    for picked, factor in (product.args, product.args[::-1]):
        if not isinstance(picked, fx.Node) or not isinstance(factor, fx.Node):
            continue
        index = _strip_reshapes(picked)
        if not is_call(index, aten.index.Tensor) or len(index.args[1]) != 1:
            continue
        slots = _row_of_slot(index.args[1][0])
        rows = strip_casts(index.args[0], set())
        if slots is None or not _is_sorted_output(rows, slots[1]):
            continue
        row_of_slot, _ = slots
        slot_shape = (*value(row_of_slot).shape, value(rows).shape[1])
        weights = _slot_weights(factor, row_of_slot)
        column = (*value(row_of_slot).shape, 1)
        if weights is None or not same_shape(value(factor).shape, column):
            continue
        if same_shape(value(picked).shape, slot_shape):
            return Weighted(rows, row_of_slot, weights)
    return None


def _scattered_weights(node: Any) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """w_TK, row_of_slot and the sort of w_R: w_TK scattered to row_of_slot."""
    scatter = _strip_reshapes(node)
    if is_call(scatter, aten.scatter.src):
        _, dim, index, source = scatter.args
        if dim != 0:
            return None
    elif is_call(scatter, aten.index_put.default):
        given = arguments(scatter)
        if given["accumulate"] or len(given["indices"]) != 1:
            return None
        index, source = given["indices"][0], given["values"]
    else:
        return None
    slots = _row_of_slot(index)
    if slots is None or value(scatter).ndim != 1 or value(source).ndim != 1:
        return None
    weights = _slot_weights(source, slots[0])
    return None if weights is None else (weights, *slots)


def _is_zeros(node: Any) -> bool:
    return is_call(node, aten.full.default) and node.args[1] == 0


def _match_scattered(total: fx.Node) -> Weighted | None:
    given = arguments(total)
    if total.target is aten.index_put.default:
        if not given["accumulate"] or len(given["indices"]) != 1:
            return None
        index, source = given["indices"][0], given["values"]
    elif total.target is aten.index_add.default:
        if given["dim"] != 0 or given["alpha"] != 1:
            return None
        index, source = given["index"], given["source"]
    else:
        # The index has the shape of the rows: a column that is expanded.
        index, source = given["index"], given["src"]
        if given["dim"] != 0 or not is_call(index, aten.expand.default):
            return None
        if not same_shape(value(index).shape, value(source).shape):
            return None
        index = index.args[0]
        if value(index).ndim != 2 or not same_shape(value(index).shape[1:], (1,)):
            return None
        index = index.args[0] if is_call(index, *_RESHAPES) else index
    base = given["self"]
    token_of_row = strip_index_casts(index, clamped=True)
    sort = output(token_of_row, 1, SORT)
    product = strip_casts(source, set())
    if sort is None or not _is_zeros(base) or not is_call(product, aten.mul.Tensor):
        return None
    for rows, factor in (product.args, product.args[::-1]):
        if not isinstance(rows, fx.Node) or not isinstance(factor, fx.Node):
            continue
        rows = strip_casts(rows, set())
        found = _scattered_weights(factor)
        if found is None or not _is_sorted_output(rows, sort):
            continue
        weights, row_of_slot, sort_of_weights = found
        column = (*value(token_of_row).shape, 1)
        if sort_of_weights is not sort or not same_shape(value(factor).shape, column):
            continue
        shape = (value(row_of_slot).shape[0], value(rows).shape[1])
        if same_shape(value(total).shape, shape):
            return Weighted(rows, row_of_slot, weights)
    return None


def _rounded(total: fx.Node, rows: fx.Node) -> fx.Node | None:
    """Where the sum has the dtype of the rows: itself, or the cast that is all that uses it."""
    if value(total).dtype == value(rows).dtype:
        return total
    users = list(total.users)
    if len(users) == 1 and strip_casts(users[0], set()) is not users[0]:
        return users[0] if value(users[0]).dtype == value(rows).dtype else None
    return None


def fuse_combine(graph: fx.Graph) -> int:
    """Weighted sums over the slots of each token."""
    count = 0
    for total in calls(graph, aten.sum.dim_IntList, *_SCATTERS):
        gathered = total.target is aten.sum.dim_IntList
        found = _match_gathered(total) if gathered else _match_scattered(total)
        root = None if found is None else _rounded(total, found.rows)
        if found is None or root is None:
            continue
        root.replace_all_uses_with(insert(graph, root, ops.combine.default, *found))
        count += 1
    return count
