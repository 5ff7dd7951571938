"""What belongs to the groups of an integer codec with spikes, for 32 groups at a time, one group a lane.

The arithmetic of `codecs/spike.py` on spikes, short floats, scales and zeros, bit for bit. Vectors pass between this
file and cpu_spike.py through *slots*: neighbouring pieces of 128 bytes, lane k at byte 4k, undefined where there are
fewer than 32 groups.
"""

from __future__ import annotations

import numpy as np

from . import cpu_simd as simd
from .cpu_planes import load_codes
from .cpu_simd import inline, separate

SLOT = 128
NAN = np.int32(0x7FC00000)
UPPER = np.int32(-0x10000)  # the half of a key that is a value
_INF = np.int32(0x7F800000)
_MINUS_INF = np.int32(-0x7F810000)  # ordered, upper half
_ONE = np.int32(0x3F800000)  # 1.0
_MAGNITUDE = np.int32(0x7FFFFFFF)


@inline
def _exponent(low, high):
    larger = simd.maximum(simd.and_(low, _MAGNITUDE), simd.and_(high, _MAGNITUDE))
    return simd.shift_right(larger, np.int32(23))


@inline
def _anchor(low, high):
    return simd.choose(simd.fless(np.float32(0), low), low, simd.and_(simd.fless(high, np.float32(0)), high))


@inline
def _shorten(value, signed, exponent, away):
    mantissa = np.int32(3) if signed else np.int32(4)
    step = np.int32(23) - mantissa
    rounded = simd.add(simd.and_(value, _MAGNITUDE), simd.and_(away, (np.int32(1) << step) - np.int32(1)))
    code = simd.shift_right(rounded, step)
    short = simd.maximum(simd.sub(code, simd.shift_left(exponent, mantissa)), simd.and_(away, np.int32(1)))
    sign = simd.and_(simd.less(value, np.int32(0)), np.int32(128))
    return simd.and_(simd.less((np.int32(1) << mantissa) - np.int32(1), code), simd.or_(short, sign))


@inline
def _lengthen(short, signed, exponent):
    code = simd.and_(short, np.int32(127) if signed else np.int32(255))
    bits = simd.shift_left(code, np.int32(20) if signed else np.int32(19))
    bits = simd.minimum(simd.add(bits, simd.shift_left(exponent, np.int32(23))), _INF)
    some = simd.and_(simd.less(np.int32(0), code), simd.less(np.int32(0x007FFFFF), bits))
    sign = simd.shift_left(simd.sub(short, code), np.int32(24))
    return simd.or_(simd.and_(some, bits), sign)


@inline
def _scale(scales, low, high, bits, sym):
    return _lengthen(scales, sym, simd.sub(_exponent(low, high), np.int32(13) + np.int32(bits)))


@inline
def _zero(zeros, low, high):
    offset = _lengthen(zeros, True, simd.sub(_exponent(low, high), np.int32(14)))
    return simd.at_least(simd.fadd(_anchor(low, high), offset), low)


@inline
def _key_value(keys):
    """Ordered upper halves -> fp32 bits."""
    return simd.and_(simd.ordered(keys), UPPER)


