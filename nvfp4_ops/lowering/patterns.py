"""Rewrites of models that are written with the public ops: chains of them become the fused ops.

================  ==================================================================================
activation        grouped_scaled_mm -> split -> silu * up: the mm's own activation
quantized         silu * up -> quantize_nvfp4 (or per token): activate_and_quantize_nvfp4
values            quantize_nvfp4 (or per token) [-> swizzle_sf] -> grouped_scaled_mm: round_nvfp4
swizzled          quantize -> swizzle_sf: quantize with swizzled=True
gather            x[token_of_row] -> round_nvfp4, grouped_scaled_mm: token_of_row, permute
combine           weighted sum of the experts' outputs, gathered or scattered: combine
================  ==================================================================================

``values``, ``swizzled`` and ``gather`` keep every bit. The others round less often than what they
replace, or (combine) in an order of their own: their results are those of the fused op.

Each rewrite checks all that it relies on, and leaves alone what it does not know.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from nvfp4_ops.activation import Activation
from nvfp4_ops.lowering.combine import fuse_combine
from nvfp4_ops.lowering.graph import (
    FLOAT_DTYPES,
    arguments,
    aten,
    calls,
    depends_on,
    insert,
    insert_output,
    is_call,
    ops,
    output,
    outputs,
    replace_outputs,
    size,
    strip_casts,
    strip_index_casts,
    used_only_within,
    value,
)
from nvfp4_ops.ops.grouped_mm import fuses_activation
from nvfp4_ops.ops.grouped_mm_arguments import dtype_name

MM = ops.grouped_scaled_mm.default
QUANTIZE = ops.quantize_nvfp4.default
PER_TOKEN = ops.quantize_per_token_nvfp4.default
ACTIVATE = ops.activate_and_quantize_nvfp4.default
ROUND = ops.round_nvfp4.default
ROUND_PER_TOKEN = ops.round_per_token_nvfp4.default
SWIZZLE = ops.swizzle_sf.default
SORT = ops.sort_by_expert.default

SILU_MUL = Activation("silu_mul")


class Gated(NamedTuple):
    """silu(source[:, :F]) * source[:, F:]; inner: the nodes between source and the product."""

    source: fx.Node
    inner: set[fx.Node]


def _half(node: Any, index: int, inner: set[fx.Node]) -> fx.Node | None:
    """The matrix whose left (0) or right (1) half of the columns the node is."""
    if is_call(node, operator.getitem):
        split, position = node.args
        if not is_call(split, aten.split.Tensor, aten.split_with_sizes.default):
            return None
        if position != index or arguments(split)["dim"] not in (1, -1):
            return None
        found = {node, split}
        source = split.args[0]
        starts_right = len(split.meta["val"]) == 2
    elif is_call(node, aten.slice.Tensor):
        given = arguments(node)
        source, found = given["self"], {node}
        start = size(given["start"]) or 0
        middle = value(node).shape[-1]
        starts_right = given["step"] == 1 and statically_known_true(start == index * middle)
        starts_right = starts_right and given["dim"] in (1, -1)
    else:
        return None
    columns, half = value(source).shape[-1], value(node).shape[-1]
    whole = value(source).ndim == 2 and statically_known_true(2 * half == columns)
    if not (starts_right and whole):
        return None
    inner |= found
    return source


def _silu_argument(node: Any, inner: set[fx.Node]) -> Any:
    """x where the node is x * sigmoid(x), however that was decomposed, casts aside."""
    found = {node}
    if is_call(node, aten.silu.default):
        x = node.args[0]
    elif is_call(node, aten.mul.Tensor):
        x = _mul_sigmoid(node, found)
    elif is_call(node, aten.div.Tensor):
        x, denominator = node.args
        x = _over_one_plus_exp(x, denominator, found)
    else:
        return None
    if x is None:
        return None
    inner |= found
    return strip_casts(x, inner)


def _mul_sigmoid(node: fx.Node, found: set[fx.Node]) -> Any:
    for x, other in (node.args, node.args[::-1]):
        factor = strip_casts(other, found)
        if is_call(factor, aten.sigmoid.default):
            if strip_casts(factor.args[0], found) is strip_casts(x, found):
                found.add(factor)
                return x
            continue
        if not is_call(factor, aten.reciprocal.default):
            continue
        if _over_one_plus_exp(x, factor.args[0], found) is not None:
            found.add(factor)
            return x
    return None


def _over_one_plus_exp(x: Any, denominator: Any, found: set[fx.Node]) -> Any:
    """x where the denominator is 1 + exp(-x)."""
    total = strip_casts(denominator, found)
    if not is_call(total, aten.add.Tensor) or total.kwargs or total.args[1] != 1:
        return None
    power = strip_casts(total.args[0], found)
    if not is_call(power, aten.exp.default):
        return None
    negative = strip_casts(power.args[0], found)
    if not is_call(negative, aten.neg.default):
        return None
    if strip_casts(negative.args[0], found) is not strip_casts(x, found):
        return None
    found |= {total, power, negative}
    return x


def match_silu_mul(root: fx.Node) -> Gated | None:
    """The root as a gated silu of one matrix (R, 2F), the gate's columns first."""
    casts: set[fx.Node] = set()
    product = strip_casts(root, casts)
    if not is_call(product, aten.mul.Tensor):
        return None
    for gate, up in (product.args, product.args[::-1]):
        inner = {*casts, product}
        source = _half(strip_casts(up, inner), 1, inner)
        x = _silu_argument(strip_casts(gate, inner), inner)
        if source is None or x is None or _half(x, 0, inner) is not source:
            continue
        source = strip_casts(source, inner)
        if used_only_within(inner, root) and value(root).dtype in FLOAT_DTYPES:
            return Gated(source, inner)
    return None


