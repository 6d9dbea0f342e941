"""round_nvfp4 and round_per_token_nvfp4: rows to the nearest NVFP4 values, kept in bf16.

For tensor cores without FP4: a product e2m1 * e4m3 is exact in bf16, so a grouped mm of the rounded
rows sums the very products that one of codes and block scales sums, and nothing has to be decoded.
Global scales stay apart: they go into ``alpha`` or ``row_scale``.
"""

import torch
from torch import Tensor

from nvfp4_ops import format as nvfp4
from nvfp4_ops import kernels, reference
from nvfp4_ops.ops.quantize import FLOAT_DTYPES, check_row_scale, global_scale
from nvfp4_ops.plans import Run
from nvfp4_ops.registry import (
    check_dtype,
    check_indices,
    check_multiple,
    check_offs,
    check_rank,
    check_same_device,
    check_value,
    register,
)


def _check(x: Tensor, offs: Tensor | None, token_of_row: Tensor | None) -> None:
    check_rank("x", x, 2, "(R, K)" if token_of_row is None else "(T, K)")
    check_dtype("x", x, *FLOAT_DTYPES)
    check_multiple("x", "K", x.shape[1], nvfp4.BLOCK_SIZE)
    if token_of_row is not None:
        check_rank("token_of_row", token_of_row, 1, "(R,)")
        check_dtype("token_of_row", token_of_row, torch.int32)
        check_same_device("token_of_row", token_of_row, x.device)
    if offs is not None:
        check_offs(offs, _num_rows(x, token_of_row))
        check_same_device("offs", offs, x.device)


def _check_scaled(
    x: Tensor, global_scale: Tensor, offs: Tensor | None, token_of_row: Tensor | None
) -> None:
    _check(x, offs, token_of_row)
    check_row_scale("global_scale", global_scale, offs, _num_rows(x, token_of_row))
    check_same_device("global_scale", global_scale, x.device)


def _check_per_token(x: Tensor, offs: Tensor | None, token_of_row: Tensor | None) -> None:
    _check(x, offs, token_of_row)
    check_value(x.shape[1] > 0, lambda: "x: K must be positive, got 0")


def _num_rows(x: Tensor, token_of_row: Tensor | None) -> int:
    return x.shape[0] if token_of_row is None else token_of_row.shape[0]


def _empty(x: Tensor, token_of_row: Tensor | None) -> Tensor:
    return x.new_empty(_num_rows(x, token_of_row), x.shape[1], dtype=torch.bfloat16)


def _empty_per_token(x: Tensor, token_of_row: Tensor | None) -> tuple[Tensor, Tensor]:
    row_scale = x.new_empty(_num_rows(x, token_of_row), 1, dtype=torch.float32)
    return _empty(x, token_of_row), row_scale


def _fake(
    x: Tensor,
    global_scale: Tensor,
    offs: Tensor | None = None,
    token_of_row: Tensor | None = None,
) -> Tensor:
    _check_scaled(x, global_scale, offs, token_of_row)
    return _empty(x, token_of_row)


def _plan(
    x: Tensor,
    global_scale: Tensor,
    offs: Tensor | None = None,
    token_of_row: Tensor | None = None,
) -> Run | None:
    _check_scaled(x, global_scale, offs, token_of_row)
    if token_of_row is not None:
        check_indices("token_of_row", token_of_row, x.shape[0], "tokens")
    if not kernels.has_elementwise(x, offs) or _num_rows(x, token_of_row) == 0:
        return None
    launch = kernels.prepare_round(x, global_scale, offs, token_of_row)

    def run(
        x: Tensor,
        global_scale: Tensor,
        offs: Tensor | None = None,
        token_of_row: Tensor | None = None,
    ) -> Tensor:
        out = _empty(x, token_of_row)
        launch(x, global_scale, offs, token_of_row, out)
        return out

    return run


