"""The definitions of this package written a second time, without torch and without the package.

NumPy does one IEEE fp32 operation at a time, ml_dtypes does the narrow casts, layouts are plain
loops over the published formulas. Tests compare bytes with these functions, so nothing here may
import ``nvfp4_ops``. Scales of rows are given one per row, codes and e4m3 scales are uint8.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Bytes = npt.NDArray[np.uint8]

F32 = np.float32
F32_MAX = np.finfo(np.float32).max


def encode_e2m1(values: Floats) -> Bytes:
    """One code per element. ml_dtypes saturates too, but writes NaN as -0."""
    clipped = np.clip(values, F32(-6), F32(6))
    with np.errstate(invalid="ignore"):
        codes = clipped.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    return np.where(np.isnan(values), np.uint8(7), codes)


def decode_e2m1(codes: Bytes) -> Floats:
    return codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)


def encode_e4m3(values: Floats) -> Bytes:
    """ml_dtypes overflows to NaN where this format saturates, and keeps the sign of a NaN."""
    clipped = np.clip(values, F32(-448), F32(448))
    with np.errstate(invalid="ignore"):
        sf_bytes = clipped.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return np.where(np.isnan(values), np.uint8(0x7F), sf_bytes)


def decode_e4m3(sf_bytes: Bytes) -> Floats:
    return sf_bytes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def pack(codes: Bytes) -> Bytes:
    rows, k = codes.shape
    packed = np.zeros((rows, k // 2), np.uint8)
    for byte in range(k // 2):
        packed[:, byte] = codes[:, 2 * byte] + 16 * codes[:, 2 * byte + 1]
    return packed


def unpack(packed: Bytes) -> Bytes:
    rows, num_bytes = packed.shape
    codes = np.zeros((rows, 2 * num_bytes), np.uint8)
    for byte in range(num_bytes):
        codes[:, 2 * byte] = packed[:, byte] % 16
        codes[:, 2 * byte + 1] = packed[:, byte] // 16
    return codes


def dequantize(packed: Bytes, sf_bytes: Bytes, row_scale: Floats) -> Floats:
    """fp32; the products are exact in float64, so this rounds once."""
    values = decode_e2m1(unpack(packed)) * np.repeat(decode_e4m3(sf_bytes), 16, axis=1)
    with np.errstate(over="ignore"):
        return (values * row_scale.astype(np.float64)[:, None]).astype(F32)


def quantize_rows(x: Floats, row_scale: Floats) -> tuple[Bytes, Bytes]:
    """Transformer Engine's activation rule. x (R, K) fp32, row_scale (R,) fp32."""
    rows, k = x.shape
    blocks = x.reshape(rows, k // 16, 16)
    with np.errstate(all="ignore"):
        encode = np.minimum(F32(1) / row_scale, F32_MAX)[:, None]
        amax = np.max(np.abs(blocks), axis=2)
        sf_bytes = encode_e4m3(amax * (encode * F32(1 / 6)))
        block_scale = decode_e4m3(sf_bytes).astype(F32)
        decode = block_scale * (F32(1) / encode)
        inv_scale = np.minimum(F32(1) / decode, F32_MAX)
        inv_scale = np.where(block_scale == 0, F32(0), inv_scale)
        scaled = blocks * inv_scale[:, :, None]
    assert scaled.dtype == F32
    return pack(encode_e2m1(scaled).reshape(rows, k)), sf_bytes


def row_scales(scale: Floats, ends: Sequence[int] | None, num_rows: int) -> Floats:
    """One scale per row from one in all, one per expert (with ``ends``), or one per row."""
    if scale.ndim == 0:
        return np.full(num_rows, scale, F32)
    if scale.ndim == 1 and ends is not None:
        rows = np.ones(num_rows, F32)
        for expert, row, _ in ragged_rows(ends):
            rows[row] = scale[expert]
        return rows
    return scale.reshape(num_rows)


def quantize(x: Floats, scale: Floats, ends: Sequence[int] | None = None) -> tuple[Bytes, Bytes]:
    """quantize_rows with the forms of scale that the op takes; rows past the end are zero."""
    codes, sf_bytes = quantize_rows(x, row_scales(scale, ends, len(x)))
    if ends is not None:
        codes[ends[-1] :] = 0
        sf_bytes[ends[-1] :] = 0
    return codes, sf_bytes


def global_scale(amax: np.float32) -> np.float32:
    """Of activations: amax / 2688, at least the smallest normal; 1 where amax is 0 or Inf."""
    if amax == 0 or np.isinf(amax):
        return F32(1)
    return np.maximum(amax / F32(2688), F32(2.0**-126))


def weight_global_scale(w: Floats) -> np.float32:
    scale = np.max(np.abs(w)) / F32(2688)
    return scale if scale != 0 else F32(1)


def quantize_weight(w: Floats, scale: np.float32) -> tuple[Bytes, Bytes]:
    """ModelOpt's rule. w (N, K) fp32. Quotients that underflow count as zeros, as in its code."""
    rows, k = w.shape
    blocks = w.reshape(rows, k // 16, 16)
    with np.errstate(all="ignore"):
        amax = np.max(np.abs(blocks), axis=2)
        unclamped = amax / (F32(6) * scale)
        clamped = np.clip(unclamped, F32(2.0**-9), F32(448))
        sf_bytes = encode_e4m3(np.where(unclamped == 0, F32(1), clamped))
        step = decode_e4m3(sf_bytes).astype(F32) * scale
        scaled = blocks / step[:, :, None]
    assert scaled.dtype == F32
    codes = np.where(scaled == 0, np.uint8(0), encode_e2m1(scaled))
    return pack(codes.reshape(rows, k)), sf_bytes


def swizzled_byte(row: int, col: int, num_cols: int) -> int:
    col_tiles = -(-num_cols // 4)
    tile = (row // 128) * col_tiles + col // 4
    return tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + col % 4


def swizzle(sf_bytes: Bytes) -> Bytes:
    """Flat bytes of one matrix (R, C), rows padded to 128 and columns to 4 with zeros."""
    rows, cols = sf_bytes.shape
    flat = np.zeros(-(-rows // 128) * -(-cols // 4) * 512, np.uint8)
    for row in range(rows):
        for col in range(cols):
            flat[swizzled_byte(row, col, cols)] = sf_bytes[row, col]
    return flat


def ragged_rows(ends: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(expert, row, row of the padded matrix) for every row that belongs to an expert."""
    start, padded_start = 0, 0
    for expert, end in enumerate(ends):
        for row in range(start, end):
            yield expert, row, padded_start + row - start
        padded_start += -(-(end - start) // 128) * 128
        start = end


def swizzle_ragged(sf_bytes: Bytes, ends: Sequence[int]) -> Bytes:
    """Flat bytes of ragged rows: each expert on a 128-row tile of its own, then unused tiles."""
    rows, cols = sf_bytes.shape
    bound = (rows + 127 * len(ends)) // 128
    flat = np.zeros(bound * -(-cols // 4) * 512, np.uint8)
    for _, row, padded_row in ragged_rows(ends):
        for col in range(cols):
            flat[swizzled_byte(padded_row, col, cols)] = sf_bytes[row, col]
    return flat
