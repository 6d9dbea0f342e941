"""The weight layout of the Hopper grouped mm: 4.5 bits a weight, ready for registers.

A block is 64 rows x 128 columns in 4608 contiguous bytes: one bulk copy brings it, one
conflict-free 16-byte load a thread fetches the codes of 64 x 64, and eight integer operations turn
a word of eight codes into bf16 operands of wgmma, but for their scales. Rows come in one of two
orders, and the rank of prepacked weights says in which, N' being padded to a multiple of 64 and K'
to one of 128:

plain, (E, N'/64, K'/128, 4608) uint8: as they are.
gated, (E, F'/64, 2, K'/128, 4608) uint8: N = 2 F rows, the gate's F and the up projection's F, each
    padded to F', a multiple of 64. Row 16 w + g of block b is gate row 32 b + 8 w + g, and row
    16 w + 8 + g its partner, up row 32 b + 8 w + g: both are accumulators of one thread.

Codes: byte (sub * 128 + warp * 32 + lane) * 16 holds, for lane = 4 g + q, the words j = 0..3 of
rows warp * 16 + {g, g + 8} and columns sub * 64 + j * 16 + {0, 8} + 2 q + {0, 1}. Bits inside a
word are placed so that ``w & M``, ``rotr(w, 3) & M``, ``rotr(w, 6) & M`` and, of the rest of the
bits, ``((w & 0x001B001B) * 0x4108) & M`` are e2m1 values in bf16 position, times 2^-126
(M = 0x81C081C0).

Scales follow the codes: byte 4096 + (warp * 8 + g) * 16 holds a word for each of the four 32-column
groups, with the scales of rows g (low half) and g + 8 and of both blocks of the group. Each e4m3
scale is a byte B (five exponent bits, three mantissa bits) with bf16 bits (B << 4) | 0x7000 = scale
* 2^119. They lie so that ``w & 0x0FF00FF0`` is B << 4 of the first blocks, of both rows, and
``rotl(w, 8) & 0x0FF00FF0`` of the second. Zero is B = 0 with all codes of the block zero, NaN is
B = 0xFF, and a negative scale gives its sign to the codes. Unpacking therefore recovers every
value, and every byte of weights without zero or negative scales.
"""

import torch
from torch import Tensor

from nvfp4_ops import format as nvfp4

BLOCK_ROWS, BLOCK_COLUMNS = 64, 128
CODE_BYTES, SCALE_BYTES = 4096, 512
BLOCK_BYTES = CODE_BYTES + SCALE_BYTES
# Rows 16 w + 8 r + g of a block, the unit in which wgmma deals them to the registers of a thread.
ROW_GROUPS, ROW_HALVES, ROWS_PER_GROUP = 4, 2, 8
PLAIN_RANK, GATED_RANK = 4, 5

LAYOUT = 2
"""Of what this module's docstring says; another one gets another number. Saved programs hold
prepacked weights and the number."""

DECODE_EXPONENT = 7
"""Operands in registers are value * 2^-7: alpha makes up for it."""

# Bits of (sign, exponent high, exponent low, mantissa) in a 16-bit half, for operand register 0..3.
BIT_POSITIONS = ((5, 14, 13, 12), (1, 0, 4, 3), (15, 8, 7, 6), (2, 11, 10, 9))
# The kernel rotates the word for registers 0 and 3, which moves their signs to the other half.
SIGN_IN_OTHER_HALF = (True, False, False, True)

# Of a word of four scale bytes, (g, first block), (g, second), (g + 8, first), (g + 8, second):
# left rotations, and masks of their results, that bring them to where the kernel wants them.
SCALE_ROTATIONS = {4: 0x0FF00FF0, 20: 0xF00FF00F}

_SCALE_ZERO, _SCALE_NAN = 0, 0xFF
_E4M3_EXPONENT_BIAS, _PACKED_EXPONENT_BIAS = 7, 22


