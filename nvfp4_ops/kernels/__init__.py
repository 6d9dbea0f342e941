"""GPU kernels in CuTe DSL: the only folder that imports cutlass, when a kernel is asked for.

The architecture is chosen here, once; a file's suffix says which one it is for.
"""

from collections.abc import Callable, Hashable
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from nvfp4_ops.kernels import compile_cache, prepack_sm90
from nvfp4_ops.kernels.limits import MAX_EXPERTS, num_multiprocessors
from nvfp4_ops.kernels.prepack_sm90 import prepack, prepacked_shape, unpack

__all__ = [
    "combine",
    "grouped_mm",
    "permute",
    "prepack",
    "prepacked_shape",
    "quantize",
    "sort_by_expert",
    "swizzle",
    "unpack",
    "unswizzle",
    "why_no_elementwise",
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
    """Why quantize, swizzle and routing kernels can not serve x, or None where they can."""
    if x.numel() == 0:
        return "there is nothing to compute"
    return _why_not_so_many(num_experts) or why_no_kernels(x.device)


def _why_not_so_many(num_experts: int) -> str | None:
    if num_experts > MAX_EXPERTS:
        return f"the kernel takes at most {MAX_EXPERTS} experts, got {num_experts}"
    return None


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
) -> None:
    """out[r, n] = alpha[e, segment(n)] * row_scale[r] * sum_k x[r, k] W[e, n, k] + bias[e, n].

    x: (R, K) bf16, contiguous. weight: prepacked. offs: (E,) int32. alpha: fp32 (E,) or (E, 2).
    out: (R, N) bf16 or fp32, contiguous, written whole. row_scale: (R,) fp32. bias: (E, N) fp32.
    """
    from nvfp4_ops.kernels import grouped_mm_sm90

    if x.shape[0] == 0:
        return
    config = grouped_mm_sm90.choose_config(
        x.shape[0],
        weight.shape[0],
        out_fp32=out.dtype == torch.float32,
        row_scale=row_scale is not None,
        bias=bias is not None,
    )
    compiled = _get_compiled("grouped_mm", grouped_mm_sm90)(config)
    two_segments = alpha.ndim == 2
    unused = alpha.view(-1)
    compiled(
        weight,
        x,
        offs,
        alpha.view(-1),
        unused if row_scale is None else row_scale,
        unused if bias is None else bias.view(-1),
        out,
        alpha.shape[1] if two_segments else 1,
        out.shape[1] // 2 if two_segments else prepack_sm90.ROW_PADDING * weight.shape[1],
        num_multiprocessors(x.device) * config.blocks_per_sm,
    )


def quantize(
    x: Tensor, global_scale: Tensor, offs: Tensor | None, codes: Tensor, block_scale: Tensor
) -> None:
    """Write ``codes`` and ``block_scale`` (rank 4: swizzled) of the rows of x."""
    from nvfp4_ops.kernels import quantize_rows as kernel

    if kernel.why_no_rows(x) is not None:
        x = x.contiguous()
    kernel.launch_quantize(
        x=x,
        global_scale=global_scale.contiguous(),
        offs=offs,
        codes=codes,
        block_scale=block_scale,
        get_compiled=_get_compiled("quantize", kernel),
    )


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
