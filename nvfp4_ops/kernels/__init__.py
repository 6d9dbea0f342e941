"""GPU kernels in CuTe DSL: the only folder that imports cutlass, when a kernel is asked for.

The architecture is chosen here, once; a file's suffix says which one it is for.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from nvfp4_ops import format as nvfp4
from nvfp4_ops.kernels import compile_cache, prepack_sm90
from nvfp4_ops.kernels.grouped_mm_config import choose_config, tokens_of_every_config
from nvfp4_ops.kernels.launch import amax as amax_launch
from nvfp4_ops.kernels.launch import choose_experts as choose_launch
from nvfp4_ops.kernels.launch import combine_rows as combine_launch
from nvfp4_ops.kernels.launch import decode as decode_launch
from nvfp4_ops.kernels.launch import per_token as per_token_launch
from nvfp4_ops.kernels.launch import permute_rows as permute_launch
from nvfp4_ops.kernels.launch import prepack_kernel_sm90 as prepack_launch
from nvfp4_ops.kernels.launch import quantize_rows as quantize_launch
from nvfp4_ops.kernels.launch import router_logits as router_launch
from nvfp4_ops.kernels.launch import sort_slots as sort_launch
from nvfp4_ops.kernels.launch import swizzle_sf as swizzle_launch
from nvfp4_ops.kernels.launch.tensors import VECTOR_BYTES, GetCompiled, Launch, why_no_rows
from nvfp4_ops.kernels.limits import MAX_EXPERTS, num_multiprocessors
from nvfp4_ops.kernels.prepack_sm90 import (
    GATED_RANK,
    LAYOUT,
    PLAIN_RANK,
    num_weight_blocks,
    prepacked_shape,
)

__all__ = [
    "GATED_RANK",
    "LAYOUT",
    "PLAIN_RANK",
    "has_elementwise",
    "num_weight_blocks",
    "prepack",
    "prepacked_shape",
    "prepare_choose",
    "prepare_combine",
    "prepare_dequantize",
    "prepare_global_scale",
    "prepare_grouped_mm",
    "prepare_permute",
    "prepare_quantize",
    "prepare_quantize_per_token",
    "prepare_round",
    "prepare_round_per_token",
    "prepare_router_logits",
    "prepare_sort",
    "prepare_swizzle",
    "tokens_of_every_config",
    "unpack",
    "unswizzle",
    "why_no_choose",
    "why_no_elementwise",
    "why_no_global_scale",
    "why_no_grouped_mm",
    "why_no_kernels",
    "why_no_router_logits",
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


def has_elementwise(x: Tensor, offs: Tensor | None = None) -> bool:
    """Whether the elementwise and routing kernels serve x, in rows that end at ``offs``."""
    num_experts = 1 if offs is None else offs.shape[0]
    return x.is_cuda and why_no_elementwise(x, num_experts) is None


def _why_not_so_many(num_experts: int) -> str | None:
    if num_experts > MAX_EXPERTS:
        return f"the kernel takes at most {MAX_EXPERTS} experts, got {num_experts}"
    return None


@cache
def _get_compiled(op: str, module: str) -> GetCompiled:
    """From a config of a kernel's module to what its ``build`` makes of it, cached."""

    def build(config: Hashable) -> Callable[..., object]:
        # On a miss only: this is where the DSL is imported.
        return import_module(f"{__name__}.{module}").build(config)

    return lambda config: compile_cache.get(op, config, ARCHITECTURE, lambda: build(config))


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


# Each returns a function that launches, for all tensors that differ from these in their memory
# alone; their addresses are to be multiples of 16 bytes where these are.


