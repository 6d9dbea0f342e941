"""quantize_per_token_nvfp4: rows and the global scale of each, in one pass over memory."""

from torch import Tensor

from nvfp4_ops import activation as activations
from nvfp4_ops import kernels, reference
from nvfp4_ops.activation import Activation
from nvfp4_ops.ops.activate import check_activated, empty_activated
from nvfp4_ops.ops.quantize import empty_scale, global_scale, quantize_nvfp4
from nvfp4_ops.ops.swizzle import swizzle_sf
from nvfp4_ops.plans import Run
from nvfp4_ops.registry import check_value, register


def _check(x: Tensor, offs: Tensor | None, activation: str, limit: float | None) -> Activation:
    act = check_activated(x, offs, activation, limit)
    check_value(x.shape[1] > 0, lambda: "x: K must be positive, got 0")
    return act


def _fake(
    x: Tensor,
    offs: Tensor | None = None,
    activation: str = "none",
    limit: float | None = None,
    swizzled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    act = _check(x, offs, activation, limit)
    return *empty_activated(x, offs, act, swizzled), empty_scale(x, per_token=True)


def _plan(
    x: Tensor,
    offs: Tensor | None = None,
    activation: str = "none",
    limit: float | None = None,
    swizzled: bool = False,
) -> Run | None:
    act = _check(x, offs, activation, limit)
    if not kernels.has_elementwise(x, offs):
        return None
    k = x.shape[1] // 2 if act.gated else x.shape[1]
    launch = kernels.prepare_quantize_per_token(x, offs, k=k, activation=act.name, limit=act.limit)

    def run(x: Tensor, offs: Tensor | None = None, *_: object) -> tuple[Tensor, Tensor, Tensor]:
        if launch is None:
            codes, block_scale, row_scale = _in_several_passes(x, offs, act)
        else:
            codes, block_scale = empty_activated(x, offs, act, False)
            row_scale = empty_scale(x, per_token=True)
            launch(x, offs, codes, block_scale, row_scale)
        return codes, swizzle_sf(block_scale, offs) if swizzled else block_scale, row_scale

    return run


def _in_several_passes(
    x: Tensor, offs: Tensor | None, act: Activation
) -> tuple[Tensor, Tensor, Tensor]:
    """For rows that are too long for the kernel."""
    y = x if act.name == "none" else activations.apply(act, x.float()).to(x.dtype)
    row_scale = reference.one_past_the_end(global_scale(y, per_token=True), offs)
    return *quantize_nvfp4(y, row_scale, offs), row_scale


def _reference(
    x: Tensor,
    offs: Tensor | None = None,
    activation: str = "none",
    limit: float | None = None,
    swizzled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.quantize_per_token_nvfp4(x, Activation(activation, limit), offs, swizzled)


_op = register(
    'quantize_per_token_nvfp4(Tensor x, Tensor? offs=None, str activation="none",'
    " float? limit=None, bool swizzled=False) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    kernel=_reference,
    plan=_plan,
)


def quantize_per_token_nvfp4(
    x: Tensor,
    offs: Tensor | None = None,
    *,
    activation: Activation | str | None = None,
    swizzled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize rows to NVFP4 with a dynamic global scale of each row.

    With y = act(x.float()).to(x.dtype), bit for bit up to the activation's exponentials (see
    ``activate_and_quantize_nvfp4``):

        row_scale = global_scale(y, per_token=True)
        codes, block_scale = quantize_nvfp4(y, row_scale, offs, swizzled=swizzled)

    A GPU reads x once where a row fits the registers of eight warps: K up to 16384 in bf16 or
    fp16, and in fp32 without an up projection; else in several passes.

    Args:
        x: (R, K) bf16, fp16 or fp32, or (R, 2K) for a gated activation, the gate's K columns
            first. K a multiple of 16 and positive, R may be 0.
        offs: (E,) int32 end row of each expert. Rows from ``offs[-1]`` on belong to no expert:
            their codes and block scales are zero bytes, their row scale is 1.
        activation: an activation or its name (see ``nvfp4_ops.Activation``), or None.
        swizzled: give the block scales in the 128x4 layout of ``swizzle_sf``.

    Returns:
        codes (R, K / 2) and block_scale, as ``quantize_nvfp4``, and row_scale (R, 1) fp32.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape or the activation is not one of the above, or (on the CPU) offs is not
            non-decreasing.
    """
    act = activation if isinstance(activation, Activation) else Activation(activation or "none")
    return _op(x, offs, act.name, act.limit, swizzled)
