"""One block of 16 elements in a lane's registers: floats to e2m1 codes and an e4m3 scale.

Or to the values these stand for, in bf16. Portable CuTe DSL (sm_89 and later: e4m3 is rounded by
``cvt``; e2m1, which has no ``cvt`` before sm_100, by ``magnitude_word`` and ``round_e2m1``). The
meaning of every bit is ``nvfp4_ops.reference``'s. Not for weights, which are quantized by another
rule.
"""

from collections.abc import Sequence

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int64, Uint32

from nvfp4_ops import format as nvfp4
from nvfp4_ops.kernels import activation as activations
from nvfp4_ops.kernels.launch.tensors import WORD_BYTES
from nvfp4_ops.kernels.memory import DTYPES, permute_bytes, ptx, vector_at

FP32_MAX = torch.finfo(torch.float32).max
# PTX's name of two packed elements.
_PACKED_NAME = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}
_FP32_EXPONENT, _FP32_ABS, _PACKED_ABS = 0x7F800000, 0x7FFFFFFF, 0x7FFF7FFF
_FP32_SIGN = 0x80000000

# m * UNITS has units of half of m in its last place; in magnitude_word two of them on top make the
# sum's low byte the code itself.
_UNITS = 2.0**22
_GRID = _UNITS + 1.0
_CODE_SHIFT = 22
_WORD_CODES = 8
_EVEN_SIGNS, _ODD_SIGNS = 0x08080808, 0x80808080


def reciprocal(value: Float32) -> Float32:
    """1 / value, correctly rounded, subnormals kept."""
    return ptx("rcp.rn.f32 {$w0}, {$r0};", Float32, value)


def min_or_nan(value: Float32, limit: float) -> Float32:
    return cute.arch.fmin(value, limit, nan=True)


class DeviceOps:
    """What the roundings are made of; tests run these on the host with operators instead."""

    minimum = staticmethod(cute.arch.fmin)
    maximum = staticmethod(cute.arch.fmax)
    permute_bytes = staticmethod(permute_bytes)

    @staticmethod
    def absolute(value: Float32) -> Float32:
        return ptx("abs.f32 {$w0}, {$r0};", Float32, value)

    @staticmethod
    def add_shifted(first: Uint32, second: Uint32) -> Uint32:
        """first + 16 * second; opaque, or the compiler splits it in three."""
        return ptx("mad.lo.u32 {$w0}, {$r1}, 16, {$r0};", Uint32, first, second)


def magnitude_word(values: Sequence[Float32], ops: type[DeviceOps] = DeviceOps) -> Uint32:
    """e2m1 codes 0..7 of eight fp32 values >= 0 as a word; NaN is code 7.

    To nearest, ties to even, saturating: with a = min(v, 6) and m the power of two below max(a, 1),
    e2m1 has a spacing of m / 2 around a. So does fp32 around m * 2^22, where one fused operation
    m * 2^22 + a rounds a to n units of m / 2. The code is n + 2 log2(m), and 2 log2(m) stands,
    biased, in the exponent bits of m.
    """
    pairs = []
    for i in range(0, _WORD_CODES, 2):
        sums, powers = [], []
        for value in values[i : i + 2]:
            # The minimum of NaN and 6 is 6.
            clamped = ops.minimum(value, nvfp4.E2M1_MAX)
            power = ops.maximum(clamped, 1.0).bitcast(Uint32) & Uint32(_FP32_EXPONENT)
            rounded = power.bitcast(Float32) * _GRID + clamped
            sums.append(rounded.bitcast(Uint32))
            powers.append(power)
        exponents = ops.add_shifted(*powers) >> _CODE_SHIFT
        pairs.append(ops.add_shifted(*sums) + exponents)
    low = ops.permute_bytes(pairs[0], pairs[1], 0x0040)
    high = ops.permute_bytes(pairs[2], pairs[3], 0x0040)
    return ops.permute_bytes(low, high, 0x5410)


