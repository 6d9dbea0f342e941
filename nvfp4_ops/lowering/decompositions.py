"""The elementwise ops in aten, for a compiler to fuse with what surrounds them, bit for bit.

Compilers keep neither the roundings nor the divisions of eager mode, so nothing below relies on
theirs:

- a bf16 or fp16 input is read through its bits, or a compiler that fuses its producer passes on
  the unrounded fp32 value;
- reciprocals are taken in fp64 and rounded to fp32, which is the correctly rounded quotient (fp64
  has more than twice the digits); an fp32 division may be approximate on a GPU;
- e2m1 and e4m3 are encoded by comparisons and integers, not by a cast that may be skipped;
- there is no sum of a product that could become one fused multiply-add.

A function returns NotImplemented for arguments that it has nothing for, as decompositions do.
"""

import torch
from torch import Tensor

from nvfp4_ops import activation as activations
from nvfp4_ops import format as nvfp4
from nvfp4_ops.activation import Activation

_FP32_MAX = torch.finfo(torch.float32).max
_FP32_MANTISSA_BITS, _FP32_BIAS = 23, 127
_E4M3_MANTISSA_BITS, _E4M3_BIAS = 3, 7
# Mantissa bits that e4m3 drops of an fp32 number, and what its exponents are apart.
_DROPPED_BITS = _FP32_MANTISSA_BITS - _E4M3_MANTISSA_BITS
_BIAS_SHIFT = (_FP32_BIAS - _E4M3_BIAS) << _E4M3_MANTISSA_BITS
_E4M3_MIN_NORMAL = 2.0**-6

# Where the nearest code changes, and whether the tie goes up, to the even code.
_E2M1_STEPS = tuple(
    ((low + high) / 2, code % 2 == 1)
    for code, (low, high) in enumerate(zip(nvfp4.E2M1_VALUES, nvfp4.E2M1_VALUES[1:], strict=False))
)


def exact_float(x: Tensor) -> Tensor:
    """fp32 of x as it is stored: a fused producer is rounded to the dtype of x first."""
    return x if x.dtype == torch.float32 else x.view(torch.int16).view(x.dtype).float()


def reciprocal(x: Tensor) -> Tensor:
    """fp32 1 / x, correctly rounded."""
    return torch.reciprocal(x.double()).float()


def encode_e2m1(values: Tensor, negative: Tensor) -> Tensor:
    """int32 codes of fp32 ``values``, as ``reference.encode_e2m1``; signs are ``negative``."""
    magnitude = values.abs()
    codes = torch.zeros_like(values, dtype=torch.int32)
    for threshold, tie_goes_up in _E2M1_STEPS:
        above = magnitude >= threshold if tie_goes_up else magnitude > threshold
        codes = codes + above.int()
    codes = codes | (negative.int() * nvfp4.E2M1_SIGN_BIT)
    return torch.where(values.isnan(), nvfp4.E2M1_NAN_CODE, codes)


def encode_e4m3(values: Tensor) -> Tensor:
    """int32 e4m3 bytes of fp32 ``values`` >= 0 or NaN, as ``reference.encode_e4m3``."""
    saturated = values.clamp(max=nvfp4.E4M3_MAX)
    bits = saturated.view(torch.int32)
    to_even = (bits >> _DROPPED_BITS) & 1
    half = (1 << (_DROPPED_BITS - 1)) - 1
    normal = ((bits + half + to_even) >> _DROPPED_BITS) - _BIAS_SHIFT
    subnormal = torch.round(saturated * (1.0 / nvfp4.E4M3_MIN_SUBNORMAL)).int()
    sf_bytes = torch.where(saturated < _E4M3_MIN_NORMAL, subnormal, normal)
    return torch.where(values.isnan(), nvfp4.E4M3_NAN_BYTE, sf_bytes)


def decode_e4m3(sf_bytes: Tensor) -> Tensor:
    """fp32 values of int32 e4m3 bytes."""
    magnitude = sf_bytes & nvfp4.E4M3_NAN_BYTE
    normal = ((magnitude + _BIAS_SHIFT) << _DROPPED_BITS).view(torch.float32)
    subnormal = magnitude.float() * nvfp4.E4M3_MIN_SUBNORMAL
    values = torch.where(magnitude < 1 << _E4M3_MANTISSA_BITS, subnormal, normal)
    values = torch.where(magnitude == nvfp4.E4M3_NAN_BYTE, torch.nan, values)
    return torch.where(sf_bytes > nvfp4.E4M3_NAN_BYTE, -values, values)


def decode_e2m1(codes: Tensor) -> Tensor:
    """fp32 values of int32 codes 0..15."""
    exponent, mantissa = (codes >> 1) & 3, codes & 1
    quarters = torch.where(exponent == 0, 2 * mantissa, (2 + mantissa) << exponent)
    magnitude = quarters.float() * 0.25
    return torch.where(codes >= nvfp4.E2M1_SIGN_BIT, -magnitude, magnitude)


