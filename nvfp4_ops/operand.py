"""How activations are quantized on their way into a projection: the modes of ``activation_scale``.

For NVFP4MoE and NVFP4Linear. Not for weights.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from nvfp4_ops.ops import global_scale, round_nvfp4, round_per_token_nvfp4
from nvfp4_ops.plans import step
from nvfp4_ops.projection import ExpertProjection
from nvfp4_ops.routing import permute

ActivationScale = Literal["static", "per_token", "per_tensor"]
ACTIVATION_SCALES: tuple[str, ...] = get_args(ActivationScale)


def check_activation_scale(mode: ActivationScale | None) -> ActivationScale | None:
    """The mode, if it is one."""
    if mode is not None and mode not in ACTIVATION_SCALES:
        raise ValueError(
            f"activation_scale: must be None or one of {ACTIVATION_SCALES}, got {mode!r}"
        )
    return mode


class Operand(NamedTuple):
    """Rows as a projection multiplies them, and the global scales of the products.

    rows: (R, K). alpha: as ``weight_scale_2``, which it includes. row_scale: (R, 1) or None.
    """

    rows: Tensor
    alpha: Tensor
    row_scale: Tensor | None = None


def make_operand(
    projection: ExpertProjection,
    x: Tensor,
    mode: ActivationScale | None,
    offs_E: Tensor | None = None,
    token_of_row_R: Tensor | None = None,
) -> Operand:
    """What ``projection`` multiplies: x (R, K), or the tokens x (T, K) of the routed rows.

    The one place that decides in which form rows are quantized. Every grouped mm multiplies e2m1 *
    block scale, so rows are rounded to these values; codes, which tensor cores with FP4 would take,
    are never made.
    """
    if mode is None:
        rows = x if token_of_row_R is None else permute(x, token_of_row_R)
        return Operand(rows, projection.weight_scale_2)
    if mode == "per_token":
        rows, row_scale = round_per_token_nvfp4(x, offs_E, token_of_row=token_of_row_R)
        return Operand(rows, projection.weight_scale_2, row_scale)
    if mode == "static":
        scale, alpha = projection.static_scale, projection.static_alpha
        assert scale is not None
        assert alpha is not None
    else:
        scale = global_scale(x)
        alpha = step(torch.mul, projection.weight_scale_2, scale)
    return Operand(round_nvfp4(x, scale, offs_E, token_of_row=token_of_row_R), alpha)