def _outermost_product(node: fx.Node) -> fx.Node:
    """The last of the casts of a product that nothing else uses."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if strip_casts(user, set()) is user or strip_casts(user, set()) is not strip_casts(
            node, set()
        ):
            break
        node = user
    return node


def fuse_activation(graph: fx.Graph) -> int:
    """silu * up of a grouped mm whose weights take it into the epilogue."""
    count = 0
    for product in calls(graph, aten.mul.Tensor):
        root = _outermost_product(product)
        gated = match_silu_mul(root)
        if gated is None or not is_call(gated.source, MM):
            continue
        if not set(gated.source.users) <= gated.inner:
            continue
        given = arguments(gated.source)
        if given["activation"] != "none" or not fuses_activation(value(given["b"]), SILU_MUL):
            continue
        dtype = dtype_name(value(root).dtype)
        # No kernel writes fp16: not to be asked for what the model did not ask of the mm.
        if dtype == "float16" and given["out_dtype"] != dtype:
            continue
        given |= {"activation": SILU_MUL.name, "out_dtype": dtype}
        root.replace_all_uses_with(insert(graph, root, MM, *given.values()))
        graph.eliminate_dead_code()
        count += 1
    return count


def fuse_quantized(graph: fx.Graph) -> int:
    """silu * up that is quantized and used by nothing else."""
    count = 0
    for node in calls(graph, QUANTIZE, PER_TOKEN):
        given = arguments(node)
        x = given["x"]
        gated = match_silu_mul(x)
        if gated is None or given.get("activation", "none") != "none" or len(x.users) != 1:
            continue
        if value(gated.source).dtype != value(x).dtype:
            continue
        act = (SILU_MUL.name, SILU_MUL.limit, given["swizzled"])
        if node.target is QUANTIZE:
            args = (gated.source, given["global_scale"], given["offs"], *act)
            new = insert(graph, node, ACTIVATE, *args)
        else:
            new = insert(graph, node, PER_TOKEN, gated.source, given["offs"], *act)
        replace_outputs(graph, node, new)
        count += 1
    return count


def _multiplied_by(node: fx.Node) -> list[fx.Node] | None:
    """The grouped mms that are all that codes and scales of a quantizing call go to."""
    codes, scales = outputs(node, 0), outputs(node, 1)
    swizzles = [user for sf in scales for user in sf.users if is_call(user, SWIZZLE)]
    quantize_offs = arguments(node)["offs"]
    mms = {user for code in codes for user in code.users}
    for mm in mms:
        if not is_call(mm, MM):
            return None
        given = arguments(mm)
        swizzled = arguments(node)["swizzled"]
        if given["sf_a"] in swizzles:
            swizzled_by = arguments(given["sf_a"])["offs"]
        else:
            swizzled_by = quantize_offs if swizzled else given["offs"]
        # Scales of another layout than the mm's are an error of the model: leave it to the op.
        if given["a"] not in codes or swizzled_by is not given["offs"]:
            return None
        if given["sf_a"] not in [*scales, *swizzles]:
            return None
    users = {user for sf in [*scales, *swizzles] for user in sf.users}
    return list(mms) if mms and users <= mms | set(swizzles) else None


def fuse_values(graph: fx.Graph) -> int:
    """Codes that are only multiplied: every grouped mm multiplies their values, in bf16."""
    count = 0
    for node in calls(graph, QUANTIZE, PER_TOKEN):
        given = arguments(node)
        if given.get("activation", "none") != "none":
            continue
        mms = _multiplied_by(node)
        if mms is None:
            continue
        if node.target is QUANTIZE:
            rows = insert(graph, node, ROUND, given["x"], given["global_scale"], given["offs"])
        else:
            new = insert(graph, node, ROUND_PER_TOKEN, given["x"], given["offs"])
            rows = insert_output(graph, node, new, 0)
            for scale in outputs(node, 2):
                scale.replace_all_uses_with(insert_output(graph, scale, new, 1))
        for mm in mms:
            changed = arguments(mm) | {"a": rows, "sf_a": None}
            # What decoded the codes waited for offs, as early weights ask; rows may come before.
            changed["early_weights"] &= depends_on(rows, changed["offs"])
            mm.replace_all_uses_with(insert(graph, mm, MM, *changed.values()))
        graph.eliminate_dead_code()
        count += 1
    return count


def fuse_swizzled(graph: fx.Graph) -> int:
    """Scales that are swizzled and used by nothing else."""
    count = 0
    for swizzle in calls(graph, SWIZZLE):
        sf, offs = arguments(swizzle).values()
        node = output(sf, 1, QUANTIZE, PER_TOKEN, ACTIVATE)
        if node is None:
            continue
        given = arguments(node)
        scales = outputs(node, 1)
        if given["swizzled"] or given["offs"] is not offs or len(scales) != 1:
            continue
        if list(sf.users) != [swizzle]:
            continue
        new = insert(graph, node, node.target, *(given | {"swizzled": True}).values())
        swizzle.replace_all_uses_with(insert_output(graph, swizzle, new, 1))
        graph.erase_node(swizzle)
        graph.erase_node(sf)
        replace_outputs(graph, node, new)
        count += 1
    return count


class Gather(NamedTuple):
    """Rows of x (T, K), one for each of token_of_row; zeros: -1 gives a row of zeros."""

    x: fx.Node
    token_of_row: fx.Node
    sort: fx.Node
    zeros: bool


def _match_gather(node: Any) -> Gather | None:
    if is_call(node, ops.permute.default):
        x, index = node.args
    elif is_call(node, aten.index.Tensor) and len(node.args[1]) == 1:
        x, index = node.args[0], strip_index_casts(node.args[1][0], clamped=True)
    elif is_call(node, aten.index_select.default) and node.args[1] == 0:
        x, index = node.args[0], strip_index_casts(node.args[2], clamped=True)
    else:
        return None
    sort = output(index, 1, SORT)
    if sort is None or value(x).ndim != 2 or value(node).ndim != 2:
        return None
    return Gather(x, index, sort, is_call(node, ops.permute.default))


def _ignores_rows_past_end(node: fx.Node, sort: fx.Node) -> bool:
    """Whether the results of a call depend on no row of its x or a that is of no expert."""
    return output(arguments(node).get("offs"), 0, SORT) is sort


def fuse_gather(graph: fx.Graph) -> int:
    """Rows of tokens that are rounded, or multiplied as they are."""
    count = 0
    for node in calls(graph, ROUND, ROUND_PER_TOKEN):
        given = arguments(node)
        gather = _match_gather(given["x"])
        if gather is None or given["token_of_row"] is not None:
            continue
        results = [node] if node.target is ROUND else list(node.users)
        # x[-1] is the last token's row, not zeros: then something has to drop it.
        unread = _ignores_rows_past_end(node, gather.sort) or all(
            is_call(user, MM) and _ignores_rows_past_end(user, gather.sort)
            for result in results
            for user in result.users
        )
        if not (gather.zeros or unread):
            continue
        given |= {"x": gather.x, "token_of_row": gather.token_of_row}
        new = insert(graph, node, node.target, *given.values())
        if node.target is ROUND:
            node.replace_all_uses_with(new)
        else:
            replace_outputs(graph, node, new)
        count += 1
    for node in calls(graph, aten.index.Tensor, aten.index_select.default):
        gather = _match_gather(node)
        if gather is None:
            continue
        if all(
            is_call(user, MM)
            and arguments(user)["a"] is node
            and _ignores_rows_past_end(user, gather.sort)
            for user in node.users
        ):
            permuted = insert(graph, node, ops.permute.default, gather.x, gather.token_of_row)
            node.replace_all_uses_with(permuted)
            count += 1
    return count


REWRITES: dict[str, Callable[[fx.Graph], int]] = {
    "activation": fuse_activation,
    "quantized": fuse_quantized,
    "values": fuse_values,
    "swizzled": fuse_swizzled,
    "gather": fuse_gather,
    "combine": fuse_combine,
}
"""In this order: a rewrite makes what later ones look for."""
