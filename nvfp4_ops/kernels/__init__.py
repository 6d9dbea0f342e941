"""GPU kernels in CuTe DSL: the only folder that imports cutlass, when a kernel is asked for.

The architecture is chosen here, once; a file's suffix says which one it is for.
"""

from collections.abc import Callable, Hashable
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from nvfp4_ops import format as nvfp4
from nvfp4_ops.kernels import compile_cache, prepack_sm90
from nvfp4_ops.kernels.grouped_mm_config import choose_config, tokens_of_every_config
from nvfp4_ops.kernels.limits import MAX_EXPERTS, num_multiprocessors
from nvfp4_ops.kernels.prepack_sm90 import (
    GATED_RANK,
    PLAIN_RANK,
    num_weight_blocks,
    prepacked_shape,
)

__all__ = [
    "GATED_RANK",
    "PLAIN_RANK",
    "combine",
    "dequantize",
    "global_scale",
    "grouped_mm",
    "num_weight_blocks",
    "permute",
    "prepack",
    "prepacked_shape",
    "quantize",
    "quantize_per_token",
    "round_rows",
    "round_rows_per_token",
    "sort_by_expert",
    "swizzle",
    "tokens_of_every_config",
    "unpack",
    "unswizzle",
    "why_no_elementwise",
    "why_no_global_scale",
    "why_no_grouped_mm",
    "why_no_kernels",
]

ARCHITECTURE = "sm_90a"


@cache
def why_no_kernels(device: torch.device) -> str | None:
    """Why nothing here serves this GPU, or None where something does."""
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        name = torch.cuda.get_device_name(device)
        return f"no kernel for {name} (sm_{capability[0]}{capability[1]}) yet, only for sm_90"
    if find_spec("cutlass") is None:
        return "nvidia-cutlass-dsl is not installed"
    if find_spec("tvm_ffi") is None:
        return "apache-tvm-ffi is not installed"
    return None


def why_no_elementwise(x: Tensor, num_experts: int = 1) -> str | None:
    """Why the elementwise and routing kernels can not serve x, or None where they can."""
    if x.numel() == 0:
        return "there is nothing to compute"
    return _why_not_so_many(num_experts) or why_no_kernels(x.device)


def _why_not_so_many(num_experts: int) -> str | None:
    if num_experts > MAX_EXPERTS:
        return f"the kernel takes at most {MAX_EXPERTS} experts, got {num_experts}"
    return None


@cache
def _get_compiled(op: str, kernel: ModuleType) -> Callable[[Hashable], Callable[..., object]]:
    """From a config of the module ``kernel`` to what its ``build`` makes of it, cached."""
    return lambda config: compile_cache.get(op, config, ARCHITECTURE, lambda: kernel.build(config))


def why_no_grouped_mm(
    device: torch.device,
    num_experts: int,
    dtype: torch.dtype = torch.bfloat16,
    out_dtype: torch.dtype = torch.bfloat16,
) -> str | None:
    """Why the grouped mm kernel can not serve these arguments, or None where it can."""
    reason = why_no_kernels(device) or _why_not_so_many(num_experts)
    if reason is not None:
        return reason
    if dtype != torch.bfloat16:
        return f"the kernel takes bfloat16 or NVFP4 activations, got {dtype}"
    if out_dtype == torch.float16:
        return "the kernel writes bfloat16 or float32"
    return None


def grouped_mm(
    x: Tensor,
    weight: Tensor,
    offs: Tensor,
    alpha: Tensor,
    out: Tensor,
    *,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    limit: float | None = None,
    early_weights: bool = False,
) -> None:
    """out[r, n] = act(alpha[e, segment(n)] * row_scale[r] * sum_k x[r, k] W[e, n, k] + bias[e, n]).

    x: (R, K) bf16, contiguous. weight: prepacked; rank 5 for gated activations, else rank 4.
    offs: (E,) int32. alpha: fp32 (E,) or (E, 2). out: (R, N), or (R, N / 2) where gated, bf16 or
    fp32, contiguous, written whole. row_scale: (R,) fp32. bias: (E, N) fp32. early_weights: see
    ``GroupedMmConfig``.
    """
    from nvfp4_ops.kernels import grouped_mm_sm90

    if x.shape[0] == 0:
        return
    gated = weight.ndim == GATED_RANK
    num_experts, column_blocks = weight.shape[0], weight.shape[-2]
    weight = weight.view(num_experts, -1, column_blocks, prepack_sm90.BLOCK_BYTES)
    config = choose_config(
        x.shape[0],
        num_experts,
        weight.shape[1],
        column_blocks,
        early_weights=early_weights,
        out_fp32=out.dtype == torch.float32,
        row_scale=row_scale is not None,
        bias=bias is not None,
        activation=activation,
        gated=gated,
        limit=limit,
    )
    compiled = _get_compiled("grouped_mm", grouped_mm_sm90)(config)
    unused = alpha.view(-1)
    # Columns of the first segment; gated weights have both in one block.
    two_segments = alpha.ndim == 2 and not gated
    compiled(
        weight,
        x,
        offs,
        alpha.view(-1),
        unused if row_scale is None else row_scale,
        unused if bias is None else bias.view(-1),
        out,
        alpha.shape[1] if alpha.ndim == 2 else 1,
        out.shape[1] // 2 if two_segments else prepack_sm90.BLOCK_ROWS * weight.shape[1],
        config.grid(x.shape[0], num_experts, weight.shape[1], num_multiprocessors(x.device)),
    )