def padded_size(n: int, k: int, *, gated: bool = False) -> tuple[int, int]:
    """N' and K'; gate and up rows are padded each."""
    segments = 2 if gated else 1
    padded_segment = nvfp4.ceil_div(n // segments, BLOCK_ROWS) * BLOCK_ROWS
    return (segments * padded_segment, nvfp4.ceil_div(k, BLOCK_COLUMNS) * BLOCK_COLUMNS)


def num_weight_blocks(n: int, k: int, *, gated: bool) -> tuple[int, int]:
    """Blocks of 64 rows and of 128 columns of an expert."""
    padded_n, padded_k = padded_size(n, k, gated=gated)
    return padded_n // BLOCK_ROWS, padded_k // BLOCK_COLUMNS


def prepacked_shape(num_experts: int, n: int, k: int, *, gated: bool = False) -> tuple[int, ...]:
    row_blocks, column_blocks = num_weight_blocks(n, k, gated=gated)
    if gated:
        return (num_experts, row_blocks // 2, 2, column_blocks, BLOCK_BYTES)
    return (num_experts, row_blocks, column_blocks, BLOCK_BYTES)


def _pad_rows(rows: Tensor, padded_n: int, padded_columns: int, *, gated: bool) -> Tensor:
    """(N, C) of one expert -> (N', C') in the order of the blocks."""
    n, columns = rows.shape
    segments = 2 if gated else 1
    padded = rows.new_zeros(segments, padded_n // segments, padded_columns)
    padded[:, : n // segments, :columns] = rows.view(segments, n // segments, columns)
    if gated:
        padded = padded.unflatten(1, (-1, ROW_GROUPS, ROWS_PER_GROUP)).permute(1, 2, 0, 3, 4)
    return padded.reshape(padded_n, padded_columns)


def _crop_rows(padded: Tensor, n: int, columns: int, *, gated: bool) -> Tensor:
    """Inverse of ``_pad_rows`` for all experts: (E, N', C') -> (E, N, C)."""
    padded = padded[..., :columns]
    if not gated:
        return padded[:, :n]
    groups = padded.unflatten(1, (-1, ROW_GROUPS, ROW_HALVES, ROWS_PER_GROUP))
    segments = groups.permute(0, 3, 1, 2, 4, 5).flatten(2, 4)
    return segments[:, :, : n // 2].flatten(1, 2)


def _encode_scales(sf_bytes: Tensor) -> Tensor:
    """e4m3 bytes, sign ignored -> packed scale bytes."""
    bits = sf_bytes.int() & 0x7F
    exponent, mantissa = bits >> 3, bits & 7
    normal = ((exponent + _PACKED_EXPONENT_BIAS - _E4M3_EXPONENT_BIAS) << 3) | mantissa
    # A subnormal m * 2^-9 is 2^(b-9) * (1 + ...), b the position of its leading bit.
    leading = torch.where(mantissa >= 4, 2, torch.where(mantissa >= 2, 1, 0))
    fraction = (mantissa << (3 - leading)) & 7
    subnormal = ((leading - 9 + _PACKED_EXPONENT_BIAS) << 3) | fraction
    packed = torch.where(exponent == 0, subnormal, normal)
    packed = torch.where(bits == 0, _SCALE_ZERO, packed)
    return torch.where(bits == nvfp4.E4M3_NAN_BYTE, _SCALE_NAN, packed).to(torch.uint8)


def _decode_scales(packed: Tensor) -> Tensor:
    """Packed scale bytes -> e4m3 bytes."""
    bits = packed.int()
    exponent = (bits >> 3) - _PACKED_EXPONENT_BIAS + _E4M3_EXPONENT_BIAS
    fraction = bits & 7
    normal = (exponent << 3) | fraction
    # Exponent 0, -1, -2 here: m = (8 + fraction) >> (1 - exponent).
    subnormal = (8 | fraction) >> (1 - exponent).clamp(min=0)
    e4m3 = torch.where(exponent <= 0, subnormal, normal)
    e4m3 = torch.where(bits == _SCALE_ZERO, 0, e4m3)
    return torch.where(bits == _SCALE_NAN, nvfp4.E4M3_NAN_BYTE, e4m3).to(torch.uint8)


# Words of 32 bits are held in int64.


def _rotate_left(words: Tensor, left: int) -> Tensor:
    return ((words << left) | (words >> (32 - left))) & 0xFFFFFFFF


def _to_words(four_bytes: Tensor) -> Tensor:
    """(..., 4), the lowest byte first, -> (...)."""
    return (four_bytes.long() << torch.arange(0, 32, 8, device=four_bytes.device)).sum(dim=-1)


def _to_bytes(words: Tensor) -> Tensor:
    """Inverse of ``_to_words``: uint8."""
    shifts = torch.arange(0, 32, 8, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 0xFF).to(torch.uint8)


def _pack_expert(codes: Tensor, sf_bytes: Tensor) -> Tensor:
    """(N', K') codes one a byte and (N', K'/16) e4m3 bytes -> (N'/64, K'/128, 4608)."""
    rows, columns = codes.shape
    row_blocks, column_blocks = rows // BLOCK_ROWS, columns // BLOCK_COLUMNS
    scale = sf_bytes.repeat_interleave(nvfp4.BLOCK_SIZE, dim=1)
    codes = codes ^ ((scale >> 7) << 3)
    codes = torch.where((scale & 0x7F) == 0, 0, codes).int()
    # From (row block, warp, rh, g) x (column block, sub, j, kh, q, h), words outermost.
    parts = codes.view(row_blocks, 4, 2, 8, column_blocks, 2, 4, 2, 4, 2)
    parts = parts.permute(0, 4, 5, 1, 3, 8, 6, 7, 2, 9)
    word = torch.zeros(parts.shape[:-3], dtype=torch.int64, device=codes.device)
    for register, (sign, high, low, mantissa) in enumerate(BIT_POSITIONS):
        for half in range(2):
            code = parts[..., register // 2, register % 2, half].long()
            sign_half = 1 - half if SIGN_IN_OTHER_HALF[register] else half
            word |= ((code >> 3) & 1) << (16 * sign_half + sign)
            word |= ((code >> 2) & 1) << (16 * half + high)
            word |= ((code >> 1) & 1) << (16 * half + low)
            word |= (code & 1) << (16 * half + mantissa)
    code_bytes = _to_bytes(word)
    scales = _encode_scales(sf_bytes).view(row_blocks, 4, 2, 8, column_blocks, 4, 2)
    scales = scales.permute(0, 4, 1, 3, 5, 2, 6)  # (rb, cb, warp, g, group, rh, block)
    four = _to_words(scales.flatten(-2))
    placed = torch.zeros_like(four)
    for left, mask in SCALE_ROTATIONS.items():
        placed |= _rotate_left(four, left) & mask
    scale_bytes = _to_bytes(placed)
    lead = (row_blocks, column_blocks)
    return torch.cat(
        [code_bytes.reshape(*lead, CODE_BYTES), scale_bytes.reshape(*lead, SCALE_BYTES)], dim=-1
    )


def prepack(codes: Tensor, block_scale: Tensor, *, gated: bool = False) -> Tensor:
    """Canonical weights to this layout, expert by expert on their device.

    codes: (E, N, K/2) uint8. block_scale: (E, N, K/16) float8_e4m3fn, linear. gated: N = 2 F rows
    in pairs of gate and up.
    """
    num_experts, n, packed_k = codes.shape
    k = packed_k * nvfp4.CODES_PER_BYTE
    padded_n, padded_k = padded_size(n, k, gated=gated)
    out = codes.new_empty(prepacked_shape(num_experts, n, k, gated=gated))
    for expert in range(num_experts):
        low, high = codes[expert] & 15, codes[expert] >> 4
        one_a_byte = torch.stack([low, high], dim=-1).flatten(-2)
        sf_bytes = block_scale[expert].view(torch.uint8)
        blocks = _pack_expert(
            _pad_rows(one_a_byte, padded_n, padded_k, gated=gated),
            _pad_rows(sf_bytes, padded_n, nvfp4.num_blocks(padded_k), gated=gated),
        )
        out[expert] = blocks.view(out.shape[1:])
    return out


def unpack(prepacked: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Inverse of ``prepack``: codes (E, N, K/2) and block scales (E, N, K/16)."""
    gated = prepacked.ndim == GATED_RANK
    if gated:
        prepacked = prepacked.flatten(1, 2)
    num_experts, row_blocks, column_blocks, _ = prepacked.shape
    code_bytes, scale_bytes = prepacked.split([CODE_BYTES, SCALE_BYTES], dim=-1)
    shape = (num_experts, row_blocks, column_blocks)
    word = _to_words(code_bytes.reshape(*shape, 2, 4, 8, 4, 4, 4))  # sub, warp, g, q, j, byte
    registers = []
    for register, (sign, high, low, mantissa) in enumerate(BIT_POSITIONS):
        halves = []
        for half in range(2):
            sign_half = 1 - half if SIGN_IN_OTHER_HALF[register] else half
            code = ((word >> (16 * sign_half + sign)) & 1) << 3
            code |= ((word >> (16 * half + high)) & 1) << 2
            code |= ((word >> (16 * half + low)) & 1) << 1
            code |= (word >> (16 * half + mantissa)) & 1
            halves.append(code.to(torch.uint8))
        registers.append(torch.stack(halves, dim=-1))
    # (E, rb, cb, sub, warp, g, q, j, kh, rh, h) -> (E, rb, warp, rh, g, cb, sub, j, kh, q, h)
    parts = torch.stack(registers, dim=-2).unflatten(-2, (2, 2))
    parts = parts.permute(0, 1, 4, 9, 5, 2, 3, 7, 8, 6, 10)
    codes = parts.reshape(num_experts, row_blocks * BLOCK_ROWS, column_blocks * BLOCK_COLUMNS)
    codes = _crop_rows(codes, n, k, gated=gated)
    placed = _to_words(scale_bytes.reshape(*shape, 4, 8, 4, 4))
    four = torch.zeros_like(placed)
    for left, mask in SCALE_ROTATIONS.items():
        four |= _rotate_left(placed & mask, 32 - left)
    scales = _decode_scales(_to_bytes(four)).unflatten(-1, (2, 2))
    scales = scales.permute(0, 1, 3, 6, 4, 2, 5, 7)  # of (E, rb, cb, warp, g, group, rh, block)
    num_blocks = nvfp4.num_blocks(column_blocks * BLOCK_COLUMNS)
    sf = scales.reshape(num_experts, row_blocks * BLOCK_ROWS, num_blocks)
    sf = _crop_rows(sf, n, nvfp4.num_blocks(k), gated=gated)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed.contiguous(), sf.contiguous().view(torch.float8_e4m3fn)
