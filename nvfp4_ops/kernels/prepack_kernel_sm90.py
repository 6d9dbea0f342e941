"""Prepacking and unpacking weights on the GPU, as fast as they can be copied.

The layout, and its meaning in PyTorch, is prepack_sm90's; bytes are equal. Not for weights that
are being quantized: both ends are NVFP4.
"""

from collections.abc import Callable, Sequence

import cuda.bindings.driver as cuda_driver
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8, Uint16, Uint32
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from nvfp4_ops import format as nvfp4
from nvfp4_ops.kernels.launch.prepack_kernel_sm90 import PrepackConfig
from nvfp4_ops.kernels.launch.tensors import WARP, WORD_BYTES
from nvfp4_ops.kernels.memory import bytes_at, vector_at
from nvfp4_ops.kernels.prepack_sm90 import (
    BIT_POSITIONS,
    BLOCK_BYTES,
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    CODE_BYTES,
    SCALE_ROTATIONS,
    SIGN_IN_OTHER_HALF,
)

WARPS_PER_BLOCK = 4
# A CTA has two warps side by side on each 16 rows, and each takes two blocks: a row's reads are
# whole cache lines, and the loads of the second block hide behind the first.
WARPS_PER_ROW, BLOCKS_PER_WARP = 2, 2
BLOCKS_PER_STEP = WARPS_PER_ROW * BLOCKS_PER_WARP
THREADS = WARP * WARPS_PER_BLOCK * WARPS_PER_ROW
# Halves of a block's columns, K / 2 bytes of a lane in each, and the rows g and g + 8 of a lane.
SUBS, LANE_BYTES, HALVES = 2, 8, 2
SUB_BYTES = nvfp4.packed_size(BLOCK_COLUMNS) // SUBS
BLOCKS_PER_SUB = nvfp4.num_blocks(BLOCK_COLUMNS) // SUBS

_NIBBLES, _BYTES, _HALF = 0x0F0F0F0F, 0x00FF00FF, 0x0000FFFF
_EVERY_BYTE, _SIGNS, _MAGNITUDES = 0x01010101, 0x80808080, 0x7F7F7F7F
_NORMAL_OFFSET = 120
"""What 15 more in the exponent field adds to an e4m3 byte without its sign."""
_SUBNORMALS = (0x74706800, 0x7E7C7A78)
"""Scale bytes of the e4m3 subnormals 0..3 and 4..7."""


# The arithmetic: operators alone, so that tests run it on the host.


def _rotations() -> dict[int, int]:
    """Left rotations, and masks of their results, that together bring bits to BIT_POSITIONS.

    From a word that holds in each half the codes of registers 1, 0, 2, 3, a nibble each: in this
    order six rotations are enough.
    """
    masks: dict[int, int] = {}
    for slot, register in enumerate((1, 0, 2, 3)):
        for bit, position in enumerate(reversed(BIT_POSITIONS[register])):
            for half in range(2):
                moves = bit == 3 and SIGN_IN_OTHER_HALF[register]
                target = 16 * (1 - half if moves else half) + position
                rotation = (target - (16 * half + 4 * slot + bit)) % 32
                masks[rotation] = masks.get(rotation, 0) | (1 << target)
    return masks


ROTATIONS = _rotations()


def _rotate(word: Uint32, left: int) -> Uint32:
    return (word << left) | (word >> (32 - left)) if left else word


def _place(word: Uint32, rotations: dict[int, int]) -> Uint32:
    """Every bit to where a left rotation brings it on that rotation's mask."""
    placed = Uint32(0)
    for left, mask in rotations.items():
        placed = placed | (_rotate(word, left) & Uint32(mask))
    return placed


def _take_back(placed: Uint32, rotations: dict[int, int]) -> Uint32:
    """Inverse of ``_place``."""
    word = Uint32(0)
    for left, mask in rotations.items():
        source = (mask >> left | mask << (32 - left)) & 0xFFFFFFFF
        word = word | (_rotate(placed, (32 - left) % 32) & Uint32(source))
    return word


