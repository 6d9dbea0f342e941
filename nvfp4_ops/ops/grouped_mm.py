"""grouped_scaled_mm: ragged rows times the NVFP4 weight of their expert."""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nvfp4_ops import activation as activations
from nvfp4_ops import format as nvfp4
from nvfp4_ops import kernels, reference
from nvfp4_ops.activation import Activation
from nvfp4_ops.ops.grouped_mm_arguments import Arguments, check, dtype_name, out_shape
from nvfp4_ops.ops.swizzle import unswizzle_sf
from nvfp4_ops.plans import Run
from nvfp4_ops.registry import register


def _fake(*args: Any) -> Tensor:
    arguments = Arguments.parse(args)
    act = Activation(arguments.activation, arguments.limit)
    check(arguments, act)
    return arguments.a.new_empty(out_shape(arguments, act), dtype=arguments.out_dtype)


@cache
def _warn_of_reference(reason: str) -> None:
    """Once a reason: what is slow must not look like what was promised."""
    warnings.warn(
        f"grouped_scaled_mm runs the PyTorch reference, which multiplies every row with every "
        f"expert: {reason}",
        stacklevel=2,
    )


def _plan(*args: Any) -> Run | None:
    arguments = Arguments.parse(args)
    act = Activation(arguments.activation, arguments.limit)
    check(arguments, act)
    a, b = arguments.a, arguments.b
    if not a.is_cuda:
        return None
    dtype = a.dtype if arguments.sf_a is None else torch.bfloat16
    reason = kernels.why_no_grouped_mm(a.device, b.shape[0], dtype, arguments.out_dtype)
    if reason is not None:
        _warn_of_reference(reason)
        return None
    if a.shape[0] == 0:
        shape, out_dtype = out_shape(arguments, act), arguments.out_dtype
        return lambda a, *_: a.new_empty(*shape, dtype=out_dtype)
    return _plan_kernel(arguments, act)


def _reference(*args: Any) -> Tensor:
    arguments = Arguments.parse(args)
    a, b, sf_a, sf_b, alpha, offs, row_scale, bias, activation, limit, out_dtype, *_ = arguments
    if sf_b is None:
        b, sf_b = kernels.unpack(b, arguments.n, arguments.k)
    return reference.grouped_scaled_mm(
        a,
        b,
        sf_a,
        sf_b,
        alpha,
        offs,
        row_scale=row_scale,
        bias=bias,
        activation=Activation(activation, limit),
        out_dtype=out_dtype,
    )


def fuses_activation(b: Tensor, act: Activation) -> bool:
    """Whether the GPU's kernel applies the activation itself, without another pass over memory.

    A gated one needs weights that are prepacked for it, which canonical ones come to be.
    """
    return b.ndim != kernels.PLAIN_RANK or not act.gated


