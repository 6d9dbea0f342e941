"""grouped_scaled_mm: ragged rows times the NVFP4 weight of their expert."""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nvfp4_ops import activation as activations
from nvfp4_ops import format as nvfp4
from nvfp4_ops import kernels, reference
from nvfp4_ops.activation import Activation
from nvfp4_ops.ops.quantize import FLOAT_DTYPES
from nvfp4_ops.ops.swizzle import unswizzle_sf
from nvfp4_ops.plans import Run
from nvfp4_ops.registry import (
    check_dtype,
    check_multiple,
    check_offs,
    check_rank,
    check_same_devices,
    check_shape,
    register,
    shape_text,
)


class _Arguments(NamedTuple):
    """The op's arguments, as the schema orders them."""

    a: Tensor
    b: Tensor
    sf_a: Tensor | None
    sf_b: Tensor | None
    alpha: Tensor
    offs: Tensor
    row_scale: Tensor | None = None
    bias: Tensor | None = None
    activation: str = "none"
    limit: float | None = None
    out_dtype: torch.dtype = torch.bfloat16
    num_columns: int | None = None
    early_weights: bool = False

    @classmethod
    def parse(cls, args: tuple[Any, ...]) -> "_Arguments":
        """Of the op's arguments, in whose schema out_dtype is None for bfloat16.

        AOTInductor can not write down a dtype that is left out because it is the schema's default.
        """
        arguments = cls(*args)
        if arguments.out_dtype is None:
            return arguments._replace(out_dtype=torch.bfloat16)
        return arguments

    @property
    def n(self) -> int:
        return self.b.shape[1] if self.num_columns is None else self.num_columns

    @property
    def k(self) -> int:
        return self.a.shape[1] * (1 if self.sf_a is None else nvfp4.CODES_PER_BYTE)


def _check_canonical(b: Tensor, sf_b: Tensor | None) -> int:
    """Canonical weights; returns K."""
    num_experts, n, packed_k = b.shape
    check_multiple("b", "K/2", packed_k, nvfp4.packed_size(nvfp4.BLOCK_SIZE))
    k = packed_k * nvfp4.CODES_PER_BYTE
    if sf_b is None:
        raise ValueError("sf_b: must be given with canonical b (E, N, K/2)")
    linear_b = (num_experts, n, nvfp4.num_blocks(k))
    check_dtype("sf_b", sf_b, torch.float8_e4m3fn)
    if sf_b.ndim == 4:
        check_shape("sf_b", sf_b, nvfp4.swizzled_shape(linear_b), "the swizzled scales of b")
    else:
        check_shape("sf_b", sf_b, linear_b, "the linear scales (E, N, K/16)")
    return k


def _check_prepacked(arguments: _Arguments) -> int:
    """Prepacked weights; returns K."""
    b, n, k = arguments.b, arguments.num_columns, arguments.k
    gated = b.ndim == kernels.GATED_RANK
    if arguments.sf_b is not None:
        raise ValueError("sf_b: must be None with prepacked b, which holds its scales")
    if n is None:
        raise ValueError("num_columns: must be given with prepacked b, which is padded")
    check_multiple("num_columns", "N", n, nvfp4.BLOCK_SIZE * (2 if gated else 1))
    check_multiple("a", "K", k, nvfp4.BLOCK_SIZE)
    shape = kernels.prepacked_shape(b.shape[0], n, k, gated=gated)
    check_shape("b", b, shape, f"weights prepacked from N = {n} and the K = {k} of a")
    return k


def _check_operands(arguments: _Arguments) -> None:
    """Codes and block scales."""
    a, b, sf_a, sf_b, _, offs = arguments[:6]
    check_dtype("b", b, torch.uint8)
    if b.ndim in (kernels.PLAIN_RANK, kernels.GATED_RANK):
        k = _check_prepacked(arguments)
    else:
        check_rank("b", b, 3, "(E, N, K/2) codes")
        if arguments.num_columns is not None:
            raise ValueError("num_columns: goes with prepacked b only")
        k = _check_canonical(b, sf_b)
    num_experts, packed_k = b.shape[0], nvfp4.packed_size(k)
    check_shape("offs", offs, (num_experts,), "the (E,) end row of each expert")
    if sf_a is None:
        check_dtype("a without sf_a", a, *FLOAT_DTYPES)
        check_shape("a", a, (a.shape[0], k), "(R, K)")
        return
    check_dtype("a with sf_a", a, torch.uint8)
    check_shape("a", a, (a.shape[0], packed_k), "(R, K/2) codes")
    check_dtype("sf_a", sf_a, torch.float8_e4m3fn)
    linear_a = (a.shape[0], nvfp4.num_blocks(k))
    swizzle = sf_b is not None and sf_b.ndim == 4
    if sf_a.ndim != (4 if swizzle else 2):
        wanted = "swizzled (rank 4)" if swizzle else "linear (R, K/16)"
        raise ValueError(
            f"sf_a: must be {wanted} because sf_b is, got {shape_text(sf_a)}; swizzle_sf and "
            "unswizzle_sf convert"
        )
    if sf_a.ndim == 4:
        swizzled = nvfp4.swizzled_shape(linear_a, num_experts)
        check_shape("sf_a", sf_a, swizzled, "the scales of a, swizzled with offs")
    else:
        check_shape("sf_a", sf_a, linear_a, "the linear scales (R, K/16)")