_op = register(
    "round_nvfp4(Tensor x, Tensor global_scale, Tensor? offs=None, Tensor? token_of_row=None)"
    " -> Tensor",
    fake=_fake,
    kernel=reference.round_nvfp4,
    plan=_plan,
)


def round_nvfp4(
    x: Tensor,
    global_scale: Tensor,
    offs: Tensor | None = None,
    *,
    token_of_row: Tensor | None = None,
) -> Tensor:
    """Round rows to NVFP4 values, without the global scale: what codes and block scales mean.

    With y = permute(x, token_of_row) where that is given, else x, bit for bit but for the payload
    of NaNs:

        codes, block_scale = quantize_nvfp4(y, global_scale, offs)
        out[r, k] = e2m1(codes[r, k]) * block_scale[r, k // 16]

    which is exact in bf16. Times the global scale it is what ``dequantize_nvfp4`` returns.

    Args:
        x: (R, K), or (T, K) with ``token_of_row``; bf16, fp16 or fp32, any strides; K a multiple
            of 16, R may be 0.
        global_scale: as ``quantize_nvfp4``'s, of the R rows of the result.
        offs: (E,) int32 end row of each expert. Rows from ``offs[-1]`` on are zero.
        token_of_row: (R,) int32 row of x that each row is made of, from ``sort_by_expert``; rows
            of -1 are zero.

    Returns:
        (R, K) bf16, to be multiplied by ``grouped_scaled_mm`` as ``a`` without ``sf_a``.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape is not one of the above, or (on the CPU) offs is not non-decreasing or
            token_of_row names a row that is not there.
    """
    return _op(x, global_scale, offs, token_of_row)


def _fake_per_token(
    x: Tensor, offs: Tensor | None = None, token_of_row: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check_per_token(x, offs, token_of_row)
    return _empty_per_token(x, token_of_row)


def _plan_per_token(
    x: Tensor, offs: Tensor | None = None, token_of_row: Tensor | None = None
) -> Run | None:
    _check_per_token(x, offs, token_of_row)
    if token_of_row is not None:
        check_indices("token_of_row", token_of_row, x.shape[0], "tokens")
    if not kernels.has_elementwise(x, offs) or _num_rows(x, token_of_row) == 0:
        return None
    launch = kernels.prepare_round_per_token(x, offs, token_of_row)
    if launch is None:
        return _in_several_passes

    def run(
        x: Tensor, offs: Tensor | None = None, token_of_row: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        out, row_scale = _empty_per_token(x, token_of_row)
        launch(x, offs, token_of_row, out, row_scale)
        return out, row_scale

    return run


def _in_several_passes(
    x: Tensor, offs: Tensor | None = None, token_of_row: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """For rows that are too long for the kernel."""
    if token_of_row is not None:
        # Rows of -1 are zero then, and the scale of those is 1.
        x = reference.gather_rows(x, token_of_row)
    row_scale = reference.one_past_the_end(global_scale(x, per_token=True), offs)
    return round_nvfp4(x, row_scale, offs), row_scale


_op_per_token = register(
    "round_per_token_nvfp4(Tensor x, Tensor? offs=None, Tensor? token_of_row=None)"
    " -> (Tensor, Tensor)",
    fake=_fake_per_token,
    kernel=reference.round_per_token_nvfp4,
    plan=_plan_per_token,
)


def round_per_token_nvfp4(
    x: Tensor, offs: Tensor | None = None, *, token_of_row: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round rows to NVFP4 values over a dynamic global scale of each row.

    With y = permute(x, token_of_row) where that is given, else x:

        row_scale = global_scale(y, per_token=True)
        out = round_nvfp4(y, row_scale, offs)

    A GPU reads a row once where it fits the registers of eight warps (K up to 16384), else in
    several passes.

    Args:
        x, offs, token_of_row: as ``round_nvfp4``'s; K positive.

    Returns:
        out (R, K) bf16, and row_scale (R, 1) fp32, which is 1 where a row is of no expert or no
        token.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: as ``round_nvfp4``.
    """
    return _op_per_token(x, offs, token_of_row)