def _exchange(first: Uint32, second: Uint32, mask: int, shift: int) -> tuple[Uint32, Uint32]:
    """The masked fields of both words, and the fields ``shift`` bits above; its own inverse."""
    masked = ((first & Uint32(mask)) | ((second & Uint32(mask)) << shift),)
    above = (((first >> shift) & Uint32(mask)) | (second & Uint32(mask << shift)),)
    return masked + above


def pack_words(pairs: Sequence[Sequence[Uint32]]) -> list[Uint32]:
    """pairs[rh][kh], whose byte j is the code pair (rh, j, kh), to the words j = 0..3 of a lane."""
    (t00, t01), (t10, t11) = pairs
    even_0, odd_0 = _exchange(t10, t00, _NIBBLES, 4)
    even_1, odd_1 = _exchange(t01, t11, _NIBBLES, 4)
    even_02, even_13 = _exchange(even_0, even_1, _BYTES, 8)
    odd_02, odd_13 = _exchange(odd_0, odd_1, _BYTES, 8)
    words = [None] * 4
    words[0], words[2] = _exchange(even_02, odd_02, _HALF, 16)
    words[1], words[3] = _exchange(even_13, odd_13, _HALF, 16)
    return [_place(word, ROTATIONS) for word in words]


def unpack_words(packed: Sequence[Uint32]) -> list[list[Uint32]]:
    """Inverse of ``pack_words``."""
    words = [_take_back(word, ROTATIONS) for word in packed]
    even_02, odd_02 = _exchange(words[0], words[2], _HALF, 16)
    even_13, odd_13 = _exchange(words[1], words[3], _HALF, 16)
    even_0, even_1 = _exchange(even_02, even_13, _BYTES, 8)
    odd_0, odd_1 = _exchange(odd_02, odd_13, _BYTES, 8)
    t10, t00 = _exchange(even_0, odd_0, _NIBBLES, 4)
    t01, t11 = _exchange(even_1, odd_1, _NIBBLES, 4)
    return [[t00, t01], [t10, t11]]


def sign_codes(codes: Uint32, sf: Uint32) -> Uint32:
    """Code pairs under four e4m3 scales: a negative one's change sign, a zero's are zero."""
    signs = sf & Uint32(_SIGNS)
    nonzero = ((sf & Uint32(_MAGNITUDES)) + Uint32(_MAGNITUDES)) & Uint32(_SIGNS)
    return (codes ^ (signs | (signs >> 4))) & ((nonzero >> 7) * Uint32(0xFF))


@cute.jit
def _encode_scale(bits: Uint32) -> Uint32:
    """Seven bits of e4m3 to the layout's scale byte."""
    scale = bits + Uint32(_NORMAL_OFFSET)
    if bits == Uint32(nvfp4.E4M3_NAN_BYTE):
        scale = Uint32(0xFF)
    if bits < Uint32(4):
        scale = (Uint32(_SUBNORMALS[0]) >> (bits * 8)) & Uint32(0xFF)
    if bits >= Uint32(4):
        if bits < Uint32(8):
            scale = (Uint32(_SUBNORMALS[1]) >> ((bits - 4) * 8)) & Uint32(0xFF)
    return scale


@cute.jit
def _decode_scale(scale: Uint32) -> Uint32:
    """Inverse of ``_encode_scale``."""
    bits = scale - Uint32(_NORMAL_OFFSET)
    if scale == Uint32(0xFF):
        bits = Uint32(nvfp4.E4M3_NAN_BYTE)
    if scale < Uint32(_NORMAL_OFFSET + 8):
        bits = ((scale & Uint32(7)) | Uint32(8)) >> (Uint32(16) - (scale >> 3))
    return bits


def _each_byte(word: Uint32, function: Callable[[Uint32], Uint32]) -> Uint32:
    result = Uint32(0)
    for byte in range(WORD_BYTES):
        result = result | (function((word >> (8 * byte)) & Uint32(0xFF)) << (8 * byte))
    return result


def encode_scales(sf: Uint32) -> Uint32:
    """Four e4m3 bytes to scale bytes in their places."""
    return _place(_each_byte(sf & Uint32(_MAGNITUDES), _encode_scale), SCALE_ROTATIONS)