def prepare_grouped_mm(
    num_rows: int,
    weight_shape: tuple[int, ...],
    alpha_shape: tuple[int, ...],
    num_columns: int,
    device: torch.device,
    *,
    out_fp32: bool = False,
    row_scale: bool = False,
    bias: bool = False,
    activation: str = "none",
    limit: float | None = None,
    early_weights: bool = False,
) -> Launch:
    """out[r, n] = act(alpha[e, segment(n)] * row_scale[r] * sum_k x[r, k] W[e, n, k] + bias[e, n]).

    num_rows: R, positive. weight_shape: prepacked; rank 5 for gated activations, else rank 4.
    alpha_shape: (E,) or (E, 2). num_columns: of out: N, or N / 2 where gated. row_scale, bias:
    whether they are given. early_weights: see ``GroupedMmConfig``.

    Returns launch(x (R, K) bf16, weight, offs (E,) int32, alpha fp32, row_scale (R,) fp32 or None,
    bias (E, N) fp32 or None, out bf16 or fp32), all contiguous; out is written whole.
    """
    gated = len(weight_shape) == GATED_RANK
    num_experts, column_blocks = weight_shape[0], weight_shape[-2]
    row_blocks = math.prod(weight_shape[1:-2])
    config = choose_config(
        num_rows,
        num_experts,
        row_blocks,
        column_blocks,
        early_weights=early_weights,
        out_fp32=out_fp32,
        row_scale=row_scale,
        bias=bias,
        activation=activation,
        gated=gated,
        limit=limit,
    )
    compiled = _get_compiled("grouped_mm", "grouped_mm_sm90")(config)
    num_segments = alpha_shape[1] if len(alpha_shape) == 2 else 1
    # Columns of the first segment; gated weights have both in one block.
    first_columns = prepack_sm90.BLOCK_ROWS * row_blocks
    if len(alpha_shape) == 2 and not gated:
        first_columns = num_columns // 2
    grid = config.grid(num_rows, num_experts, row_blocks, num_multiprocessors(device))
    blocks = (num_experts, row_blocks, column_blocks, prepack_sm90.BLOCK_BYTES)

    def launch(
        x: Tensor,
        weight: Tensor,
        offs: Tensor,
        alpha: Tensor,
        row_scale: Tensor | None,
        bias: Tensor | None,
        out: Tensor,
    ) -> None:
        alpha = alpha.ravel() if num_segments > 1 else alpha
        compiled(
            weight.view(blocks) if gated else weight,
            x,
            offs,
            alpha,
            # Not read where there is none.
            alpha if row_scale is None else row_scale,
            alpha if bias is None else bias.view(-1),
            out,
            num_segments,
            first_columns,
            grid,
        )

    return launch


def is_dense(x: Tensor) -> bool:
    """Whether x is contiguous and starts at a multiple of 16 bytes, as bulk copies need it."""
    return x.is_contiguous() and x.data_ptr() % VECTOR_BYTES == 0


def dense(x: Tensor) -> Tensor:
    return x if is_dense(x) else _copy(x)


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def prepack(codes: Tensor, block_scale: Tensor, *, gated: bool = False) -> Tensor:
    """Canonical weights to the layout of the grouped mm (``prepack_sm90.prepack``)."""
    if not codes.is_cuda or why_no_elementwise(codes) is not None:
        return prepack_sm90.prepack(codes, block_scale, gated=gated)
    codes = codes.contiguous()
    if codes.data_ptr() % prepack_launch.LANE_BYTES:
        codes = codes.clone()
    num_experts, n, packed_k = codes.shape
    k = packed_k * nvfp4.CODES_PER_BYTE
    packed = codes.new_empty(*prepacked_shape(num_experts, n, k, gated=gated))
    prepack_launch.launch_prepack(
        codes=codes,
        block_scale=block_scale.contiguous(),
        packed=packed,
        get_compiled=_get_compiled("prepack", "prepack_kernel_sm90"),
    )
    return packed


