"""activate_and_quantize_nvfp4: what lies between the two projections, in one pass."""

from torch import Tensor

from nvfp4_ops import format as nvfp4
from nvfp4_ops import reference
from nvfp4_ops.activation import Activation
from nvfp4_ops.ops.quantize import (
    FLOAT_DTYPES,
    check_row_scale,
    empty_quantized,
    plan_quantize,
    quantized_shapes,
)
from nvfp4_ops.plans import Run
from nvfp4_ops.registry import (
    check_dtype,
    check_multiple,
    check_offs,
    check_rank,
    check_same_device,
    register,
)


def check_activated(
    x: Tensor, offs: Tensor | None, activation: str, limit: float | None
) -> Activation:
    act = Activation(activation, limit)
    check_rank("x", x, 2, "(R, 2K)" if act.gated else "(R, K)")
    check_dtype("x", x, *FLOAT_DTYPES)
    if act.gated:
        check_multiple("x", "2K, gate and up columns,", x.shape[1], 2 * nvfp4.BLOCK_SIZE)
    else:
        check_multiple("x", "K", x.shape[1], nvfp4.BLOCK_SIZE)
    if offs is not None:
        check_offs(offs, x.shape[0])
    check_same_device("offs", offs, x.device)
    return act


def empty_activated(
    x: Tensor, offs: Tensor | None, act: Activation, swizzled: bool
) -> tuple[Tensor, Tensor]:
    """Codes and block scales of the activated rows of x."""
    k = x.shape[1] // 2 if act.gated else x.shape[1]
    return empty_quantized(x, *quantized_shapes(x.shape[0], k, offs, swizzled))


def _check(
    x: Tensor, global_scale: Tensor, offs: Tensor | None, activation: str, limit: float | None
) -> Activation:
    act = check_activated(x, offs, activation, limit)
    check_row_scale("global_scale", global_scale, offs, x.shape[0])
    check_same_device("global_scale", global_scale, x.device)
    return act


def _fake(
    x: Tensor,
    global_scale: Tensor,
    offs: Tensor | None,
    activation: str,
    limit: float | None = None,
    swizzled: bool = False,
) -> tuple[Tensor, Tensor]:
    act = _check(x, global_scale, offs, activation, limit)
    return empty_activated(x, offs, act, swizzled)


def _plan(
    x: Tensor,
    global_scale: Tensor,
    offs: Tensor | None,
    activation: str,
    limit: float | None = None,
    swizzled: bool = False,
) -> Run | None:
    act = _check(x, global_scale, offs, activation, limit)
    return plan_quantize(x, global_scale, offs, act, swizzled)


def _reference(
    x: Tensor,
    global_scale: Tensor,
    offs: Tensor | None,
    activation: str,
    limit: float | None = None,
    swizzled: bool = False,
) -> tuple[Tensor, Tensor]:
    act = Activation(activation, limit)
    return reference.activate_and_quantize_nvfp4(x, global_scale, act, offs, swizzled)


_op = register(
    "activate_and_quantize_nvfp4(Tensor x, Tensor global_scale, Tensor? offs, str activation,"
    " float? limit=None, bool swizzled=False) -> (Tensor, Tensor)",
    fake=_fake,
    kernel=_reference,
    plan=_plan,
)


def activate_and_quantize_nvfp4(
    x: Tensor,
    global_scale: Tensor,
    offs: Tensor | None = None,
    *,
    activation: Activation | str,
    swizzled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Apply an activation to rows and quantize the result to NVFP4, in one pass over memory.

    The activation is computed in fp32 and rounded to the dtype of x; what follows is
    ``quantize_nvfp4``, bit for bit:

        quantize_nvfp4(act(x.float()).to(x.dtype), global_scale, offs, swizzled=swizzled)

    Exponentials differ by a few units in the last place of fp32 between devices, so an activated
    value may round to a neighbour now and then. Activations without one (none, relu2, relu2_mul)
    give the same bytes everywhere.

    Args:
        x: (R, 2K) bf16, fp16 or fp32 for a gated activation, the gate's K columns first; else
            (R, K). K a multiple of 16, R may be 0.
        global_scale: as ``quantize_nvfp4``'s: of the activated rows.
        offs: (E,) int32 end row of each expert. Rows from ``offs[-1]`` on are not read.
        activation: an activation or its name (see ``nvfp4_ops.Activation``).
        swizzled: write the block scales in the 128x4 layout of ``swizzle_sf``.

    Returns:
        codes (R, K / 2) and block_scale, as ``quantize_nvfp4``.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape or the activation is not one of the above, or (on the CPU) offs is not
            non-decreasing.
    """
    act = activation if isinstance(activation, Activation) else Activation(activation)
    return _op(x, global_scale, offs, act.name, act.limit, swizzled)
