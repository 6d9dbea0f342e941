"""NVFP4: what the format is. Constants, shape arithmetic and scale layouts; no tensors.

An NVFP4 value is ``e2m1(code) * e4m3(block_scale) * global_scale``.

=========  ====================================================================================
e2m1       4 bits: sign, 2 exponent bits (bias 1), 1 mantissa bit. No Inf, no NaN, max 6.
           Codes 0..7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign.
e4m3       8 bits: sign, 4 exponent bits (bias 7), 3 mantissa bits. No Inf, NaN is S.1111.111,
           max 448, smallest normal 2^-6, smallest subnormal 2^-9. ``torch.float8_e4m3fn``.
block      16 consecutive elements along K share one e4m3 block scale.
global     one fp32 scale per tensor, per expert or per row: a *decode* scale (multiply to
           recover), ``amax / (6 * 448)``, so that the largest block scale is the largest e4m3.
=========  ====================================================================================

Codes are packed two to a byte along K: the low nibble is the even element. The rank of a tensor
tells its layout: linear block scales have rank 2 (3 with experts), swizzled ones have rank 4.
"""

from collections.abc import Sequence

BLOCK_SIZE = 16
"""Consecutive elements along K that share a block scale."""

CODES_PER_BYTE = 2

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the codes 0..7; code 8 + i is the negative of code i."""

E2M1_MAX = 6.0
E2M1_MAX_CODE = 7
E2M1_SIGN_BIT = 8
E2M1_NAN_CODE = 7
"""e2m1 has no NaN: a NaN element is written as +6, as PTX ``cvt.satfinite`` does. Its block scale
is NaN, so it still decodes to NaN."""

E4M3_MAX = 448.0
E4M3_MIN_SUBNORMAL = 2.0**-9
E4M3_NAN_BYTE = 0x7F

GLOBAL_SCALE_DIVISOR = E2M1_MAX * E4M3_MAX
"""``global_scale = amax / 2688``."""

GLOBAL_SCALE_MIN = 2.0**-126
"""Floor of a computed global scale: the smallest normal fp32, whose reciprocal is finite."""

# The 128x4 scale atom that PyTorch and cuBLAS call SWIZZLE_32_4_4: 512 bytes hold the scales of 128
# rows x 4 blocks, as 32 lines of 16 bytes.
SWIZZLE_TILE_ROWS = 128
SWIZZLE_TILE_COLS = 4
SWIZZLE_LINES = 32
SWIZZLE_LINE_BYTES = 16
SWIZZLE_TILE_BYTES = SWIZZLE_TILE_ROWS * SWIZZLE_TILE_COLS


def ceil_div(value: int, divisor: int) -> int:
    """Quotient rounded up; also for symbolic sizes."""
    return (value + divisor - 1) // divisor


def packed_size(k: int) -> int:
    """Bytes that hold ``k`` codes."""
    return k // CODES_PER_BYTE


def num_blocks(k: int) -> int:
    """Block scales that ``k`` elements need."""
    return k // BLOCK_SIZE


def swizzled_tile_bound(num_rows: int, num_experts: int) -> int:
    """Upper bound of the 128-row tiles that ragged rows need, known without reading ``offs``.

    Each expert starts on a tile of its own. With ``m_e`` rows it takes ``ceil(m_e / 128)`` tiles,
    at most ``(m_e + 127) / 128``; summed over the experts and floored this is
    ``(R + 127 E) // 128``.

    >>> swizzled_tile_bound(5, 3)  # rows per expert 2, 0, 3 need 2 tiles
    3
    """
    return (num_rows + (SWIZZLE_TILE_ROWS - 1) * num_experts) // SWIZZLE_TILE_ROWS


def swizzled_shape(shape: Sequence[int], num_experts: int | None = None) -> tuple[int, ...]:
    """Shape of the swizzled form of linear block scales.

    shape: (R, C) of activation scales or (E, N, C) of weight scales, C = K / 16.
    num_experts: E where the rows of (R, C) are ragged (grouped by ``offs``), else None.

    Returns (row tiles, column tiles, 32, 16). Weight experts are swizzled one by one and
    concatenated along the row tiles.

    >>> swizzled_shape((300, 7))
    (3, 2, 32, 16)
    >>> swizzled_shape((8, 192, 7))
    (16, 2, 32, 16)
    >>> swizzled_shape((300, 7), num_experts=4)
    (6, 2, 32, 16)
    """
    *experts, rows, cols = shape
    if num_experts is None:
        row_tiles = ceil_div(rows, SWIZZLE_TILE_ROWS)
        for count in experts:
            row_tiles = row_tiles * count
    else:
        row_tiles = swizzled_tile_bound(rows, num_experts)
    return (row_tiles, ceil_div(cols, SWIZZLE_TILE_COLS), SWIZZLE_LINES, SWIZZLE_LINE_BYTES)


def swizzled_offset(row: int, col: int, num_cols: int) -> int:
    """Byte offset of scale (row, col) in a swizzled buffer whose linear form has ``num_cols``.

    Inside a tile the 128 rows are four groups of 32: line = row % 32, and a line holds the four
    columns of rows line, line + 32, line + 64, line + 96 one after the other.

    >>> [swizzled_offset(row, 0, 4) for row in (0, 1, 32, 64, 128)]
    [0, 16, 4, 8, 512]
    >>> swizzled_offset(0, 5, 8)
    513
    """
    tile = (row // SWIZZLE_TILE_ROWS) * ceil_div(num_cols, SWIZZLE_TILE_COLS) + (
        col // SWIZZLE_TILE_COLS
    )
    row_in_tile = row % SWIZZLE_TILE_ROWS
    line, group = row_in_tile % SWIZZLE_LINES, row_in_tile // SWIZZLE_LINES
    return (
        tile * SWIZZLE_TILE_BYTES
        + line * SWIZZLE_LINE_BYTES
        + group * SWIZZLE_TILE_COLS
        + col % SWIZZLE_TILE_COLS
    )