def unpack(prepacked: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Inverse of ``prepack``: codes (E, N, K/2) and block scales (E, N, K/16)."""
    if not prepacked.is_cuda or why_no_elementwise(prepacked) is not None:
        return prepack_sm90.unpack(prepacked, n, k)
    lead = (prepacked.shape[0], n)
    codes = prepacked.new_empty(*lead, nvfp4.packed_size(k))
    sf = prepacked.new_empty(*lead, nvfp4.num_blocks(k), dtype=torch.float8_e4m3fn)
    prepack_launch.launch_unpack(
        packed=dense(prepacked),
        codes=codes,
        block_scale=sf,
        get_compiled=_get_compiled("prepack", "prepack_kernel_sm90"),
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


def prepare_global_scale(x: Tensor, *, per_token: bool) -> Launch:
    """launch(x, scale): scale () of all elements of x, or (R, 1) of the rows of x (R, K)."""
    get_compiled = _get_compiled("global_scale", "amax")
    if per_token:
        launch = amax_launch.prepare_row_scales(*x.shape, x.dtype, x.device, get_compiled)
        return _with_readable_rows(launch, x)
    launch = amax_launch.prepare_tensor_scale(x.numel(), x.dtype, x.device, get_compiled)
    if x.is_contiguous():
        return _with_readable_rows(launch, x.view(1, -1))
    return lambda x, scale: launch(x.contiguous(), scale)


def _readable_rows(x: Tensor) -> Tensor:
    """x (R, K), copied where its rows do not start at multiples of 16 bytes."""
    return x if why_no_rows(x) is None else _copy(x)


# ``launch``, whose arguments at these positions are like these, given copies if need be.


def _with_readable_rows(launch: Launch, x: Tensor) -> Launch:
    """The first argument is like x."""
    return launch if why_no_rows(x) is None else _with_copies(launch, [0])


def _with_contiguous(launch: Launch, arguments: dict[int, Tensor | None]) -> Launch:
    strided = [i for i, x in arguments.items() if x is not None and not x.is_contiguous()]
    return _with_copies(launch, strided)


def _with_dense(launch: Launch, arguments: dict[int, Tensor]) -> Launch:
    return _with_copies(launch, [i for i, x in arguments.items() if not is_dense(x)])


def _with_copies(launch: Launch, positions: Sequence[int]) -> Launch:
    if not positions:
        return launch

    def launch_copies(*args: Tensor | None) -> None:
        launch(*(_copy(x) if i in positions else x for i, x in enumerate(args)))

    return launch_copies


def prepare_quantize(
    x: Tensor,
    global_scale: Tensor,
    offs: Tensor | None,
    *,
    row_tiles: int | None = None,
    activation: str = "none",
    limit: float | None = None,
) -> Launch:
    """launch(x, global_scale, offs, codes, block_scale) writes both, of the activated rows of x.

    row_tiles: of swizzled block scales (rank 4), None where they are linear.
    """
    launch = quantize_launch.prepare_quantize(
        _readable_rows(x),
        global_scale,
        offs,
        _get_compiled("quantize", "quantize_rows"),
        row_tiles=row_tiles,
        activation=activation,
        limit=limit,
    )
    return _with_contiguous(_with_readable_rows(launch, x), {1: global_scale, 2: offs})


def prepare_quantize_per_token(
    x: Tensor, offs: Tensor | None, *, k: int, activation: str = "none", limit: float | None = None
) -> Launch | None:
    """launch(x, offs, codes, block_scale, row_scale) writes these of the activated rows of x.

    k: of the activated rows. None where a row is too long for the kernel.
    """
    ragged = offs is not None
    config = per_token_launch.choose_config(
        x.dtype, k, ragged=ragged, activation=activation, limit=limit
    )
    if config is None:
        return None
    get_compiled = _get_compiled("quantize_per_token", "per_token")
    launch = per_token_launch.prepare_quantize_per_token(_readable_rows(x), config, get_compiled)
    return _with_contiguous(_with_readable_rows(launch, x), {1: offs})


def prepare_round(
    x: Tensor, global_scale: Tensor, offs: Tensor | None, token_of_row: Tensor | None
) -> Launch:
    """launch(x, global_scale, offs, token_of_row, out) writes out (R, K) bf16.

    These are the NVFP4 values of the rows of x, without the global scale.
    """
    get_compiled = _get_compiled("quantize", "quantize_rows")
    launch = quantize_launch.prepare_round(
        _readable_rows(x), global_scale, offs, token_of_row, get_compiled
    )
    given = {1: global_scale, 2: offs, 3: token_of_row}
    return _with_contiguous(_with_readable_rows(launch, x), given)


def prepare_round_per_token(
    x: Tensor, offs: Tensor | None, token_of_row: Tensor | None
) -> Launch | None:
    """launch(x, offs, token_of_row, out, row_scale) writes both; None where a row is too long."""
    config = per_token_launch.choose_config(
        x.dtype,
        x.shape[1],
        ragged=offs is not None,
        values=True,
        gather=token_of_row is not None,
    )
    if config is None:
        return None
    get_compiled = _get_compiled("quantize_per_token", "per_token")
    launch = per_token_launch.prepare_round_per_token(_readable_rows(x), config, get_compiled)
    return _with_contiguous(_with_readable_rows(launch, x), {1: offs, 2: token_of_row})


def prepare_dequantize(
    codes: Tensor,
    block_scale: Tensor,
    global_scale: Tensor | None,
    offs: Tensor | None,
    dtype: torch.dtype,
) -> Launch:
    """launch(codes, block_scale, global_scale, offs, out) writes out (R, K) or (E, N, K) of dtype.

    Without a global scale dtype is bf16, where the result is exact. Rows of no expert are zero.
    """
    get_compiled = _get_compiled("dequantize", "decode")
    launch = decode_launch.prepare_decode(
        codes, block_scale, global_scale, offs, dtype, get_compiled
    )
    launch = _with_contiguous(launch, {1: block_scale, 2: global_scale, 3: offs})
    return _with_dense(launch, {0: codes})


def prepare_swizzle(sf: Tensor, offs: Tensor | None) -> Launch:
    """launch(sf, swizzled, offs) writes ``swizzled`` from linear sf (R, C) or (E, N, C)."""
    get_compiled = _get_compiled("swizzle", "swizzle_sf")
    launch = swizzle_launch.prepare_swizzle("swizzle", sf.contiguous(), offs, get_compiled)
    return _with_contiguous(launch, {0: sf, 2: offs})


def unswizzle(swizzled: Tensor, offs: Tensor | None, sf: Tensor) -> None:
    """Write linear block scales ``sf`` (R, C) or (E, N, C), contiguous, from swizzled ones."""
    get_compiled = _get_compiled("swizzle", "swizzle_sf")
    launch = swizzle_launch.prepare_swizzle("unswizzle", sf, offs, get_compiled)
    launch(sf, swizzled.contiguous(), None if offs is None else offs.contiguous())


def prepare_sort(top_k_index: Tensor, num_experts: int) -> Launch:
    """launch(top_k_index, offs, token_of_row, row_of_slot) writes the outputs of sort_by_expert."""
    get_compiled = _get_compiled("sort_by_expert", "sort_slots")
    launch = sort_launch.prepare_sort(top_k_index, num_experts, get_compiled)
    return _with_contiguous(launch, {0: top_k_index})


def prepare_permute(x: Tensor, token_of_row: Tensor) -> Launch:
    """launch(x, token_of_row, out): out[r] = x[token_of_row[r]], 0 for -1; x (T, ...)."""
    get_compiled = _get_compiled("permute", "permute_rows")
    num_rows = token_of_row.shape[0]
    if x.ndim == 2 and x.stride(1) == 1:
        launch = permute_launch.prepare_permute(x, num_rows, get_compiled)
        return _with_contiguous(launch, {1: token_of_row})

    def rows_of(x: Tensor) -> Tensor:
        """A view where the elements of a row lie together, else a copy."""
        rows = x.reshape(x.shape[0], -1)
        return rows if rows.stride(1) == 1 else rows.contiguous()

    launch_rows = permute_launch.prepare_permute(rows_of(x), num_rows, get_compiled)
    return lambda x, tokens, out: launch_rows(rows_of(x), tokens.contiguous(), out)


def prepare_combine(rows: Tensor, row_of_slot: Tensor, top_k_weights: Tensor) -> Launch:
    """launch(rows, row_of_slot, top_k_weights, out).

    out[t] = sum over j of top_k_weights[t, j] * rows[row_of_slot[t, j]].
    """
    rows_together = rows.stride(1) == 1
    launch = combine_launch.prepare_combine(
        rows if rows_together else rows.contiguous(),
        *row_of_slot.shape,
        top_k_weights.dtype,
        _get_compiled("combine", "combine_rows"),
    )
    given = {1: row_of_slot, 2: top_k_weights}
    return _with_contiguous(launch, given if rows_together else {0: rows} | given)


def why_no_router_logits(x: Tensor, weight: Tensor) -> str | None:
    """Why the kernel does not multiply x (T, H) by a router's weight, or None where it does."""
    return why_no_elementwise(x) or router_launch.why_no_router_logits(x, weight)


def prepare_router_logits(x: Tensor, weight: Tensor) -> Launch:
    """launch(x, weight, logits) writes logits (T, E) = x @ weight.T."""
    get_compiled = _get_compiled("router_logits", "router_logits")
    launch = router_launch.prepare_router_logits(x, weight, get_compiled)
    return _with_dense(launch, {0: x, 1: weight})


def why_no_choose(logits: Tensor, top_k: int, num_groups: int = 1) -> str | None:
    """Why the kernel can not choose experts by logits (T, E), or None where it can."""
    return why_no_elementwise(logits) or choose_launch.why_no_choose(
        logits.shape[1], top_k, num_groups
    )


def prepare_choose(
    rule: Literal["softmax", "sigmoid"],
    logits: Tensor,
    correction_bias: Tensor | None,
    top_k: int,
    **options: Any,
) -> Launch:
    """launch(logits, correction_bias, index, weights) writes what the op of a rule returns.

    options: as those of softmax_top_k or sigmoid_top_k.
    """
    get_compiled = _get_compiled("choose_experts", "choose_experts")
    launch = choose_launch.prepare_choose(
        rule, logits, correction_bias, top_k, get_compiled, **options
    )
    return _with_contiguous(launch, {0: logits, 1: correction_bias})
