"""fp64 in kernels: exp, sums over a warp, and an order of 64-bit keys. Portable CuTe DSL."""

import math
import struct

import cutlass.cute as cute
from cutlass import Float64, Int32, Uint32, Uint64

_LOG2_E = 1.4426950408889634
# ln 2 = _LN2_HIGH + _LN2_LOW; the high part has so few bits that its product with n is exact.
_LN2_HIGH, _LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10
# What added to a number rounds it to a whole one, which the sum's low word then is.
_ROUNDER = 1.5 * 2.0**52
# 1 / i!: what the series leaves out is below 2^-57 on [-ln 2 / 2, ln 2 / 2].
_COEFFICIENTS = [1.0 / math.factorial(i) for i in range(14)]
_MANTISSA_BITS = 52
EXP_LIMIT = 700.0
"""Arguments of ``exp`` are cut to +-EXP_LIMIT: beyond, fp32 has nothing but 0 and Inf by far."""

_SIGN = 1 << 63
_ALL_ONES = (1 << 64) - 1


def fma(*terms: Float64 | float) -> Float64:
    """a * b + c, rounded once; Python numbers become part of the instruction."""
    values = [term for term in terms if not isinstance(term, float)]
    names = iter(f"{{$r{i}}}" for i in range(len(values)))
    operands = [
        f"0d{struct.pack('>d', term).hex()}" if isinstance(term, float) else next(names)
        for term in terms
    ]
    code = f"fma.rn.f64 {{$w0}}, {', '.join(operands)};"
    return cute.arch.inline_ptx(code, write_only_types=[Float64], read_only_args=values)


def _polynomial(x: Float64) -> Float64:
    total = fma(x, *_COEFFICIENTS[:-3:-1])
    for coefficient in _COEFFICIENTS[-3::-1]:
        total = fma(total, x, coefficient)
    return total


@cute.jit
def exp(x: Float64) -> Float64:
    """Within an ulp; NaN of NaN."""
    if x > Float64(EXP_LIMIT):
        x = Float64(EXP_LIMIT)
    if x < Float64(-EXP_LIMIT):
        x = Float64(-EXP_LIMIT)
    rounded = fma(x, _LOG2_E, _ROUNDER)
    power = rounded.bitcast(Uint64) << _MANTISSA_BITS
    n = rounded - Float64(_ROUNDER)
    rest = fma(n, -_LN2_LOW, fma(n, -_LN2_HIGH, x))
    total = _polynomial(rest)
    # Times 2^n: neither result nor exponent leaves its range.
    scaled = (total.bitcast(Uint64) + power).bitcast(Float64)
    if x != x:
        scaled = x
    return scaled


def _halves(bits: Uint64) -> tuple[Uint32, Uint32]:
    """Low and high word."""
    return Uint32(bits), Uint32(bits >> 32)


def _joined(low: Uint32, high: Uint32) -> Uint64:
    return (Uint64(high) << 32) | Uint64(low)


def warp_sum(value: Float64) -> Float64:
    """The same sum in every lane, of pairs of pairs: in the same order for every warp."""
    for step in range(5):
        low, high = _halves(value.bitcast(Uint64))
        other_low = cute.arch.shuffle_sync_bfly(low, 1 << step)
        other_high = cute.arch.shuffle_sync_bfly(high, 1 << step)
        value = value + _joined(other_low, other_high).bitcast(Float64)
    return value


@cute.jit
def key_of(value: Float64) -> Uint64:
    """Keys compare like values; that of NaN is above all, that of -0 is that of 0, none is 0."""
    bits = (value + Float64(0.0)).bitcast(Uint64)
    key = bits | Uint64(_SIGN)
    if value < Float64(0.0):
        key = ~bits
    if value != value:
        key = Uint64(_ALL_ONES)
    return key


@cute.jit
def value_of(key: Uint64) -> Float64:
    """The value of a key, NaN included."""
    bits = ~key
    if key >= Uint64(_SIGN):
        bits = key & Uint64(_SIGN - 1)
    return bits.bitcast(Float64)


@cute.jit
def warp_largest(key: Uint64, index: Int32):
    """Largest key of a warp's lanes, and its index: the lowest where several have it."""
    low, high = _halves(key)
    best_high = cute.arch.warp_redux_sync(high, "max")
    rival = Uint32(0)
    if high == best_high:
        rival = low
    best_low = cute.arch.warp_redux_sync(rival, "max")
    candidate = Uint32(0xFFFFFFFF)
    if high == best_high and low == best_low:
        candidate = Uint32(index)
    best = Int32(cute.arch.warp_redux_sync(candidate, "min"))
    return _joined(best_low, best_high), best
