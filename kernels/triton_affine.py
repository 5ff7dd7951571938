"""Group-wise affine integers on the GPU: tiles of the definition in codecs/affine.py.

Layout: planes of codes, scales bf16 [rows, groups], zeros likewise unless SYM. A group is whole within its tile.
Hazard: minima and maxima are taken over integers that sort like the values, as Triton's own drop NaNs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_planes import clear_plane_gaps, load_numbers, planes_nbytes, store_codes
from .triton_tiles import (
    align,
    bf16_bits,
    clear_gap,
    div_rn,
    from_bf16_bits,
    from_ordered,
    greater,
    group_numbers,
    lesser,
    live_groups,
    ordered,
    rounded_integer,
)


@triton.jit
def encode(
    x, inside, wire, rows, features, blocks_per_row, start, low, high,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYM: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """x fp32 [32, NB], of which the values `inside` count -> their part of the wire."""
    NG: tl.constexpr = NB * 32 // GROUP
    TOP: tl.constexpr = 2**BITS - 1
    HALF: tl.constexpr = 2 ** (BITS - 1)
    x = tl.reshape(x, (32, NG, GROUP // 32))
    key = ordered(x)
    if RAGGED:
        inside = tl.reshape(inside, (32, NG, GROUP // 32))
        smallest = from_ordered(tl.min(tl.min(tl.where(inside, key, 0x7FFFFFFF), axis=0), axis=1)) + 0.0
        largest = from_ordered(tl.max(tl.max(tl.where(inside, key, -0x7FFFFFFF - 1), axis=0), axis=1)) + 0.0
    else:
        smallest = from_ordered(tl.min(tl.min(key, axis=0), axis=1)) + 0.0
        largest = from_ordered(tl.max(tl.max(key, axis=0), axis=1)) + 0.0
    if SYM:
        finite = (largest - largest == 0) & (smallest - smallest == 0)
        scale = tl.where(-smallest >= largest, smallest, largest) * (-1.0 / HALF)  # a power of two: exact
        centre = 0.0 * smallest
    else:
        zero_bits = smallest.to(tl.int32, bitcast=True)
        zero_bits = (zero_bits >> 16) + ((zero_bits < 0) & ((zero_bits & 0xFFFF) != 0)).to(tl.int32)  # rounded down
        centre = from_bf16_bits(zero_bits & 0xFFFF)
        span = largest - centre
        finite = span - span == 0
        scale = div_rn(span, tl.zeros_like(span) + TOP)
        centre = tl.where(finite, centre, 0.0)
    scale_bits = bf16_bits(scale)
    scale = from_bf16_bits(scale_bits)
    usable = finite & (tl.abs(scale) >= 1.1754943508222875e-38)
    inverse = tl.where(usable, div_rn(tl.zeros_like(scale) + 1.0, tl.where(usable, scale, 1.0)), 0.0)
    # A group that is not finite has products of NaN; minimum takes the other number, the limit, which makes code 0.
    if SYM:
        limit = tl.where(finite, HALF - 1.0, -1.0 * HALF)
        t = greater(lesser(x * inverse[None, :, None], limit[None, :, None]), -1.0 * HALF)
        codes = rounded_integer(t) + HALF
    else:
        limit = tl.where(finite, 1.0 * TOP, 0.0)
        codes = rounded_integer(lesser((x - centre[None, :, None]) * inverse[None, :, None], limit[None, :, None]))
    if RAGGED:
        codes = tl.where(inside, codes, 0)
    codes = tl.reshape(codes, (32, NB))
    store_codes(codes, wire, 0, rows, features, blocks_per_row, start, low, high, BITS, RAGGED, NB)

    scales = wire + planes_nbytes(rows, features, BITS)
    count = rows.to(tl.int64) * ((features + GROUP - 1) // GROUP)
    number, there = group_numbers(start, features, blocks_per_row, GROUP, RAGGED, NB)
    there = there & live_groups(start, low, high, GROUP, NB)
    bits = tl.where(finite, tl.where(usable, scale_bits, 0), 0x7FC0).to(tl.uint16)
    tl.store(scales.to(tl.pointer_type(tl.uint16)) + number, bits, mask=there)
    if not SYM:
        zeros = scales + align(2 * count)
        bits = tl.where(finite, zero_bits & 0xFFFF, 0x7FC0).to(tl.uint16)
        tl.store(zeros.to(tl.pointer_type(tl.uint16)) + number, bits, mask=there)
    if start == 0:
        clear_gaps(wire, rows, features, BITS, GROUP, SYM)


@triton.jit
def clear_gaps(wire, rows, features, BITS: tl.constexpr, GROUP: tl.constexpr, SYM: tl.constexpr):
    size = 2 * rows.to(tl.int64) * ((features + GROUP - 1) // GROUP)
    scales = wire + planes_nbytes(rows, features, BITS)
    clear_plane_gaps(wire, rows, features, BITS)
    clear_gap(scales, size)
    if not SYM:
        clear_gap(scales + align(size), size)


@triton.jit
def decode(
    wire, rows, features, blocks_per_row, start, low, high,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYM: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """The tile's part of a wire -> fp32 [32, NB]."""
    NG: tl.constexpr = NB * 32 // GROUP
    codes = load_numbers(wire, 0, rows, features, blocks_per_row, start, low, high, BITS, RAGGED, NB)
    codes = tl.reshape(codes, (32, NG, GROUP // 32))
    scales = wire + planes_nbytes(rows, features, BITS)
    number, there = group_numbers(start, features, blocks_per_row, GROUP, RAGGED, NB)
    there = there & live_groups(start, low, high, GROUP, NB)
    scale = from_bf16_bits(tl.load(scales.to(tl.pointer_type(tl.uint16)) + number, mask=there, other=0))
    if SYM:
        values = (codes - 2.0 ** (BITS - 1)) * scale[None, :, None]
    else:
        count = rows.to(tl.int64) * ((features + GROUP - 1) // GROUP)
        zeros = (scales + align(2 * count)).to(tl.pointer_type(tl.uint16))
        zero = from_bf16_bits(tl.load(zeros + number, mask=there, other=0))
        values = zero[None, :, None] + codes * scale[None, :, None]
    return tl.reshape(values, (32, NB))
