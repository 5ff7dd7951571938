"""Integers with spikes on the GPU: tiles of the definition in codecs/spike.py.

A value and its place are one integer, the key: the ordered form of its bf16 in the upper half, the place in the lower.
So the smallest key is the minimum and its first position, the second smallest the low end of the rest; and with the
upper half inverted the same two operations find the maximum and the high end.

Layout: planes of codes, scales and zeros (not if SYM) uint8 [groups], spikes bf16 [2, groups], positions as in
triton_positions.py. SHARED: of that file.
Hazard: foreign bytes may hold any position. Spikes are placed by comparing, so one beyond its group is lost.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_planes import clear_plane_gaps, load_numbers, planes_nbytes, store_codes
from .triton_positions import clear_position_gaps, load_positions, store_positions
from .triton_tiles import (
    align,
    clear_gap,
    div_rn,
    from_bf16_bits,
    greater,
    group_numbers,
    lesser,
    live_groups,
    rounded_integer,
)


@triton.jit
def encode(
    x, inside, wire, rows, features, blocks_per_row, start, low, high,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYM: tl.constexpr, RAGGED: tl.constexpr, SHARED: tl.constexpr,
    NB: tl.constexpr,
):  # fmt: skip
    """x fp32 [32, NB], of which the values `inside` count -> their part of the wire."""
    NG: tl.constexpr = NB * 32 // GROUP
    PLACES: tl.constexpr = 5 + (GROUP > 32) + (GROUP > 64) + (GROUP > 128)
    TOP: tl.constexpr = 2**BITS - 1
    HALF: tl.constexpr = 2 ** (BITS - 1)
    x = tl.reshape(x, (32, NG, GROUP // 32))
    inside = tl.reshape(inside, (32, NG, GROUP // 32))
    place = tl.arange(0, 32)[:, None, None] + 32 * tl.arange(0, GROUP // 32)[None, None, :]
    bits = x.to(tl.int32, bitcast=True)
    order = bits + (((bits >> 16) & 1) + 0x7FFF)  # rounds to bf16, and may turn a NaN's sign, so that is not asked
    order = tl.where(bits < 0, order ^ 0x7FFFFFFF, order)
    up, down = (order & -0x10000) | place, (~order & -0x10000) | place
    if RAGGED:
        up, down = tl.where(inside, up, 0x7FFFFFFF), tl.where(inside, down, 0x7FFFFFFF)
    first, second = _two_smallest(up, GROUP, NG)
    last, last_but_one = _two_smallest(down, GROUP, NG)
    smallest, largest, low_at, high_at = _value(first), _value(~last), first & 0xFF, last & 0xFF
    lo, hi = _value(second), _value(~last_but_one)
    if RAGGED:  # there may be no others
        lo, hi = tl.where(second == 0x7FFFFFFF, smallest, lo), tl.where(second == 0x7FFFFFFF, smallest, hi)
    finite = (smallest > float("-inf")) & (largest < float("inf")) & (hi - smallest < float("inf"))
    smallest, largest = tl.where(finite, smallest, 0.0), tl.where(finite, largest, 0.0)
    lo, hi = tl.where(finite, lo, 0.0), tl.where(finite, hi, 0.0)

    zeros, scales, zero, scale = _choose(smallest, largest, lo, hi, finite, BITS, SYM)
    usable = scale > 0 if not SYM else scale != 0
    inverse = tl.where(usable, div_rn(tl.zeros_like(scale) + 1.0, tl.where(usable, scale, 1.0)), 0.0)
    if SYM:  # where nothing is finite, all lies on the lower bound, NaNs too: they lose against any number
        top = tl.where(finite, HALF - 1.0, -1.0 * HALF)[None, :, None]
        t = lesser(greater(x * inverse[None, :, None], -1.0 * HALF), top)
        codes = rounded_integer(t) + HALF
    else:
        t = (x - zero[None, :, None]) * inverse[None, :, None]
        codes = rounded_integer(lesser(greater(t, 0.0), TOP * 1.0))
    spikes = _marks(low_at, GROUP, NG) | _marks(high_at, GROUP, NG)
    codes = tl.where(_marked(spikes), 0, codes)
    if RAGGED:
        codes = tl.where(inside, codes, 0)
    codes = tl.reshape(codes, (32, NB))
    store_codes(codes, wire, 0, rows, features, blocks_per_row, start, low, high, BITS, RAGGED, NB)

    count = _count(rows, features, GROUP)
    number, there = group_numbers(start, features, blocks_per_row, GROUP, RAGGED, NB)
    there = there & live_groups(start, low, high, GROUP, NB)
    at_scales, at_zeros, at_spikes, at_positions = _sections(wire, rows, features, count, BITS, SYM)
    tl.store(at_scales + number, scales.to(tl.uint8), mask=there)
    if not SYM:
        tl.store(at_zeros + number, zeros.to(tl.uint8), mask=there)
    at_spikes = at_spikes.to(tl.pointer_type(tl.uint16))
    tl.store(at_spikes + number, _spike_bits(smallest, finite), mask=there)
    tl.store(at_spikes + count + number, _spike_bits(largest, finite), mask=there)
    low_at = tl.where(finite, low_at, 0).to(tl.uint32)
    high_at = tl.where(finite, high_at, 0).to(tl.uint32)
    store_positions(low_at, high_at, at_positions, count, number, there, start // (GROUP // 32), PLACES, SHARED, NG)
    if start == 0:
        clear_plane_gaps(wire, rows, features, BITS)
        clear_gap(at_scales, count)
        if not SYM:
            clear_gap(at_zeros, count)
        clear_gap(at_spikes.to(tl.pointer_type(tl.uint8)), 4 * count)
        clear_position_gaps(at_positions, count, PLACES, SHARED)


@triton.jit
def decode(
    wire, rows, features, blocks_per_row, start, low, high,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYM: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """The tile's part of a wire -> fp32 [32, NB]."""
    NG: tl.constexpr = NB * 32 // GROUP
    PLACES: tl.constexpr = 5 + (GROUP > 32) + (GROUP > 64) + (GROUP > 128)
    codes = load_numbers(wire, 0, rows, features, blocks_per_row, start, low, high, BITS, RAGGED, NB)
    codes = tl.reshape(codes, (32, NG, GROUP // 32))
    count = _count(rows, features, GROUP)
    number, there = group_numbers(start, features, blocks_per_row, GROUP, RAGGED, NB)
    there = there & live_groups(start, low, high, GROUP, NB)
    at_scales, at_zeros, at_spikes, at_positions = _sections(wire, rows, features, count, BITS, SYM)
    at_spikes = at_spikes.to(tl.pointer_type(tl.uint16))
    smallest = from_bf16_bits(tl.load(at_spikes + number, mask=there, other=0))
    largest = from_bf16_bits(tl.load(at_spikes + count + number, mask=there, other=0))
    low_at, high_at = load_positions(at_positions, count, number, there, PLACES)
    scales = tl.load(at_scales + number, mask=there, other=0).to(tl.int32)
    exponent = _exponent(smallest, largest)
    scale = _lengthen(scales, exponent - (13 + BITS), SYM)
    finite = (tl.abs(smallest) < float("inf")) & (tl.abs(largest) < float("inf"))
    if SYM:
        scale = tl.where(finite, scale, float("nan"))
        values = (codes - 2.0 ** (BITS - 1)) * scale[None, :, None]
    else:
        zeros = tl.load(at_zeros + number, mask=there, other=0).to(tl.int32)
        zero = tl.where(finite, _zero(zeros, smallest, largest, exponent), float("nan"))
        values = zero[None, :, None] + codes * scale[None, :, None]
    smallest = tl.where(finite, smallest, float("nan"))[None, :, None]
    largest = tl.where(finite, largest, float("nan"))[None, :, None]
    if SYM:  # else the zero is a bound already
        values = tl.where(values < smallest, smallest, values)
    values = tl.where(largest < values, largest, values)
    values = tl.where(_marked(_marks(low_at, GROUP, NG)), smallest, values)
    values = tl.where(_marked(_marks(high_at, GROUP, NG)), largest, values)
    return tl.reshape(values, (32, NB))


@triton.jit
def _count(rows, features, GROUP: tl.constexpr):
    """Groups of the message, int64."""
    return rows.to(tl.int64) * ((features + GROUP - 1) // GROUP)


@triton.jit
def _sections(wire, rows, features, count, BITS: tl.constexpr, SYM: tl.constexpr):
    """Where scales, zeros, spikes and positions begin."""
    scales = wire + planes_nbytes(rows, features, BITS)
    zeros = scales + align(count)
    spikes = zeros if SYM else zeros + align(count)
    return scales, zeros, spikes, spikes + align(4 * count)


@triton.jit
def _two_smallest(key, GROUP: tl.constexpr, NG: tl.constexpr):
    """key int32 [32, NG, GROUP / 32], no two alike in a group -> each group's smallest and second smallest."""
    pairs = tl.reshape(key, (16, 2, NG, GROUP // 32))  # so that half of the values need no comparing with the smallest
    less, more = tl.min(pairs, axis=1), tl.max(pairs, axis=1)
    first = tl.min(less, axis=0)
    second = tl.min(tl.where(less == first[None, :, :], more, less), axis=0)
    of_all = tl.min(first, axis=1)
    return of_all, tl.min(tl.where(first == of_all[:, None], second, first), axis=1)


@triton.jit
def _marks(at, GROUP: tl.constexpr, NG: tl.constexpr):
    """One place of each group, int32 [NG] -> for each block a bit for each value, uint32 [NG, GROUP / 32]."""
    at = at[:, None] - 32 * tl.arange(0, GROUP // 32)[None, :]
    return tl.where((at & -32) == 0, 1 << (at & 31), 0)


@triton.jit
def _marked(marks):
    """-> bool [32, NG, GROUP / 32]. Bits that are known while compiling cost less than comparing places."""
    return (marks[None, :, :] & (1 << tl.arange(0, 32))[:, None, None]) != 0


@triton.jit
def _value(key):
    """The value in the upper half of a key, fp32."""
    order = key & -0x10000
    return (order ^ ((order >> 31) & 0x7FFF0000)).to(tl.float32, bitcast=True)


@triton.jit
def _spike_bits(spike, finite):
    return tl.where(finite, spike.to(tl.uint32, bitcast=True) >> 16, 0x7FC0).to(tl.uint16)


@triton.jit
def _choose(smallest, largest, lo, hi, finite, BITS: tl.constexpr, SYM: tl.constexpr):
    """Zeros and scales of groups: as bytes, int32, and as the numbers that these stand for."""
    exponent = _exponent(smallest, largest)
    if SYM:
        extreme = tl.where(-lo >= hi, lo, hi)
        zeros, zero = tl.zeros_like(exponent), tl.zeros_like(lo)
        ideal = div_rn(extreme, tl.zeros_like(lo) - (2.0 ** (BITS - 1) + 0.5))
    else:
        begin = tl.where(lo == smallest, lo, lo + (hi - lo) * 2.0 ** -(BITS + 1))
        offset = begin - _anchor(smallest, largest)
        zeros = _shorten(offset, exponent - 14, offset < 0, True)
        zero = _zero(zeros, smallest, largest, exponent)
        steps = tl.where(hi != largest, 2.0**BITS - 0.5, 2.0**BITS - 1)
        ideal = div_rn(tl.maximum(hi - zero, 0.0), steps)
    scales = _shorten(ideal, exponent - (13 + BITS), finite, SYM)
    return zeros, scales, zero, _lengthen(scales, exponent - (13 + BITS), SYM)


@triton.jit
def _exponent(smallest, largest):
    """Of the larger magnitude, as fp32 stores it."""
    smallest = smallest.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = largest.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.maximum(smallest, largest) >> 23


@triton.jit
def _anchor(smallest, largest):
    return tl.where(smallest > 0, smallest, tl.where(largest < 0, largest, 0.0))


@triton.jit
def _zero(zeros, smallest, largest, exponent):
    zero = _anchor(smallest, largest) + _lengthen(zeros, exponent - 14, True)
    return tl.where(zero < smallest, smallest, zero)


@triton.jit
def _shorten(value, exponent, away, SIGNED: tl.constexpr):
    """fp32 -> bytes, int32: rounded away from 0 where `away` says so, else towards 0.

    exponent: fp32's stored exponent for that of 0 here. No value is too large, and NaN does not occur.
    """
    MANTISSA: tl.constexpr = 3 if SIGNED else 4
    away = away.to(tl.int32)
    rounded = tl.abs(value).to(tl.int32, bitcast=True) + away * (2 ** (23 - MANTISSA) - 1)
    rounded = rounded >> (23 - MANTISSA)
    code = tl.maximum(rounded - (exponent << MANTISSA), away) | ((value < 0).to(tl.int32) << 7)
    return tl.where(rounded < 2**MANTISSA, 0, code)  # below fp32's normal numbers


@triton.jit
def _lengthen(short, exponent, SIGNED: tl.constexpr):
    """The inverse of `_shorten`, of any bytes: below fp32's normal numbers it is 0, beyond them infinite."""
    code = short & 127 if SIGNED else short
    bits = (code << (20 if SIGNED else 19)) + (exponent << 23)
    bits = tl.where((code > 0) & (bits >= 0x00800000), tl.minimum(bits, 0x7F800000), 0)
    value = bits.to(tl.float32, bitcast=True)
    return tl.where(short > 127, -value, value) if SIGNED else value