def decode_scales(scales: Uint32) -> Uint32:
    """Inverse of ``encode_scales``."""
    return _each_byte(_take_back(scales, SCALE_ROTATIONS), _decode_scale)


TRANSPOSE_SELECTORS = ((0x6240, 0x3715), (0x5410, 0x3276))
"""Bytes kept and taken in the steps of ``_transpose_bytes``, by the lane's bit of the step."""


def _transpose_bytes(word: Uint32, lane: Int32) -> Uint32:
    """Byte q of lane p of a quad to byte p of lane q."""
    for step, (clear, set_) in enumerate(TRANSPOSE_SELECTORS):
        bit = (lane >> step) & 1
        selector = Uint32(clear) ^ (Uint32(bit) * Uint32(clear ^ set_))
        other = Uint32(cute.arch.shuffle_sync_bfly(word, offset=1 << step))
        word = cute.arch.inline_ptx(
            "prmt.b32 {$w0}, {$r0}, {$r1}, {$r2};",
            write_only_types=[Uint32],
            read_only_args=[word, other, selector],
        )
    return word


class PrepackSm90:
    """packed = prepack(codes, sf), or codes, sf = unpack(packed); every byte written once.

    A warp has 16 rows of a block, a lane (4 g + q) two of them and the bytes 8 q .. 8 q + 7 of each
    32: quads then transpose 4 x 4 bytes, so that lane q has the byte q of each word of four, which
    is what the layout gives it. Rows and columns of padding are read as zero and not written back.

    Limits: codes 8-byte, packed 16-byte aligned; E * N'/64 * K'/512 CTAs < 2^31.
    """

    def __init__(self, config: PrepackConfig) -> None:
        if config.direction not in ("prepack", "unpack"):
            raise ValueError(f"direction: must be prepack or unpack, got {config.direction}")
        self.config = config

    @cute.jit
    def __call__(
        self,
        mCodes: cute.Tensor,
        mSf: cute.Tensor,
        mPacked: cute.Tensor,
        stream: cuda_driver.CUstream,
    ):
        num_experts, row_blocks, column_blocks, _ = mPacked.shape
        steps = cute.ceil_div(Int32(column_blocks), BLOCKS_PER_STEP)
        # No programmatic launch: a kernel that follows may fetch its weights before its
        # dependencies are met, and these are weights.
        self.kernel(mCodes, mSf, mPacked).launch(
            grid=[Int32(num_experts) * Int32(row_blocks) * steps, 1, 1],
            block=[THREADS, 1, 1],
            use_pdl=False,
            stream=stream,
        )

    @cute.kernel
    def kernel(self, mCodes: cute.Tensor, mSf: cute.Tensor, mPacked: cute.Tensor):
        cta, _, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = cute.arch.lane_idx()
        row_blocks, column_blocks = Int32(mPacked.shape[1]), Int32(mPacked.shape[2])
        steps = (column_blocks + (BLOCKS_PER_STEP - 1)) // BLOCKS_PER_STEP
        # Consecutive CTAs continue the same rows.
        block_row = cta // steps
        first_block = (cta - block_row * steps) * BLOCKS_PER_STEP + warp // WARPS_PER_BLOCK
        expert = block_row // row_blocks
        rows = self._rows(
            block_row - expert * row_blocks, warp % WARPS_PER_BLOCK, lane // 4, mCodes.shape[1]
        )
        lines = []
        for half in cutlass.range_constexpr(HALVES):
            row, is_valid = rows[half]
            line = Int64(expert) * Int64(mCodes.shape[1]) + Int64(row)
            lines.append((line, is_valid))
        part = (warp % WARPS_PER_BLOCK, lane)
        packed_row = mPacked.iterator.toint() + (
            Int64(block_row) * Int64(column_blocks) * BLOCK_BYTES
        )
        if cutlass.const_expr(self.config.direction == "prepack"):
            loaded = []
            for i in cutlass.range_constexpr(BLOCKS_PER_WARP):
                loaded.append(
                    self._load_rows(mCodes, mSf, lines, first_block + i * WARPS_PER_ROW, lane)
                )
            for i in cutlass.range_constexpr(BLOCKS_PER_WARP):
                block = first_block + i * WARPS_PER_ROW
                if block < column_blocks:
                    self._prepack(loaded[i], packed_row + Int64(block) * BLOCK_BYTES, part)
        else:
            for i in cutlass.range_constexpr(BLOCKS_PER_WARP):
                block = first_block + i * WARPS_PER_ROW
                if block < column_blocks:
                    address = packed_row + Int64(block) * BLOCK_BYTES
                    self._unpack(mCodes, mSf, lines, block, address, part)

    def _rows(self, block: Int32, warp: Int32, g: Int32, num_rows: Int32):
        """(row, whether there is one) for the rows 16 warp + g and 16 warp + 8 + g of a block."""
        num_rows = Int32(num_rows)
        if self.config.gated:
            num_gate_rows = num_rows // 2
            row = block * (BLOCK_ROWS // 2) + warp * 8 + g
            is_valid = row < num_gate_rows
            return ((row, is_valid), (row + num_gate_rows, is_valid))
        row = block * BLOCK_ROWS + warp * 16 + g
        return ((row, row < num_rows), (row + 8, row + 8 < num_rows))

    @cute.jit
    def _load_rows(
        self, mCodes: cute.Tensor, mSf: cute.Tensor, lines: list, block: Int32, lane: Int32
    ):
        """A lane's code words and its rows' scales of a block: both [half][sub], zero in pads."""
        num_bytes, num_sf = Int32(mCodes.shape[2]), Int32(mSf.shape[2])
        rCodes = cute.make_rmem_tensor(cute.make_layout((2, SUBS, HALVES)), Uint32)
        rSf = cute.make_rmem_tensor(cute.make_layout((SUBS, HALVES)), Uint32)
        rCodes.fill(0)
        rSf.fill(0)
        for half in cutlass.range_constexpr(HALVES):
            line, is_valid = lines[half]
            for sub in cutlass.range_constexpr(SUBS):
                byte = (block * SUBS + sub) * SUB_BYTES + lane % 4 * LANE_BYTES
                if is_valid and byte < num_bytes:
                    address = mCodes.iterator.toint() + line * Int64(num_bytes) + Int64(byte)
                    cute.autovec_copy(vector_at(address, 2, LANE_BYTES), rCodes[None, sub, half])
                column = (block * SUBS + sub) * BLOCKS_PER_SUB
                address = mSf.iterator.toint() + line * Int64(num_sf) + Int64(column)
                if cutlass.const_expr(self.config.sf_words):
                    if is_valid and column < num_sf:
                        rSf[sub, half] = Uint32(vector_at(address, 1, WORD_BYTES)[0])
                else:
                    gSf = bytes_at(address, BLOCKS_PER_SUB)
                    for j in cutlass.range_constexpr(BLOCKS_PER_SUB):
                        if is_valid and column + j < num_sf:
                            scale = Uint32(Uint8(gSf[j])) << (8 * j)
                            rSf[sub, half] = rSf[sub, half] | scale
        return rCodes, rSf

    @cute.jit
    def _prepack(self, loaded: tuple, address: Int64, part: tuple):
        rCodes, rSf = loaded
        _, lane = part
        for sub in cutlass.range_constexpr(SUBS):
            pairs = []
            for half in cutlass.range_constexpr(HALVES):
                words = []
                for kh in cutlass.range_constexpr(2):
                    transposed = _transpose_bytes(rCodes[kh, sub, half], lane)
                    words.append(sign_codes(transposed, rSf[sub, half]))
                pairs.append(words)
            packed = pack_words(pairs)
            rWords = cute.make_rmem_tensor(cute.make_layout(4), Uint32)
            for j in cutlass.range_constexpr(4):
                rWords[j] = packed[j]
            cute.autovec_copy(rWords, vector_at(self._words_address(address, sub, part), 4))
        # Lane q has the scales of column group q: two of each row.
        shift = Uint32(lane % 2) * 16
        pair = [rSf[0, 0], rSf[0, 1]]
        if lane % 4 >= 2:
            pair = [rSf[1, 0], rSf[1, 1]]
        low = (pair[0] >> shift) & Uint32(_HALF)
        high = (pair[1] >> shift) << 16
        gScales = vector_at(self._scales_address(address, part), 1, WORD_BYTES)
        gScales[0] = encode_scales(low | high)

    @cute.jit
    def _unpack(
        self,
        mCodes: cute.Tensor,
        mSf: cute.Tensor,
        lines: list,
        block: Int32,
        address: Int64,
        part: tuple,
    ):
        _, lane = part
        num_bytes, num_sf = Int32(mCodes.shape[2]), Int32(mSf.shape[2])
        for sub in cutlass.range_constexpr(SUBS):
            rWords = cute.make_rmem_tensor(cute.make_layout(4), Uint32)
            cute.autovec_copy(vector_at(self._words_address(address, sub, part), 4), rWords)
            pairs = unpack_words([rWords[j] for j in range(4)])
            byte = (block * SUBS + sub) * SUB_BYTES + lane % 4 * LANE_BYTES
            for half in cutlass.range_constexpr(HALVES):
                line, is_valid = lines[half]
                rCodes = cute.make_rmem_tensor(cute.make_layout(2), Uint32)
                for kh in cutlass.range_constexpr(2):
                    rCodes[kh] = _transpose_bytes(pairs[half][kh], lane)
                if is_valid and byte < num_bytes:
                    target = mCodes.iterator.toint() + line * Int64(num_bytes) + Int64(byte)
                    cute.autovec_copy(rCodes, vector_at(target, 2, LANE_BYTES))
        gScales = vector_at(self._scales_address(address, part), 1, WORD_BYTES)
        scales = decode_scales(Uint32(gScales[0]))
        column = block * (SUBS * BLOCKS_PER_SUB) + lane % 4 * 2
        for half in cutlass.range_constexpr(HALVES):
            line, is_valid = lines[half]
            two = (scales >> (16 * half)) & Uint32(_HALF)
            target = mSf.iterator.toint() + line * Int64(num_sf) + Int64(column)
            if cutlass.const_expr(self.config.sf_words):
                if is_valid and column < num_sf:
                    pointer = cute.make_ptr(Uint16, target, cute.AddressSpace.gmem, assumed_align=2)
                    cute.make_tensor(pointer, cute.make_layout(1))[0] = Uint16(two)
            else:
                gSf = bytes_at(target, 2)
                for j in cutlass.range_constexpr(2):
                    if is_valid and column + j < num_sf:
                        gSf[j] = Uint8(two >> (8 * j))

    def _words_address(self, block: Int64, sub: int, part: tuple) -> Int64:
        warp, lane = part
        return block + Int64((sub * WARPS_PER_BLOCK + warp) * WARP + lane) * 16

    def _scales_address(self, block: Int64, part: tuple) -> Int64:
        warp, lane = part
        return block + Int64(CODE_BYTES + warp * 128 + lane * WORD_BYTES)


def build(config: PrepackConfig, options: str = "") -> Callable[..., None]:
    """Compile for ``CUTE_DSL_ARCH`` or the present GPU; called with torch tensors."""
    size = cute.sym_int32
    experts, rows = size(), size()
    sf_align = WORD_BYTES if config.sf_words else 1
    return cute.compile(
        PrepackSm90(config),
        make_fake_compact_tensor(
            Uint8,
            (experts, rows, size(divisibility=LANE_BYTES)),
            stride_order=(2, 1, 0),
            assumed_align=LANE_BYTES,
        ),
        make_fake_compact_tensor(
            Uint8,
            (experts, rows, size(divisibility=sf_align)),
            stride_order=(2, 1, 0),
            assumed_align=sf_align,
        ),
        make_fake_compact_tensor(
            Uint8,
            (experts, size(), size(), BLOCK_BYTES),
            stride_order=(3, 2, 1, 0),
            assumed_align=16,
        ),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi {options}",
    )