def _is_negative(x: Tensor) -> Tensor:
    """Sign bit of fp32 x, also of -0."""
    return x.view(torch.int32) < 0


def _inside(offs: Tensor, num_rows: int) -> Tensor:
    """(R, 1): whether a row belongs to an expert."""
    return (torch.arange(num_rows, device=offs.device) < offs[-1]).unsqueeze(1)


def quantize_nvfp4(
    x: Tensor, global_scale: Tensor, offs: Tensor | None = None, swizzled: bool = False
) -> tuple[Tensor, Tensor]:
    """As the op, but for a scale per expert and swizzled scales of ragged rows."""
    if offs is not None and (global_scale.ndim == 1 or swizzled):
        return NotImplemented
    rows, k = x.shape
    scale = global_scale if global_scale.ndim == 0 else global_scale.reshape(-1, 1)
    encode = reciprocal(scale).clamp(max=_FP32_MAX)
    # Even and odd elements apart: what is reduced and what is packed then have one shape, and a
    # compiler makes one kernel of them.
    pairs = exact_float(x).reshape(rows, nvfp4.num_blocks(k), nvfp4.BLOCK_SIZE // 2, 2)
    even, odd = pairs.unbind(-1)
    amax = torch.maximum(even.abs(), odd.abs()).amax(dim=-1)
    sixth = torch.full((), 1.0 / nvfp4.E2M1_MAX, dtype=torch.float32, device=x.device)
    sf_bytes = encode_e4m3(amax * (encode * sixth))
    block_scale = decode_e4m3(sf_bytes)
    inverse = reciprocal(block_scale * reciprocal(encode)).clamp(max=_FP32_MAX)
    inverse = torch.where(block_scale == 0, 0.0, inverse).unsqueeze(-1)
    low, high = (encode_e2m1(half * inverse, _is_negative(half)) for half in (even, odd))
    codes = (low | (high << 4)).to(torch.uint8).reshape(rows, nvfp4.packed_size(k))
    sf = sf_bytes.to(torch.uint8)
    if offs is not None:
        inside = _inside(offs, rows)
        codes, sf = torch.where(inside, codes, 0), torch.where(inside, sf, 0)
    block_scale = sf.view(torch.float8_e4m3fn)
    return codes, swizzle_sf(block_scale) if swizzled else block_scale


def activate_and_quantize_nvfp4(
    x: Tensor,
    global_scale: Tensor,
    offs: Tensor | None,
    activation: str,
    limit: float | None = None,
    swizzled: bool = False,
) -> tuple[Tensor, Tensor]:
    """As the op where the activation has no exponential; those differ in the last place."""
    activated = activations.apply(Activation(activation, limit), exact_float(x)).to(x.dtype)
    return quantize_nvfp4(activated, global_scale, offs, swizzled)


def dequantize_nvfp4(
    codes: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    offs: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """As the op, but for swizzled scales and a scale per expert of ragged rows."""
    if block_scale.ndim == 4 or (offs is not None and global_scale.ndim == 1):
        return NotImplemented
    packed = codes.int()
    values = decode_e2m1(torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2))
    blocks = values.unflatten(-1, (block_scale.shape[-1], nvfp4.BLOCK_SIZE))
    sf = decode_e4m3(block_scale.view(torch.uint8).int())
    scale = global_scale
    if scale.ndim > 0:
        scale = scale.reshape(-1, *[1] * (codes.ndim - 1))
    out = (blocks * sf.unsqueeze(-1)).flatten(-2) * scale
    if dtype is not None and dtype != torch.float32:
        # Through its bits, or a consumer that is fused sees the value before this rounding.
        out = out.to(dtype).view(torch.int16).view(dtype)
    return out if offs is None else torch.where(_inside(offs, codes.shape[0]), out, 0)


def swizzle_sf(sf: Tensor, offs: Tensor | None = None) -> Tensor:
    """As the op, but for ragged rows."""
    if offs is not None:
        return NotImplemented
    rows, cols = sf.shape[-2:]
    row_tiles, col_tiles, lines, line_bytes = nvfp4.swizzled_shape((rows, cols))
    cells = nvfp4.SWIZZLE_TILE_COLS
    padding = (
        *(0, col_tiles * cells - cols),
        *(0, row_tiles * nvfp4.SWIZZLE_TILE_ROWS - rows),
    )
    padded = torch.nn.functional.pad(sf.view(torch.uint8), padding)
    tiles = padded.reshape(-1, line_bytes // cells, lines, col_tiles, cells)
    swizzled = tiles.permute(0, 3, 2, 1, 4)
    return swizzled.reshape(-1, col_tiles, lines, line_bytes).view(sf.dtype)
