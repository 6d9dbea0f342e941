"""A whole layer as one op, nvfp4_ops::moe and nvfp4_ops::linear: all that TensorRT sees of it.

An op computes what the module computes, by the same ops in the same order, so it returns the same
bits. Nobody calls these by hand: ``fuse`` puts them into graphs. Schemas have the tensors first,
then the plain values; a projection is five tensors, in the order of ``Projection``.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nvfp4_ops.activation import Activation
from nvfp4_ops.ops import global_scale, grouped_scaled_mm, round_nvfp4, round_per_token_nvfp4
from nvfp4_ops.routing import combine, permute, sort_by_expert

_LIBRARY = torch.library.Library("nvfp4_ops", "FRAGMENT")
_NO_ACTIVATION = Activation()
_DOWN_WEIGHT = 6
"""Behind x and top_k_index: after top_k_weights and the five tensors of the first projection."""


class Projection(NamedTuple):
    """The weight of some experts; the names are those of ExpertProjection's buffers.

    weight: (E, N, K/2) codes, or prepacked. weight_scale: (E, N, K/16), or None where prepacked.
    alpha: ``weight_scale_2``, or with static scales ``static_alpha``. input_scale: the static
    global scale rows are rounded with, or None. bias: (E, N) or None. num_columns: N where
    prepacked, else None.
    """

    weight: Tensor
    weight_scale: Tensor | None
    alpha: Tensor
    input_scale: Tensor | None
    bias: Tensor | None
    num_columns: int | None


def _round_and_multiply(
    x: Tensor,
    projection: Projection,
    mode: str | None,
    offs: Tensor,
    activation: Activation,
    token_of_row: Tensor | None = None,
    early_weights: bool = False,
) -> Tensor:
    """Rows x (R, K), or the tokens x (T, K) of the routed rows, times each one's expert."""
    alpha, row_scale = projection.alpha, None
    # Routed rows that are of no expert have no token; others may hold anything.
    ends = offs if token_of_row is None else None
    if mode is None:
        rows = x if token_of_row is None else permute(x, token_of_row)
    elif mode == "per_token":
        rows, row_scale = round_per_token_nvfp4(x, ends, token_of_row=token_of_row)
    else:
        scale = projection.input_scale
        if scale is None:
            scale = global_scale(x)
            alpha = alpha * scale
        rows = round_nvfp4(x, scale, ends, token_of_row=token_of_row)
    return grouped_scaled_mm(
        rows,
        projection.weight,
        None,
        projection.weight_scale,
        alpha,
        offs,
        row_scale=row_scale,
        bias=projection.bias,
        activation=activation,
        out_dtype=x.dtype,
        num_columns=projection.num_columns,
        early_weights=early_weights,
    )


def _moe(  # noqa: PLR0913 - two projections have this many tensors
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    first_weight: Tensor,
    first_weight_scale: Tensor | None,
    first_alpha: Tensor,
    first_input_scale: Tensor | None,
    first_bias: Tensor | None,
    down_weight: Tensor,
    down_weight_scale: Tensor | None,
    down_alpha: Tensor,
    down_input_scale: Tensor | None,
    down_bias: Tensor | None,
    activation_scale: str | None,
    activation: str,
    limit: float | None,
    first_num_columns: int | None,
    down_num_columns: int | None,
) -> Tensor:
    first = Projection(
        first_weight,
        first_weight_scale,
        first_alpha,
        first_input_scale,
        first_bias,
        first_num_columns,
    )
    down = Projection(
        down_weight, down_weight_scale, down_alpha, down_input_scale, down_bias, down_num_columns
    )
    # The first dimension of weights is E in every layout.
    offs, token_of_row, row_of_slot = sort_by_expert(top_k_index, first_weight.shape[0])
    act = Activation(activation, limit)
    hidden = _round_and_multiply(
        x, first, activation_scale, offs, act, token_of_row, early_weights=True
    )
    rows = _round_and_multiply(
        hidden, down, activation_scale, offs, _NO_ACTIVATION, early_weights=True
    )
    return combine(rows, row_of_slot, top_k_weights)


def _linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    alpha: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    activation_scale: str | None,
    num_columns: int | None,
) -> Tensor:
    projection = Projection(weight, weight_scale, alpha, input_scale, bias, num_columns)
    offs = torch.full((1,), x.shape[0], dtype=torch.int32, device=x.device)
    return _round_and_multiply(x, projection, activation_scale, offs, _NO_ACTIVATION)


def _num_columns(weight: Tensor, num_columns: int | None) -> int:
    return weight.shape[1] if num_columns is None else num_columns


def _fake_moe(x: Tensor, top_k_index: Tensor, *arguments: Any) -> Tensor:
    # Experts need not return to the size of x.
    columns = _num_columns(arguments[_DOWN_WEIGHT], arguments[-1])
    return x.new_empty((top_k_index.shape[0], columns))


def _fake_linear(x: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty((x.shape[0], _num_columns(weight, arguments[-1])))


def _backward(*_: object) -> None:
    raise NotImplementedError("nvfp4_ops layers are for inference and have no backward")


_PROJECTION = (
    "Tensor {0}weight, Tensor? {0}weight_scale, Tensor {0}alpha, Tensor? {0}input_scale,"
    " Tensor? {0}bias"
)
_SCHEMAS = {
    "moe": "moe(Tensor x, Tensor top_k_index, Tensor top_k_weights, "
    + _PROJECTION.format("first_")
    + ", "
    + _PROJECTION.format("down_")
    + ", str? activation_scale, str activation, float? limit, int? first_num_columns,"
    " int? down_num_columns) -> Tensor",
    "linear": "linear(Tensor x, "
    + _PROJECTION.format("")
    + ", str? activation_scale, int? num_columns) -> Tensor",
}

for _name, _kernel, _fake in (("moe", _moe, _fake_moe), ("linear", _linear, _fake_linear)):
    _LIBRARY.define(_SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nvfp4_ops::{_name}", _fake, lib=_LIBRARY)
    torch.library.register_autograd(f"nvfp4_ops::{_name}", _backward, lib=_LIBRARY)

MOE = torch.ops.nvfp4_ops.moe.default
LINEAR = torch.ops.nvfp4_ops.linear.default