def round_e2m1(value: Float32, ops: type[DeviceOps] = DeviceOps) -> Float32:
    """Nearest e2m1 value of an fp32 value, as ``magnitude_word`` and the sign; NaN is 6.

    The sum with m * 2^22 rounds to units of m / 2, and the difference with it is exact. A NaN's
    sign is kept: PTX computes NaNs without.
    """
    clamped = ops.minimum(ops.absolute(value), nvfp4.E2M1_MAX)
    power = (ops.maximum(clamped, 1.0).bitcast(Uint32) & Uint32(_FP32_EXPONENT)).bitcast(Float32)
    magnitude = power * -_UNITS + (power * _UNITS + clamped)
    sign = value.bitcast(Uint32) & Uint32(_FP32_SIGN)
    return (magnitude.bitcast(Uint32) | sign).bitcast(Float32)


class FloatWords:
    """Elements of one dtype as 32-bit words: two to a word, or fp32 bits."""

    def __init__(self, dtype: torch.dtype) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype: must be one of {list(DTYPES)}, got {dtype}")
        self.dtype = dtype
        self.packed = dtype in _PACKED_NAME
        self.element_bytes = dtype.itemsize

    def absolute(self, words: Sequence[Uint32]) -> list[Uint32]:
        mask = _PACKED_ABS if self.packed else _FP32_ABS
        return [word & Uint32(mask) for word in words]

    def unpack(self, words: Sequence[Uint32]) -> list[Float32]:
        if not self.packed:
            return [word.bitcast(Float32) for word in words]
        return [value for word in words for value in self._unpack_pair(word)]

    def _unpack_pair(self, word: Uint32) -> tuple[Float32, Float32]:
        if self.dtype == torch.bfloat16:
            return (word << 16).bitcast(Float32), (word & Uint32(0xFFFF0000)).bitcast(Float32)
        code = "{.reg .b16 low, high; mov.b32 {low, high}, {$r0}; cvt.f32.f16 {$w0}, HALF;}"
        low, high = (ptx(code.replace("HALF", half), Float32, word) for half in ("low", "high"))
        return low, high

    def pack(self, values: Sequence[Float32]) -> list[Uint32]:
        """Rounded to nearest, ties to even."""
        if not self.packed:
            return [value.bitcast(Uint32) for value in values]
        code = f"cvt.rn.{_PACKED_NAME[self.dtype]}.f32 {{$w0}}, {{$r1}}, {{$r0}};"
        return [ptx(code, Uint32, *values[i : i + 2]) for i in range(0, len(values), 2)]

    def larger(self, first: Uint32, second: Uint32) -> Uint32:
        """Elementwise, of magnitudes; NaN where there is one."""
        if not self.packed:
            # Magnitudes are ordered like their bits, NaN last.
            return cutlass.max(first, second)
        code = f"max.NaN.{_PACKED_NAME[self.dtype]} {{$w0}}, {{$r0}}, {{$r1}};"
        return ptx(code, Uint32, first, second)

    def amax(self, words: Sequence[Uint32]) -> Float32:
        """Largest of magnitudes; NaN where there is one."""
        words = list(words)
        while len(words) > 1:
            odd = words[len(words) & ~1 :]
            pairs = range(0, len(words) - 1, 2)
            words = [self.larger(words[i], words[i + 1]) for i in pairs] + odd
        values = self.unpack(words)
        return values[0] if len(values) == 1 else cute.arch.fmax(*values, nan=True)


