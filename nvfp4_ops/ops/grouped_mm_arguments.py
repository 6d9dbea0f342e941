"""The arguments of grouped_scaled_mm: their names, sizes and rules."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nvfp4_ops import format as nvfp4
from nvfp4_ops import kernels
from nvfp4_ops.activation import Activation
from nvfp4_ops.ops.quantize import FLOAT_DTYPES
from nvfp4_ops.registry import (
    check_dtype,
    check_multiple,
    check_offs,
    check_rank,
    check_same_devices,
    check_shape,
    shape_text,
)

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """As the op's schema has it."""
    return _NAMES.get(dtype, str(dtype))


class Arguments(NamedTuple):
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
    layout: int = 1
    early_weights: bool = False

    @classmethod
    def parse(cls, args: tuple[Any, ...]) -> "Arguments":
        """Of the op, which gives out_dtype by name: AOTInductor mixes up dtypes of custom ops."""
        arguments = cls(*args)
        name: Any = arguments.out_dtype
        if isinstance(name, torch.dtype):
            return arguments  # the default
        if name not in _DTYPES:
            raise TypeError(f"out_dtype: must be bfloat16, float16 or float32, got {name}")
        return arguments._replace(out_dtype=_DTYPES[name])

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


def _check_prepacked(arguments: Arguments) -> int:
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
    if arguments.layout != kernels.LAYOUT:
        raise ValueError(
            f"b: prepacked in layout {arguments.layout}, but this version of nvfp4_ops has layout "
            f"{kernels.LAYOUT}: export the program anew, or prepack its weights anew"
        )
    return k


def _check_operands(arguments: Arguments) -> None:
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


def check(arguments: Arguments, act: Activation) -> None:
    """Raise TypeError or ValueError where an argument breaks a rule."""
    a, b, sf_a, sf_b, alpha, offs, row_scale, bias, *_ = arguments
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


def out_shape(arguments: Arguments, act: Activation) -> tuple[int, int]:
    """(R, N), of whose columns a gated activation leaves half."""
    return (arguments.a.shape[0], arguments.n // 2 if act.gated else arguments.n)