def _check(arguments: _Arguments, act: Activation) -> None:
    a, b, sf_a, sf_b, alpha, offs, row_scale, bias, _, _, out_dtype, *_ = arguments
    check_rank("a", a, 2, "(R, K) or (R, K/2) codes")
    _check_operands(arguments)
    num_experts, n = b.shape[0], arguments.n
    check_offs(offs, a.shape[0])
    check_dtype("alpha", alpha, torch.float32)
    if alpha.ndim == 2:
        check_shape("alpha", alpha, (num_experts, 2), "(E,) or (E, 2)")
        check_multiple("b", "N, two column segments,", n, 2)
    else:
        check_shape("alpha", alpha, (num_experts,), "(E,) or (E, 2)")
    if act.gated:
        check_multiple("b", "N, gate and up rows,", n, 2)
    if row_scale is not None:
        check_dtype("row_scale", row_scale, torch.float32)
        shape = (a.shape[0], 1)[: max(row_scale.ndim, 1)]
        check_shape("row_scale", row_scale, shape, "(R,) or (R, 1)")
    if bias is not None:
        check_dtype("bias", bias, *FLOAT_DTYPES)
        check_shape("bias", bias, (num_experts, n), "(E, N)")
    if out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"out_dtype: must be bfloat16, float16 or float32, got {out_dtype}")
    check_same_devices(
        a.device,
        b=b,
        sf_a=sf_a,
        sf_b=sf_b,
        alpha=alpha,
        offs=offs,
        row_scale=row_scale,
        bias=bias,
    )


def _shape(arguments: _Arguments, act: Activation) -> tuple[int, int]:
    return (arguments.a.shape[0], arguments.n // 2 if act.gated else arguments.n)


def _fake(*args: Any) -> Tensor:
    arguments = _Arguments.parse(args)
    act = Activation(arguments.activation, arguments.limit)
    _check(arguments, act)
    return arguments.a.new_empty(_shape(arguments, act), dtype=arguments.out_dtype)


@cache
def _warn_of_reference(reason: str) -> None:
    """Once a reason: what is slow must not look like what was promised."""
    warnings.warn(
        f"grouped_scaled_mm runs the PyTorch reference, which multiplies every row with every "
        f"expert: {reason}",
        stacklevel=2,
    )


def _plan(*args: Any) -> Run | None:
    arguments = _Arguments.parse(args)
    act = Activation(arguments.activation, arguments.limit)
    _check(arguments, act)
    a, b = arguments.a, arguments.b
    if not a.is_cuda:
        return None
    dtype = a.dtype if arguments.sf_a is None else torch.bfloat16
    reason = kernels.why_no_grouped_mm(a.device, b.shape[0], dtype, arguments.out_dtype)
    if reason is not None:
        _warn_of_reference(reason)
        return None
    if a.shape[0] == 0:
        shape, out_dtype = _shape(arguments, act), arguments.out_dtype
        return lambda a, *_: a.new_empty(*shape, dtype=out_dtype)
    return _plan_kernel(arguments, act)


def _reference(*args: Any) -> Tensor:
    arguments = _Arguments.parse(args)
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


def _plan_kernel(arguments: _Arguments, act: Activation) -> Run:
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
    out_shape = (num_rows, n // 2 if fused.gated else n)
    mm_dtype = out_dtype if is_complete else torch.float32
    rows_of = _plan_rows(a, sf_a, offs, k)
    launch = kernels.prepare_grouped_mm(
        num_rows,
        packed_shape,
        alpha.shape,
        out_shape[1],
        a.device,
        out_fp32=mm_dtype == torch.float32,
        row_scale=row_scale is not None,
        bias=bias is not None,
        activation=fused.name,
        limit=fused.limit,
        # What is packed by this very call is not complete before.
        early_weights=arguments.early_weights and is_packed,
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
        out = a.new_empty(*out_shape, dtype=mm_dtype)
        if is_gated_for_nothing:
            b, sf_b = kernels.unpack(b, n, k)
        launch(
            rows_of(a, sf_a, offs),
            b if sf_b is None else _prepack(b, sf_b, n, k, act),
            offs,
            alpha.contiguous(),
            None if row_scale is None else row_scale.reshape(-1),
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
        return lambda a, sf_a, offs: a.contiguous()
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
    " ScalarType? out_dtype=None, SymInt? num_columns=None,"
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
        out_dtype,
        num_columns,
        early_weights,
    )