class BlockQuantizer(FloatWords):
    """Loads blocks of x, or of an activation's inputs, and quantizes or rounds them.

    A block's registers hold its 16 elements as they lie in memory, for a gated activation the
    gate's and then the up projection's.
    """

    def __init__(
        self, dtype: torch.dtype, activation: str = "none", limit: float | None = None
    ) -> None:
        super().__init__(dtype)
        if activation not in activations.NAMES:
            raise ValueError(f"activation: must be one of {activations.NAMES}, got {activation!r}")
        self.activation, self.limit = activation, limit
        self.block_bytes = nvfp4.BLOCK_SIZE * dtype.itemsize
        self.num_words = self.block_bytes // WORD_BYTES
        self.num_inputs = 2 if activations.is_gated(activation) else 1

    def registers(self) -> cute.Tensor:
        return cute.make_rmem_tensor(cute.make_layout((self.num_words, self.num_inputs)), Uint32)

    def load(self, rX: cute.Tensor, address: Int64, input_bytes: Int64) -> None:
        """The block at a byte address, and the up projection's ``input_bytes`` behind it."""
        for i in range(self.num_inputs):
            cute.autovec_copy(vector_at(address + i * input_bytes, self.num_words), rX[None, i])

    def words(self, rX: cute.Tensor) -> list[Uint32]:
        """The block, activated in fp32 and rounded to the dtype of x."""
        inputs = [[rX[i, j] for i in range(self.num_words)] for j in range(self.num_inputs)]
        if self.activation == "none":
            return inputs[0]
        gates = self.unpack(inputs[0])
        ups = self.unpack(inputs[1]) if self.num_inputs == 2 else [None] * len(gates)
        return self.pack(
            [
                activations.apply(self.activation, self.limit, gate, up)
                for gate, up in zip(gates, ups, strict=True)
            ]
        )

    def signs(self, words: Sequence[Uint32], word: int) -> Uint32:
        """Sign bits of the eight elements of a code word, at bit 3 of their codes."""
        if self.packed:
            pairs = words[4 * word : 4 * word + 4]
            low = permute_bytes(pairs[0], pairs[1], 0x7351)
            high = permute_bytes(pairs[2], pairs[3], 0x7351)
            even, odd = permute_bytes(low, high, 0x5410), permute_bytes(low, high, 0x7632)
        else:
            even, odd = (
                permute_bytes(
                    permute_bytes(words[8 * word + i], words[8 * word + i + 2], 0x0073),
                    permute_bytes(words[8 * word + i + 4], words[8 * word + i + 6], 0x0073),
                    0x5410,
                )
                for i in range(2)
            )
        return ((even >> 4) & Uint32(_EVEN_SIGNS)) | (odd & Uint32(_ODD_SIGNS))

    @cute.jit
    def quantize(self, words: list, scales: tuple):
        """Two words of codes and the scale byte of a block, with its row's ``encode_scales``."""
        absolute = self.absolute(words)
        sf, _, decode, inv_scale = self._block_scales(absolute, scales)
        # A NaN value has code 7 without a sign. Where the scale is NaN all values are; where decode
        # is Inf, inv_scale is 0, so those of Inf are and all others have code 0 or 8.
        nan_signs = Uint32(_EVEN_SIGNS | _ODD_SIGNS)
        if decode < Float32(float("inf")):
            nan_signs = Uint32(0)
        values = [value * inv_scale for value in self.unpack(absolute)]
        codes = []
        for i in cutlass.range_constexpr(nvfp4.BLOCK_SIZE // _WORD_CODES):
            magnitudes = magnitude_word(values[i * _WORD_CODES : (i + 1) * _WORD_CODES])
            codes.append(magnitudes | (self.signs(words, i) & ~((magnitudes << 1) & nan_signs)))
        return codes, sf

    @cute.jit
    def round(self, words: list, scales: tuple):
        """Eight words of bf16: what the codes and the scale of ``quantize`` stand for."""
        _, block_scale, _, inv_scale = self._block_scales(self.absolute(words), scales)
        # A product of e2m1 and e4m3 is exact in bf16, and NaN where the scale is.
        values = [round_e2m1(value * inv_scale) * block_scale for value in self.unpack(words)]
        return FloatWords(torch.bfloat16).pack(values)

    @cute.jit
    def _block_scales(self, absolute: list, scales: tuple):
        """Byte and value of a block's scale, that times 1 / G, and what to multiply x by."""
        sixth_of_encode, inv_encode = scales
        sf, block_scale = cute.arch.inline_ptx(
            "{.reg .b16 sf, low, high; .reg .b32 both;"
            " cvt.rn.satfinite.e4m3x2.f32 sf, 0f00000000, {$r0};"
            " cvt.u32.u16 {$w0}, sf; cvt.rn.f16x2.e4m3x2 both, sf;"
            " mov.b32 {low, high}, both; cvt.f32.f16 {$w1}, low;}",
            write_only_types=[Uint32, Float32],
            read_only_args=[self.amax(absolute) * sixth_of_encode],
        )
        decode = block_scale * inv_encode
        inv_scale = min_or_nan(reciprocal(decode), FP32_MAX)
        if block_scale == 0.0:
            inv_scale = Float32(0.0)
        return sf, block_scale, decode, inv_scale


def encode_scales(global_scale: Float32) -> tuple[Float32, Float32]:
    """With G = min(1 / global_scale, FLT_MAX): G * fl(1 / 6) and 1 / G."""
    encode = min_or_nan(reciprocal(global_scale), FP32_MAX)
    return encode * Float32(1.0 / nvfp4.E2M1_MAX), reciprocal(encode)