def prepack(codes: Tensor, block_scale: Tensor, *, gated: bool = False) -> Tensor:
    """Canonical weights to the layout of the grouped mm (``prepack_sm90.prepack``)."""
    if not codes.is_cuda or why_no_elementwise(codes) is not None:
        return prepack_sm90.prepack(codes, block_scale, gated=gated)
    from nvfp4_ops.kernels import prepack_kernel_sm90 as kernel

    codes = codes.contiguous()
    if codes.data_ptr() % kernel.LANE_BYTES:
        codes = codes.clone()
    num_experts, n, packed_k = codes.shape
    k = packed_k * nvfp4.CODES_PER_BYTE
    packed = codes.new_empty(prepacked_shape(num_experts, n, k, gated=gated))
    kernel.launch_prepack(
        codes=codes,
        block_scale=block_scale.contiguous(),
        packed=packed,
        get_compiled=_get_compiled("prepack", kernel),
    )
    return packed


def unpack(prepacked: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Inverse of ``prepack``: codes (E, N, K/2) and block scales (E, N, K/16)."""
    if not prepacked.is_cuda or why_no_elementwise(prepacked) is not None:
        return prepack_sm90.unpack(prepacked, n, k)
    from nvfp4_ops.kernels import prepack_kernel_sm90 as kernel

    lead = (prepacked.shape[0], n)
    codes = prepacked.new_empty(*lead, nvfp4.packed_size(k))
    sf = prepacked.new_empty(*lead, nvfp4.num_blocks(k), dtype=torch.float8_e4m3fn)
    kernel.launch_unpack(
        packed=prepacked.contiguous(),
        codes=codes,
        block_scale=sf,
        get_compiled=_get_compiled("prepack", kernel),
    )
    return codes, sf


def why_no_global_scale(x: Tensor, per_token: bool) -> str | None:
    """Why the global scale kernels can not serve x, or None where they can."""
    if x.numel() >= 1 << 31:
        return "the kernel takes fewer than 2^31 elements"
    if (x.shape[1] if per_token else x.numel()) % nvfp4.BLOCK_SIZE:
        what = "rows" if per_token else "tensors"
        return f"the kernel takes {what} of a multiple of {nvfp4.BLOCK_SIZE} elements"
    return why_no_elementwise(x)


def global_scale(x: Tensor, scale: Tensor) -> None:
    """Write ``scale``: () of all elements of x, or (R, 1) of the rows of x (R, K)."""
    from nvfp4_ops.kernels import amax as kernel

    get_compiled = _get_compiled("global_scale", kernel)
    if scale.ndim == 0:
        kernel.launch_tensor_scale(
            x=_readable_rows(x.reshape(1, -1)), scale=scale, get_compiled=get_compiled
        )
    else:
        kernel.launch_row_scales(x=_readable_rows(x), scale=scale, get_compiled=get_compiled)


def _readable_rows(x: Tensor) -> Tensor:
    """x (R, K), copied where its rows do not start at multiples of 16 bytes."""
    from nvfp4_ops.kernels.memory import why_no_rows

    return x if why_no_rows(x) is None else x.clone(memory_format=torch.contiguous_format)


def quantize(
    x: Tensor,
    global_scale: Tensor,
    offs: Tensor | None,
    codes: Tensor,
    block_scale: Tensor,
    *,
    activation: str = "none",
    limit: float | None = None,
) -> None:
    """Write ``codes`` and ``block_scale`` (rank 4: swizzled) of the activated rows of x."""
    from nvfp4_ops.kernels import quantize_rows as kernel

    kernel.launch_quantize(
        x=_readable_rows(x),
        global_scale=global_scale.contiguous(),
        offs=offs,
        codes=codes,
        block_scale=block_scale,
        activation=activation,
        limit=limit,
        get_compiled=_get_compiled("quantize", kernel),
    )


def quantize_per_token(
    x: Tensor,
    offs: Tensor | None,
    codes: Tensor,
    block_scale: Tensor,
    row_scale: Tensor,
    *,
    activation: str,
    limit: float | None,
) -> bool:
    """Write ``codes``, linear ``block_scale`` and ``row_scale`` of the activated rows of x.

    Returns False, with nothing written, where a row is too long for the kernel.
    """
    from nvfp4_ops.kernels import per_token as kernel

    config = kernel.choose_config(
        x.dtype,
        codes.shape[1] * nvfp4.CODES_PER_BYTE,
        ragged=offs is not None,
        activation=activation,
        limit=limit,
    )
    if config is None:
        return False
    kernel.launch_quantize_per_token(
        x=_readable_rows(x),
        offs=offs,
        config=config,
        codes=codes,
        block_scale=block_scale,
        row_scale=row_scale,
        get_compiled=_get_compiled("quantize_per_token", kernel),
    )
    return True


def round_rows(
    x: Tensor,
    global_scale: Tensor,
    offs: Tensor | None,
    token_of_row: Tensor | None,
    out: Tensor,
) -> None:
    """Write ``out`` (R, K) bf16: the NVFP4 values of the rows of x, without the global scale."""
    from nvfp4_ops.kernels import quantize_rows as kernel

    kernel.launch_round(
        x=_readable_rows(x),
        global_scale=global_scale.contiguous(),
        offs=offs,
        token_of_row=None if token_of_row is None else token_of_row.contiguous(),
        out=out,
        get_compiled=_get_compiled("quantize", kernel),
    )


def round_rows_per_token(
    x: Tensor,
    offs: Tensor | None,
    token_of_row: Tensor | None,
    out: Tensor,
    row_scale: Tensor,
) -> bool:
    """Write ``out`` and ``row_scale`` of the rows of x.

    Returns False, with nothing written, where a row is too long for the kernel.
    """
    from nvfp4_ops.kernels import per_token as kernel

    config = kernel.choose_config(
        x.dtype,
        x.shape[1],
        ragged=offs is not None,
        values=True,
        gather=token_of_row is not None,
    )
    if config is None:
        return False
    kernel.launch_round_per_token(
        x=_readable_rows(x),
        offs=offs,
        token_of_row=None if token_of_row is None else token_of_row.contiguous(),
        config=config,
        out=out,
        row_scale=row_scale,
        get_compiled=_get_compiled("quantize_per_token", kernel),
    )
    return True


def dequantize(
    codes: Tensor,
    block_scale: Tensor,
    global_scale: Tensor | None,
    offs: Tensor | None,
    out: Tensor,
) -> None:
    """Write ``out`` (R, K) or (E, N, K); without a global scale in bf16, where it is exact.

    Rows of no expert are zero.
    """
    from nvfp4_ops.kernels import decode as kernel

    kernel.launch_decode(
        codes=codes if _is_dense(codes) else codes.clone(memory_format=torch.contiguous_format),
        block_scale=block_scale.contiguous(),
        global_scale=None if global_scale is None else global_scale.contiguous(),
        offs=offs,
        out=out,
        get_compiled=_get_compiled("dequantize", kernel),
    )


def _is_dense(codes: Tensor) -> bool:
    """Contiguous, and blocks of 8 bytes aligned."""
    return codes.is_contiguous() and codes.data_ptr() % nvfp4.packed_size(nvfp4.BLOCK_SIZE) == 0


def swizzle(sf: Tensor, offs: Tensor | None, swizzled: Tensor) -> None:
    """Write ``swizzled`` from linear block scales (R, C) or (E, N, C)."""
    from nvfp4_ops.kernels import swizzle_sf as kernel

    kernel.launch_swizzle(
        sf=sf.contiguous(),
        offs=offs,
        swizzled=swizzled,
        get_compiled=_get_compiled("swizzle", kernel),
    )


def unswizzle(swizzled: Tensor, offs: Tensor | None, sf: Tensor) -> None:
    """Write linear block scales ``sf`` (R, C) or (E, N, C) from swizzled ones."""
    from nvfp4_ops.kernels import swizzle_sf as kernel

    kernel.launch_unswizzle(
        swizzled=swizzled.contiguous(),
        offs=offs,
        sf=sf,
        get_compiled=_get_compiled("swizzle", kernel),
    )


def sort_by_expert(
    top_k_index: Tensor, offs: Tensor, token_of_row: Tensor, row_of_slot: Tensor
) -> None:
    """Write the three outputs of ``sort_by_expert`` for top_k_index (T, top_k)."""
    from nvfp4_ops.kernels import sort_slots as kernel

    kernel.launch_sort(
        top_k_index=top_k_index.contiguous(),
        offs=offs,
        token_of_row=token_of_row,
        row_of_slot=row_of_slot,
        get_compiled=_get_compiled("sort_by_expert", kernel),
    )


def permute(x: Tensor, token_of_row: Tensor, out: Tensor) -> None:
    """Write out[r] = x[token_of_row[r]], zeros for -1; x (T, ...) of any dtype."""
    from nvfp4_ops.kernels import permute_rows as kernel

    # A view where the elements of a row lie together, else a copy.
    rows = x.reshape(x.shape[0], -1)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    kernel.launch_permute(
        x=rows,
        token_of_row=token_of_row.contiguous(),
        out=out.view(out.shape[0], -1),
        get_compiled=_get_compiled("permute", kernel),
    )


def combine(rows: Tensor, row_of_slot: Tensor, top_k_weights: Tensor, out: Tensor) -> None:
    """Write out[t] = sum over j of top_k_weights[t, j] * rows[row_of_slot[t, j]]."""
    from nvfp4_ops.kernels import combine_rows as kernel

    kernel.launch_combine(
        rows=rows if rows.stride(1) == 1 else rows.contiguous(),
        row_of_slot=row_of_slot.contiguous(),
        top_k_weights=top_k_weights.contiguous(),
        out=out,
        get_compiled=_get_compiled("combine", kernel),
    )
