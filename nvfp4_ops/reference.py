"""NVFP4: what the ops mean, in plain PyTorch on any device.

Every op of the package has its namesake here with the same arguments. These functions are the
oracle of the tests and the CPU kernels of the ops. They trust their arguments: the ops check.

Where bits are defined (quantize, swizzle) the arithmetic below *is* the definition: separate
IEEE fp32 operations, each rounded to nearest even. The grouped matmul has no defined summation
order, so it is computed in float64 and rounded once to fp32: products of NVFP4 values are exact
there, and so is nearly every sum of them, whatever the order.
"""

import torch
from torch import Tensor

from nvfp4_ops import activation as activations
from nvfp4_ops import format as nvfp4
from nvfp4_ops.activation import Activation

_FP32_MAX = torch.finfo(torch.float32).max
# Groups of 32 rows that share the lines of a swizzled tile.
_LINE_GROUPS = nvfp4.SWIZZLE_LINE_BYTES // nvfp4.SWIZZLE_TILE_COLS


def encode_e2m1(values: Tensor) -> Tensor:
    """Nearest e2m1 code of each fp32 value, ties to even, saturating: uint8 codes 0..15.

    The sign bit is kept, also of -0 and of negatives that round to zero. NaN gives code 7.
    """
    magnitude = values.abs()
    # Codes are 0.5 apart below 2, 1 apart below 4, 2 apart above: round to that grid.
    codes = torch.where(
        magnitude < 2.0,
        torch.round(magnitude * 2.0),
        torch.where(magnitude < 4.0, magnitude.round() + 2.0, torch.round(magnitude * 0.5) + 4.0),
    )
    codes = codes.nan_to_num(nan=nvfp4.E2M1_NAN_CODE).clamp(max=nvfp4.E2M1_MAX_CODE)
    negative = torch.signbit(values) & ~values.isnan()
    return codes.to(torch.uint8) | (negative.to(torch.uint8) * nvfp4.E2M1_SIGN_BIT)


def decode_e2m1(codes: Tensor) -> Tensor:
    """fp32 value of each uint8 code 0..15: (2 + m) * 2^e / 4, or m / 2 where e is 0."""
    exponent, mantissa = (codes >> 1) & 3, codes & 1
    quarters = torch.where(exponent == 0, 2 * mantissa, (2 + mantissa) << exponent)
    magnitude = quarters.float() * 0.25
    return torch.where(codes >= nvfp4.E2M1_SIGN_BIT, -magnitude, magnitude)


def pack_codes(codes: Tensor) -> Tensor:
    """(..., K) codes 0..15 -> (..., K / 2) bytes, the even element in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_codes(packed: Tensor) -> Tensor:
    """(..., K / 2) bytes -> (..., K) codes 0..15; the inverse of ``pack_codes``."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def encode_e4m3(values: Tensor) -> Tensor:
    """Nearest e4m3 of each fp32 value, ties to even, saturating at +-448; NaN is byte 0x7F."""
    # Older PyTorch casts overflow to NaN, so saturate first; clamp lets NaN through.
    encoded = values.clamp(-nvfp4.E4M3_MAX, nvfp4.E4M3_MAX).to(torch.float8_e4m3fn)
    # The sign of a computed NaN differs between processors.
    sf_bytes = torch.where(values.isnan(), nvfp4.E4M3_NAN_BYTE, encoded.view(torch.uint8))
    return sf_bytes.view(torch.float8_e4m3fn)