@separate
def choose_parameters(slots, bits, sym):
    """The two smallest keys of 32 groups, upwards and downwards, in four slots -> eight slots in their place.

    Those are: scale and zero as stored, low, high (NaN if the group is not finite), their positions, zero, 1 / scale.
    """
    low_keys, low_seconds = simd.load_fp32(slots), simd.load_fp32(slots + SLOT)
    high_keys, high_seconds = simd.load_fp32(slots + 2 * SLOT), simd.load_fp32(slots + 3 * SLOT)
    low, lo = simd.and_(low_keys, UPPER), simd.and_(low_seconds, UPPER)
    high = simd.and_(simd.sub(simd.splat(np.int32(-1)), high_keys), UPPER)
    hi = simd.and_(simd.sub(simd.splat(np.int32(-1)), high_seconds), UPPER)
    empty = simd.less(hi, lo)
    lo, hi = _key_value(simd.choose(empty, low, lo)), _key_value(simd.choose(empty, low, hi))
    finite = simd.and_(simd.less(_MINUS_INF, low), simd.less(high, _INF))
    low, high = _key_value(low), _key_value(high)
    finite = simd.and_(finite, simd.less(simd.and_(simd.fsub(hi, low), _MAGNITUDE), _INF))
    low, high, lo, hi = simd.and_(finite, low), simd.and_(finite, high), simd.and_(finite, lo), simd.and_(finite, hi)

    half = np.float32(1 << (bits - 1)) + np.float32(0.5)
    exponent = _exponent(low, high)
    if sym:
        zeros = simd.splat(np.int32(0))
        zero = zeros
        extreme = simd.choose(simd.fless(simd.fmul(lo, np.float32(-1)), hi), hi, lo)
        ideal = simd.fdiv(extreme, -half)
    else:
        start = simd.fadd(lo, simd.fmul(simd.fsub(hi, lo), np.float32(0.25) / np.float32(1 << (bits - 1))))
        start = simd.choose(simd.fless(low, lo), start, lo)
        offset = simd.fsub(start, _anchor(low, high))
        zeros = _shorten(offset, True, simd.sub(exponent, np.int32(14)), simd.fless(offset, np.float32(0)))
        zero = _zero(zeros, low, high)
        top = np.float32((1 << bits) - 1)
        inside = simd.splat(simd.as_int(top + np.float32(0.5)))
        steps = simd.choose(simd.fless(hi, high), inside, simd.splat(simd.as_int(top)))
        ideal = simd.fdiv(simd.at_least(simd.fsub(hi, zero), np.float32(0)), steps)
    scales = _shorten(ideal, sym, simd.sub(exponent, np.int32(13) + np.int32(bits)), finite)
    scale = _scale(scales, low, high, bits, sym)
    some = simd.less(np.int32(0), simd.and_(scale, _MAGNITUDE))

    nan = simd.splat(NAN)
    simd.store_fp32(slots, scales)
    simd.store_fp32(slots + SLOT, zeros)
    simd.store_fp32(slots + 2 * SLOT, simd.choose(finite, low, nan))
    simd.store_fp32(slots + 3 * SLOT, simd.choose(finite, high, nan))
    simd.store_fp32(slots + 4 * SLOT, simd.and_(finite, simd.and_(low_keys, np.int32(255))))
    simd.store_fp32(slots + 5 * SLOT, simd.and_(finite, simd.and_(high_keys, np.int32(255))))
    simd.store_fp32(slots + 6 * SLOT, zero)
    simd.store_fp32(slots + 7 * SLOT, simd.and_(some, simd.fdiv(simd.splat(_ONE), scale)))


@separate
def read_parameters(batch, count, groups, sections, skip, codec, scratch, slots):
    """What one wire, `skip` bytes on, says of `count` groups -> six slots: scale, zero, low, high, their positions."""
    (_, scales, zeros, spikes, positions), (bits, _, places, sym) = sections, codec
    for k in range(count):
        at = skip + batch + k
        simd.store_word(slots + 4 * k, simd.load_byte(scales + at))
        if not sym:
            simd.store_word(slots + SLOT + 4 * k, simd.load_byte(zeros + at))
        low, high = spikes + skip + 2 * (batch + k), spikes + skip + 2 * (groups + batch + k)
        simd.store_word(slots + 2 * SLOT + 4 * k, simd.load_half(low) << 16)
        simd.store_word(slots + 3 * SLOT + 4 * k, simd.load_half(high) << 16)
    low, high = simd.load_fp32(slots + 2 * SLOT), simd.load_fp32(slots + 3 * SLOT)
    finite = simd.less(_exponent(low, high), np.int32(255))
    nan = simd.splat(NAN)
    scale = _scale(simd.load_fp32(slots), low, high, bits, sym)
    simd.store_fp32(slots, simd.choose(finite, scale, nan))
    if not sym:
        simd.store_fp32(slots + SLOT, _zero(simd.load_fp32(slots + SLOT), low, high))
    simd.store_fp32(slots + 2 * SLOT, simd.choose(finite, low, nan))
    simd.store_fp32(slots + 3 * SLOT, simd.choose(finite, high, nan))
    padded_groups = (groups + 7) // 8 * 8
    for k in range(2):
        at = k * padded_groups + batch
        simd.store_fp32(slots + (4 + k) * SLOT, load_codes(count, at, positions, skip, places, scratch))