def _plan_kernel(arguments: Arguments, act: Activation) -> Run:
    """The GPU's kernel, after what it does not do itself."""
    a, b, sf_a, sf_b, alpha, offs, row_scale, bias, _, _, out_dtype, *_ = arguments
    num_rows, n, k = a.shape[0], arguments.n, arguments.k
    is_gated_for_nothing = b.ndim == kernels.GATED_RANK and not act.gated
    is_packed = sf_b is None and not is_gated_for_nothing
    packed_shape: tuple[int, ...] = b.shape
    if not is_packed:
        packed_shape = kernels.prepacked_shape(b.shape[0], n, k, gated=act.gated)
    fused = act if fuses_activation(b, act) else Activation()
    is_complete = fused == act
    mm_shape = (num_rows, n // 2 if fused.gated else n)
    mm_dtype = out_dtype if is_complete else torch.float32
    is_dense = kernels.is_dense(b) and offs.is_contiguous()
    rows_of = _plan_rows(a, sf_a, offs, k)
    launch = kernels.prepare_grouped_mm(
        num_rows,
        packed_shape,
        alpha.shape,
        mm_shape[1],
        a.device,
        out_fp32=mm_dtype == torch.float32,
        row_scale=row_scale is not None,
        bias=bias is not None,
        activation=fused.name,
        limit=fused.limit,
        # What is packed or copied by this very call is not complete before.
        early_weights=arguments.early_weights and is_packed and is_dense,
    )

    def run(
        a: Tensor,
        b: Tensor,
        sf_a: Tensor | None,
        sf_b: Tensor | None,
        alpha: Tensor,
        offs: Tensor,
        row_scale: Tensor | None = None,
        bias: Tensor | None = None,
        *_: object,
    ) -> Tensor:
        out = a.new_empty(*mm_shape, dtype=mm_dtype)
        if not is_dense:
            b, offs = kernels.dense(b), offs.contiguous()
        if is_gated_for_nothing:
            b, sf_b = kernels.unpack(b, n, k)
        launch(
            rows_of(a, sf_a, offs),
            b if sf_b is None else _prepack(b, sf_b, n, k, act),
            offs,
            alpha.contiguous(),
            None if row_scale is None else row_scale.ravel(),
            None if bias is None else bias.float().contiguous(),
            out,
        )
        # The activation sees the unrounded sums, as the contract says.
        return out if is_complete else activations.apply(act, out).to(out_dtype)

    return run


def _plan_rows(
    a: Tensor, sf_a: Tensor | None, offs: Tensor, k: int
) -> Callable[[Tensor, Tensor | None, Tensor], Tensor]:
    """From a and sf_a to the rows that the kernel multiplies."""
    if sf_a is None:
        # A plan is kept for addresses that are aligned like these.
        if kernels.is_dense(a):
            return lambda a, sf_a, offs: a
        return lambda a, sf_a, offs: kernels.dense(a)
    shape = (a.shape[0], k)
    launch = kernels.prepare_dequantize(a, sf_a, None, offs, torch.bfloat16)

    def decode(a: Tensor, sf_a: Tensor | None, offs: Tensor) -> Tensor:
        # Every e2m1 * e4m3 product is exact in bf16.
        rows = a.new_empty(*shape, dtype=torch.bfloat16)
        launch(a, sf_a, None, offs, rows)
        return rows

    return decode


def _prepack(b: Tensor, sf_b: Tensor, n: int, k: int, act: Activation) -> Tensor:
    """Canonical weights, anew for every call."""
    if sf_b.ndim == 4:
        sf_b = unswizzle_sf(sf_b, (b.shape[0], n, nvfp4.num_blocks(k)))
    return kernels.prepack(b, sf_b, gated=act.gated)


_op = register(
    "grouped_scaled_mm(Tensor a, Tensor b, Tensor? sf_a, Tensor? sf_b, Tensor alpha, Tensor offs,"
    ' Tensor? row_scale=None, Tensor? bias=None, str activation="none", float? limit=None,'
    ' str out_dtype="bfloat16", SymInt? num_columns=None, int layout=1,'
    " bool early_weights=False) -> Tensor",
    fake=_fake,
    kernel=_reference,
    plan=_plan,
)


def grouped_scaled_mm(  # noqa: PLR0913 - the equation has this many terms
    a: Tensor,
    b: Tensor,
    sf_a: Tensor | None,
    sf_b: Tensor | None,
    alpha: Tensor,
    offs: Tensor,
    *,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: Activation | str | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    num_columns: int | None = None,
    early_weights: bool = False,
) -> Tensor:
    """Multiply ragged rows with the NVFP4 weight of their expert (2D x 3D).

    For row r of expert e and column n, in at least fp32 up to the final cast:

        out[r, n] = act(alpha[e, n // (N/2)] * row_scale[r]
                        * sum_k e2m1(a[r, k]) sf_a[r, k // 16] e2m1(b[e, n, k]) sf_b[e, n, k // 16]
                        + bias[e, n])

    with alpha = global_scale_a * global_scale_b; without ``sf_a`` (weight-only) ``a`` is used as
    it is. Rows per expert [2, 0, 3] are offs [2, 2, 5]; the rows from ``offs[-1]`` on belong to no
    expert and are written as zero, whatever they hold. The CPU computes in float64 and rounds
    once to fp32, then to ``out_dtype``.

    Args:
        a: (R, K / 2) uint8 codes, or (R, K) bf16, fp16 or fp32 with ``sf_a`` None.
        b: (E, N, K / 2) uint8 codes; K a multiple of 16. For a gated activation the gate's N/2
            rows come first, then the up projection's. Or prepacked (``prepack_weight``): rank 5
            with a gated activation, else rank 4. On Hopper anything else, rank 5 without one
            included, is packed anew by every call, which is slow.
        sf_a: float8_e4m3fn (R, K / 16), or swizzled with ``offs`` where ``sf_b`` is swizzled.
        sf_b: float8_e4m3fn (E, N, K / 16), or swizzled (rank 4); None with prepacked ``b``.
        alpha: fp32 (E,), or (E, 2): one for the first N/2 columns, one for the rest.
        offs: (E,) int32 end row of each expert, non-decreasing, at most R.
        row_scale: fp32 (R,) or (R, 1): per-token global scale of ``a``.
        bias: (E, N) bf16, fp16 or fp32.
        activation: a fused activation or its name (see ``nvfp4_ops.Activation``), or None.
        out_dtype: bf16, fp16 or fp32.
        num_columns: N, with prepacked ``b`` only, which is padded.
        early_weights: a GPU may read ``offs`` and start to load weights while the kernel launched
            just before this one still runs, which hides what a launch costs. ``b`` and ``offs``
            must have been complete when that kernel started: so they are if it, or one before it,
            waited for the kernel that wrote ``offs``, as one that permutes rows by it does.

    Returns:
        (R, N), or (R, N / 2) with a gated activation, of ``out_dtype``.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape is not one of the above, block scales are linear where they are due
            swizzled or the other way round, or (on the CPU) offs is not non-decreasing.
    """
    act = Activation(activation or "none") if not isinstance(activation, Activation) else activation
    return _op(
        a,
        b,
        sf_a,
        sf_b,
        alpha,
        offs,
        row_scale,
        bias,
        act.name,
        act.limit,
        dtype_name(out_dtype),
        num_columns,
        # A program that is saved keeps it with its weights.
        kernels.LAYOUT,
        early_weights,
    )