def decode_blocks(packed: Tensor, block_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """e2m1 * block scale, exact in bf16 and wider: (..., K / 2), (..., K / 16) -> (..., K)."""
    # Looked up two at a time: 256 bytes are quicker to decode than all of them.
    every_byte = torch.arange(256, dtype=torch.uint8, device=packed.device)
    byte_values = decode_e2m1(unpack_codes(every_byte.unsqueeze(-1))).to(dtype)
    values = byte_values[packed.int()]
    blocks = values.reshape(*block_scale.shape, nvfp4.BLOCK_SIZE)
    return (blocks * block_scale.to(dtype).unsqueeze(-1)).flatten(-2)


def expert_of_row(offs: Tensor, num_rows: int) -> Tensor:
    """Expert of each row, (R,) int64; E for the rows past ``offs[-1]``.

    >>> expert_of_row(torch.tensor([2, 2, 5]), 6).tolist()
    [0, 0, 2, 2, 2, 3]
    """
    rows = torch.arange(num_rows, device=offs.device, dtype=offs.dtype)
    return torch.searchsorted(offs, rows, right=True)


def _per_row(per_expert: Tensor, expert: Tensor) -> Tensor:
    """Entry (or row) of ``per_expert`` (E, ...) for each row's expert, ones past the end."""
    past_end = torch.ones_like(per_expert[:1])
    return torch.cat([per_expert, past_end])[expert]


def _broadcast_global_scale(global_scale: Tensor, offs: Tensor | None, num_rows: int) -> Tensor:
    """() stays, everything else becomes (R, 1)."""
    if global_scale.ndim == 1 and offs is not None:
        return _per_row(global_scale, expert_of_row(offs, num_rows)).unsqueeze(-1)
    return global_scale if global_scale.ndim == 0 else global_scale.reshape(-1, 1)


def _over_divisor(amax: Tensor) -> Tensor:
    """fp32 amax / 2688, correctly rounded on every device."""
    # A tensor, because CUDA multiplies by the rounded reciprocal of a Python number.
    return amax / torch.full((), nvfp4.GLOBAL_SCALE_DIVISOR, device=amax.device)


def global_scale_of_amax(amax: Tensor) -> Tensor:
    """ModelOpt's rule, also for static input scales: amax / 2688, and 1.0 where that is 0."""
    scale = _over_divisor(amax)
    return torch.where(scale == 0, 1.0, scale)


def global_scale(x: Tensor, per_token: bool = False) -> Tensor:
    if per_token:
        amax = x.abs().amax(dim=-1, keepdim=True).float()
    elif x.numel() == 0:
        return torch.ones((), dtype=torch.float32, device=x.device)
    else:
        amax = x.abs().amax().float()
    scale = _over_divisor(amax).clamp(min=nvfp4.GLOBAL_SCALE_MIN)
    # Nothing to scale by in an all-zero row, nor in one that holds an Inf.
    return torch.where((amax == 0) | amax.isinf(), 1.0, scale)


def quantize_nvfp4(
    x: Tensor, global_scale: Tensor, offs: Tensor | None = None, swizzled: bool = False
) -> tuple[Tensor, Tensor]:
    rows, k = x.shape
    scale = _broadcast_global_scale(global_scale, offs, rows)
    encode = (1.0 / scale).clamp(max=_FP32_MAX)
    blocks = x.float().contiguous().view(rows, nvfp4.num_blocks(k), nvfp4.BLOCK_SIZE)
    amax = blocks.abs().amax(dim=-1)
    # 1/6 is rounded to fp32 first: this is part of the rule.
    sixth = torch.full((), 1.0 / nvfp4.E2M1_MAX, device=x.device)
    block_scale = encode_e4m3(amax * (encode * sixth))
    decode = block_scale.float() * (1.0 / encode)
    inv_scale = torch.where(block_scale.float() == 0, 0.0, (1.0 / decode).clamp(max=_FP32_MAX))
    codes = pack_codes(encode_e2m1(blocks * inv_scale.unsqueeze(-1)).flatten(-2))
    if offs is not None:
        inside = (torch.arange(rows, device=x.device) < offs[-1]).unsqueeze(-1)
        codes = torch.where(inside, codes, 0)
        sf_bytes = torch.where(inside, block_scale.view(torch.uint8), 0)
        block_scale = sf_bytes.view(torch.float8_e4m3fn)
    return codes, swizzle_sf(block_scale, offs) if swizzled else block_scale


def activate_and_quantize_nvfp4(
    x: Tensor,
    global_scale: Tensor,
    activation: Activation,
    offs: Tensor | None = None,
    swizzled: bool = False,
) -> tuple[Tensor, Tensor]:
    activated = activations.apply(activation, x.float()).to(x.dtype)
    return quantize_nvfp4(activated, global_scale, offs, swizzled)


def one_past_the_end(row_scale: Tensor, offs: Tensor | None) -> Tensor:
    """row_scale (R, 1), with 1 for the rows of no expert."""
    if offs is None:
        return row_scale
    rows = torch.arange(row_scale.shape[0], device=row_scale.device).unsqueeze(-1)
    return torch.where(rows < offs[-1], row_scale, 1.0)


def quantize_per_token_nvfp4(
    x: Tensor, activation: Activation, offs: Tensor | None = None, swizzled: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    activated = activations.apply(activation, x.float()).to(x.dtype)
    row_scale = one_past_the_end(global_scale(activated, per_token=True), offs)
    return *quantize_nvfp4(activated, row_scale, offs, swizzled), row_scale


def gather_rows(x: Tensor, token_of_row: Tensor) -> Tensor:
    """(R, K): row token_of_row[r] of x (T, K), zeros for -1."""
    # -1 is the row of zeros that is appended.
    return torch.cat([x, x.new_zeros((1, x.shape[1]))])[token_of_row.long()]


def round_nvfp4(
    x: Tensor,
    global_scale: Tensor,
    offs: Tensor | None = None,
    token_of_row: Tensor | None = None,
) -> Tensor:
    rows = x if token_of_row is None else gather_rows(x, token_of_row)
    values = decode_blocks(*quantize_nvfp4(rows, global_scale, offs), torch.bfloat16)
    if token_of_row is not None:
        # Zeros over a scale of NaN are NaN.
        values = torch.where((token_of_row >= 0).unsqueeze(-1), values, 0)
    return values


def round_per_token_nvfp4(
    x: Tensor, offs: Tensor | None = None, token_of_row: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    rows = x if token_of_row is None else gather_rows(x, token_of_row)
    codes, block_scale, row_scale = quantize_per_token_nvfp4(rows, Activation(), offs)
    return decode_blocks(codes, block_scale, torch.bfloat16), row_scale


def quantize_weight(w: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """ModelOpt's rule: w (..., N, K), global_scale () or (E, 1, 1) -> codes, block scales."""
    blocks = w.float().unflatten(-1, (-1, nvfp4.BLOCK_SIZE))
    amax = blocks.abs().amax(dim=-1)
    scaled = amax / (nvfp4.E2M1_MAX * global_scale)
    scaled = torch.where(scaled == 0, 1.0, scaled.clamp(min=nvfp4.E4M3_MIN_SUBNORMAL))
    block_scale = encode_e4m3(scaled)
    quotient = blocks / (block_scale.float() * global_scale).unsqueeze(-1)
    # This rule takes the sign from ``quotient < 0``, so -0.0 is code 0.
    codes = torch.where(quotient == 0, 0, encode_e2m1(quotient))
    return pack_codes(codes.flatten(-2)), block_scale


def dequantize_nvfp4(
    codes: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    offs: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    *lead, packed_k = codes.shape
    if block_scale.ndim == 4:
        shape = (*lead, nvfp4.num_blocks(packed_k * nvfp4.CODES_PER_BYTE))
        block_scale = unswizzle_sf(block_scale, shape, offs)
    if codes.ndim == 3:
        scale = global_scale if global_scale.ndim == 0 else global_scale.reshape(-1, 1, 1)
    else:
        scale = _broadcast_global_scale(global_scale, offs, codes.shape[0])
    values = (decode_blocks(codes, block_scale, torch.float32) * scale).to(dtype)
    if offs is not None:
        rows = torch.arange(codes.shape[0], device=codes.device)
        values = torch.where((rows < offs[-1]).unsqueeze(-1), values, 0)
    return values


def _tile_row(offs: Tensor | None, num_rows: int, bound_rows: int, device: torch.device) -> Tensor:
    """Row of the padded, tile-aligned scale matrix that each linear row goes to.

    Rows that belong to no expert go to ``bound_rows``, one past the end.
    """
    rows = torch.arange(num_rows, device=device)
    if offs is None:
        return rows
    ends = offs.long()
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    tiles = (ends - starts + nvfp4.SWIZZLE_TILE_ROWS - 1) // nvfp4.SWIZZLE_TILE_ROWS
    shift = (tiles.cumsum(0) - tiles) * nvfp4.SWIZZLE_TILE_ROWS - starts
    expert = expert_of_row(offs, num_rows)
    shifted = rows + torch.cat([shift, shift.new_zeros(1)])[expert]
    return torch.where(expert < offs.shape[0], shifted, bound_rows)


def swizzle_sf(sf: Tensor, offs: Tensor | None = None) -> Tensor:
    num_experts = None if offs is None else offs.shape[0]
    shape = nvfp4.swizzled_shape(sf.shape, num_experts)
    if sf.ndim == 3:
        per_expert = [swizzle_sf(expert_sf) for expert_sf in sf]
        return torch.cat(per_expert) if per_expert else sf.new_empty(shape)
    row_tiles, col_tiles, *_ = shape
    bound_rows = row_tiles * nvfp4.SWIZZLE_TILE_ROWS
    # One spare row at the end takes the rows of no expert and is cut off again.
    padded = torch.zeros(
        bound_rows + 1,
        col_tiles * nvfp4.SWIZZLE_TILE_COLS,
        dtype=torch.uint8,
        device=sf.device,
    )
    target = _tile_row(offs, sf.shape[0], bound_rows, sf.device)
    padded[target, : sf.shape[1]] = sf.view(torch.uint8)
    tiles = padded[:bound_rows].view(
        row_tiles, _LINE_GROUPS, nvfp4.SWIZZLE_LINES, col_tiles, nvfp4.SWIZZLE_TILE_COLS
    )
    return tiles.permute(0, 3, 2, 1, 4).reshape(shape).view(sf.dtype)


def unswizzle_sf(sf: Tensor, shape: tuple[int, ...], offs: Tensor | None = None) -> Tensor:
    if len(shape) == 3:
        tiles_per_expert = nvfp4.swizzled_shape(shape[1:])[0]
        experts = sf.unflatten(0, (shape[0], tiles_per_expert))
        per_expert = [unswizzle_sf(tiles, shape[1:]) for tiles in experts]
        return torch.stack(per_expert) if per_expert else sf.new_empty(shape)
    rows, cols = shape
    row_tiles, col_tiles, *_ = sf.shape
    tiles = sf.view(torch.uint8).view(
        row_tiles, col_tiles, nvfp4.SWIZZLE_LINES, _LINE_GROUPS, nvfp4.SWIZZLE_TILE_COLS
    )
    bound_rows = row_tiles * nvfp4.SWIZZLE_TILE_ROWS
    padded_cols = col_tiles * nvfp4.SWIZZLE_TILE_COLS
    padded = tiles.permute(0, 3, 2, 1, 4).reshape(bound_rows, padded_cols)
    padded = torch.cat([padded, padded.new_zeros(1, padded_cols)])
    source = _tile_row(offs, rows, bound_rows, sf.device)
    return padded[source, :cols].contiguous().view(sf.dtype)


def _epilogue(
    acc: Tensor, alpha: Tensor, row_scale: Tensor | None, bias: Tensor | None, act: Activation
) -> Tensor:
    """float64 acc (M, N), alpha (M or 1, 1 or 2), row_scale (M, 1), bias (M or 1, N)."""
    segments = acc.unflatten(-1, (alpha.shape[-1], -1)) * alpha.double().unsqueeze(-1)
    out = segments.flatten(-2)
    if row_scale is not None:
        out = out * row_scale.double()
    if bias is not None:
        out = out + bias.double()
    return out if act.name == "none" else activations.apply(act, out)


def grouped_scaled_mm(  # noqa: PLR0913 - the equation has this many terms
    a: Tensor,
    b: Tensor,
    sf_a: Tensor | None,
    sf_b: Tensor,
    alpha: Tensor,
    offs: Tensor,
    *,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: Activation = Activation(),  # noqa: B008 - frozen
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    rows, (num_experts, n, packed_k) = a.shape[0], b.shape
    blocks = nvfp4.num_blocks(packed_k * nvfp4.CODES_PER_BYTE)
    if sf_b.ndim == 4:
        sf_b = unswizzle_sf(sf_b, (num_experts, n, blocks))
    if sf_a is not None and sf_a.ndim == 4:
        sf_a = unswizzle_sf(sf_a, (rows, blocks), offs)
    alpha = alpha.reshape(num_experts, -1)
    row_scale = None if row_scale is None else row_scale.reshape(rows, 1)
    a64 = a.double() if sf_a is None else decode_blocks(a, sf_a, torch.float64)
    n_out = n // 2 if activation.gated else n
    out = torch.zeros(rows, n_out, dtype=torch.float64, device=a.device)
    if a.device.type == "cpu":
        starts = [0, *offs.tolist()]
        for expert in range(num_experts):
            span = slice(starts[expert], starts[expert + 1])
            if span.start == span.stop:
                continue
            w64 = decode_blocks(b[expert], sf_b[expert], torch.float64)
            out[span] = _epilogue(
                a64[span] @ w64.T,
                alpha[expert : expert + 1],
                None if row_scale is None else row_scale[span],
                None if bias is None else bias[expert : expert + 1],
                activation,
            )
    else:
        # Without reading ``offs`` on the host every expert multiplies every row.
        expert_per_row = expert_of_row(offs, rows).unsqueeze(-1)
        for expert in range(num_experts):
            w64 = decode_blocks(b[expert], sf_b[expert], torch.float64)
            result = _epilogue(
                a64 @ w64.T,
                alpha[expert : expert + 1],
                row_scale,
                None if bias is None else bias[expert : expert + 1],
                activation,
            )
            out = torch.where(expert_per_row == expert, result, out)
    return out.float().to(out_dtype)
