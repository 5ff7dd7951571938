"""What Gaussian codecs do with whole groups: normalize, add up in the order of the definition, store and load scales.

Groups come as runs, [32, NG, L] (triton_rotation.py); n, int32 [NG], are their sizes. The blocks whose values are added
one after another are then in one thread, as are the first of the halves that follow.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_planes import clear_plane_gaps, planes_nbytes
from .triton_rotation import halves
from .triton_tiles import bf16_bits, clear_gap, div_rn, from_bf16_bits, group_numbers, live_groups, sqrt_rn

HIDING: tl.constexpr = tl.constexpr(256)  # values of a group whose scale is not stored, where a codec hides any


@triton.jit
def is_value(n, GROUP: tl.constexpr, NB: tl.constexpr):
    """Which places of runs hold a value: bool [32, NG, L]."""
    L: tl.constexpr = GROUP // 32
    return tl.arange(0, 32)[:, None, None] * L + tl.arange(0, L)[None, None, :] < n[None, :, None]


@triton.jit
def normalized(z, n, GROUP: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr):
    """z -> w = z * 2**-e, its rms, 2**e, 2**-e, and whether the group is finite; if it is not, the others are anything.

    Beyond a group's end w is 0.
    """
    if RAGGED:
        z = tl.where(is_value(n, GROUP, NB), z, 0.0)
    peak = tl.max(tl.max(z.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0), axis=1)
    exponent = tl.minimum(tl.maximum(peak >> 23, 1), 253)
    power = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    w = z * inverse[None, :, None]
    total = ordered_sum(w * w, GROUP, NB)
    if RAGGED:
        rms = sqrt_rn(div_rn(total, tl.maximum(n, 1).to(tl.float32)))
    else:
        rms = sqrt_rn(total * (1.0 / GROUP))  # a power of two: exact
    return w, rms, power, inverse, peak < 0x7F800000


@triton.jit
def ordered_sum(x, GROUP: tl.constexpr, NB: tl.constexpr):
    """The sum of each group's values in the order of the definition: fp32 [NG]."""
    L: tl.constexpr = GROUP // 32
    NG: tl.constexpr = NB // L
    M: tl.constexpr = 32 * NG
    if L == 8:
        first, last = halves(tl.reshape(x, (8, M)), 8, 4, M)
        a, b, c, d = _rows(first, M)
        total = ((a + b) + c) + d
        a, b, c, d = _rows(last, M)
        total = (((total + a) + b) + c) + d
    elif L == 4:
        a, b, c, d = _rows(x, M)
        total = ((a + b) + c) + d
    elif L == 2:
        a, b = halves(tl.reshape(x, (2, M)), 2, 1, M)
        total = a + b
    else:
        total = x
    total = tl.reshape(total, (32 // L, NG, L))
    for step in tl.static_range(1, 6):
        if (32 // L) >> step > 0:
            total = tl.sum(tl.reshape(total, (2, (32 // L) >> step, NG, L)), axis=0)
    if L == 8:
        return tl.sum(tl.sum(tl.sum(tl.reshape(total, (NG, 2, 2, 2)), axis=1), axis=1), axis=1)
    elif L == 4:
        return tl.sum(tl.sum(tl.reshape(total, (NG, 2, 2)), axis=1), axis=1)
    elif L == 2:
        return tl.sum(tl.reshape(total, (NG, 2)), axis=1)
    else:
        return tl.reshape(total, (NG,))


@triton.jit
def _rows(x, M: tl.constexpr):
    """The four rows of x [4, M]."""
    first, last = halves(tl.reshape(x, (4, M)), 4, 2, M)
    a, b = halves(tl.reshape(first, (2, M)), 2, 1, M)
    c, d = halves(tl.reshape(last, (2, M)), 2, 1, M)
    return a, b, c, d


@triton.jit
def reciprocal(x):
    """1 / x, and 0 for 0."""
    return tl.where(x == 0, 0.0, div_rn(tl.zeros_like(x) + 1.0, tl.where(x == 0, 1.0, x)))


@triton.jit
def storable(scale, finite):
    """fp32 scales -> their bf16 bits, int32: 0 for what is not positive and normal, 0x7FC0 for what is not finite."""
    bits = bf16_bits(scale).to(tl.int32)
    usable = finite & (bits < 0x7F80)
    return tl.where(usable, tl.where(bits < 0x80, 0, bits), tl.where(finite & (bits >= 0x8000), 0, 0x7FC0))


@triton.jit
def is_usable(bits):
    """Of `storable`: whether it is more than 0 and no NaN."""
    return (bits > 0) & (bits < 0x7F80)


@triton.jit
def fitted(w, level, power, finite, n, GROUP: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr):
    """Bits of the scale with which `level` comes closest to w * power: int32 [NG]."""
    norm = level * level
    if RAGGED:
        norm = tl.where(is_value(n, GROUP, NB), norm, 0.0)
    scale = div_rn(ordered_sum(w * level, GROUP, NB), ordered_sum(norm, GROUP, NB))
    return storable(scale * power, finite)


@triton.jit
def store_scales(
    bits, n, wire, rows, features, blocks_per_row, start, low, high,
    BITS: tl.constexpr, GROUP: tl.constexpr, HIDES: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """bits int32 [NG]. HIDES: whether groups of 256 do, so that only shorter ones have a scale here."""
    scales = (wire + planes_nbytes(rows, features, BITS)).to(tl.pointer_type(tl.uint16))
    number, there = _scale_numbers(n, start, features, blocks_per_row, low, high, GROUP, HIDES, RAGGED, NB)
    tl.store(scales + number, bits.to(tl.uint16), mask=there)


@triton.jit
def clear_gaps(
    wire, rows, features, BITS: tl.constexpr, GROUP: tl.constexpr, HIDES: tl.constexpr, RAGGED: tl.constexpr
):
    """Zero the bytes between sections."""
    clear_plane_gaps(wire, rows, features, BITS)
    scales = wire + planes_nbytes(rows, features, BITS)
    if HIDES and GROUP == HIDING:
        if RAGGED:
            clear_gap(scales, 2 * rows.to(tl.int64))
    else:
        clear_gap(scales, 2 * rows.to(tl.int64) * ((features + GROUP - 1) // GROUP))


@triton.jit
def load_scales(
    n, wire, rows, features, blocks_per_row, start, low, high,
    BITS: tl.constexpr, GROUP: tl.constexpr, HIDES: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """-> fp32 [NG]; 0 where none is stored."""
    scales = (wire + planes_nbytes(rows, features, BITS)).to(tl.pointer_type(tl.uint16))
    number, there = _scale_numbers(n, start, features, blocks_per_row, low, high, GROUP, HIDES, RAGGED, NB)
    return from_bf16_bits(tl.load(scales + number, mask=there, other=0))


@triton.jit
def _scale_numbers(
    n, start, features, blocks_per_row, low, high,
    GROUP: tl.constexpr, HIDES: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """Which of the stored scales is each group's, int64, and whether it has one: [NG]."""
    number, there = group_numbers(start, features, blocks_per_row, GROUP, RAGGED, NB)
    if HIDES and GROUP == HIDING:
        there = there & (n < GROUP)
        number = number // (features // GROUP + 1)
    return number, there & live_groups(start, low, high, GROUP, NB)
