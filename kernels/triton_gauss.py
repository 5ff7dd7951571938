"""Gaussian codes on the GPU: tiles of the definition in codecs/gauss.py.

Layout: planes of codes, scales bf16 of the groups that do not hide theirs.

A value's code follows from how many thresholds are below u, its size in units of the rms. That is looked up: u, rounded
to a multiple of a power of two, gives the one threshold that may be among what is rounded there, and how many are
below. Groups of 256 count levels besides thresholds, as the next level decides where a code may move; the 16 values
that share a bit of the scale are in one thread. `Gauss.define_table` makes the tables.

Lookups have one axis: with more, some Tritons spread the first over the threads, and move all values there and back.
Hazard: in a group that is not finite u may be anything. It is cut to the bits that stay within the table.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_groups import (
    HIDING,
    clear_gaps,
    fitted,
    is_usable,
    is_value,
    load_scales,
    normalized,
    reciprocal,
    storable,
    store_scales,
)
from .triton_planes import load_codes, store_codes
from .triton_rotation import any_short, from_runs, group_sizes, rotate, to_runs
from .triton_tiles import from_bf16_bits, sum_integers


@triton.jit
def encode(
    x, wire, table, rows, features, blocks_per_row, start, low, high,
    BITS: tl.constexpr, GROUP: tl.constexpr, ROTATES: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """x fp32 [32, NB] -> its part of the wire; what is beyond a row's end does not matter."""
    n = group_sizes(start, features, blocks_per_row, GROUP, RAGGED, NB)
    if ROTATES:
        x = rotate(x, n, GROUP, RAGGED, NB)
    w, rms, power, inverse, finite = normalized(to_runs(x, GROUP, NB), n, GROUP, RAGGED, NB)
    if GROUP == HIDING:
        short = n < GROUP
        bits = storable(rms * power, finite)
        usable = is_usable(bits)
        scale = tl.where(short, rms, tl.where(usable, from_bf16_bits(bits) * inverse, 1.0))
        w = tl.where((usable | short)[None, :, None], w, 3.0 / 2**BITS)  # will be 0, or 1 once moved
        u = tl.abs(w) * reciprocal(scale)[None, :, None]
        below = _below(u, table, BITS + 1, BITS, GROUP, NB)
        signed = below ^ negative(w)
        if RAGGED:
            if any_short(n, GROUP):
                best = fitted(
                    tl.abs(w), _level(below >> 1, table, BITS, GROUP, NB), power, finite, n, GROUP, RAGGED, NB
                )
                bits = tl.where(short, best, bits)
                store_scales(
                    bits, n, wire, rows, features, blocks_per_row, start, low, high, BITS, GROUP, True, RAGGED, NB
                )
            code = _hidden(u, below, signed, bits, table, BITS, NB)
            code = tl.where(short[None, :, None], _if_usable(signed >> 1, bits, BITS), code)
        else:
            code = _hidden(u, below, signed, bits, table, BITS, NB)
    else:
        below = _below(tl.abs(w) * reciprocal(rms)[None, :, None], table, BITS, BITS, GROUP, NB)
        bits = fitted(tl.abs(w), _level(below, table, BITS, GROUP, NB), power, finite, n, GROUP, RAGGED, NB)
        code = _if_usable(below ^ negative(w), bits, BITS)
        store_scales(bits, n, wire, rows, features, blocks_per_row, start, low, high, BITS, GROUP, True, RAGGED, NB)
    code = ((code & (2**BITS - 1)) ^ (2 ** (BITS - 1))).to(tl.uint32)
    if RAGGED:
        code = tl.where(is_value(n, GROUP, NB), code, 0)
    code = from_runs(code, GROUP, NB)
    store_codes(code, wire, 0, rows, features, blocks_per_row, start, low, high, BITS, RAGGED, NB)
    if start == 0:
        clear_gaps(wire, rows, features, BITS, GROUP, True, RAGGED)


@triton.jit
def negative(w):
    """-1 where w < 0, else 0, int32."""
    return (w + 0.0).to(tl.int32, bitcast=True) >> 31  # a minus zero is none


@triton.jit
def _if_usable(code, bits, BITS: tl.constexpr):
    """Codes less 2**(BITS - 1) where the scale is usable, 0 elsewhere."""
    return code & tl.where(is_usable(bits), 2**BITS - 1, 0)[None, :, None]


@triton.jit
def _level(k, table, BITS: tl.constexpr, GROUP: tl.constexpr, NB: tl.constexpr):
    """Positive levels."""
    level = tl.load(table + 2 ** (BITS - 1) + tl.reshape(k, (32 * NB,)))
    return tl.reshape(level, (32, NB * 32 // GROUP, GROUP // 32))


@triton.jit
def _below(u, table, FINE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, NB: tl.constexpr):
    """How many boundaries are below u, int32. u: up to 17; FINE: bits that would have as many thresholds as there are
    boundaries."""
    cell = (u + 12582912.0 * 2.0 ** (2 - FINE)).to(tl.uint32, bitcast=True) & (2 ** (FINE + 3) - 1)
    boundary, below = _pair(table + 2**BITS, cell, GROUP, NB)
    return below + ((boundary - u).to(tl.uint32, bitcast=True) >> 31).to(tl.int32)


@triton.jit
def _pair(table, i, GROUP: tl.constexpr, NB: tl.constexpr):
    """The numbers 2i, fp32, and 2i + 1, int32, behind `table`, in one load."""
    both = tl.load(table.to(tl.pointer_type(tl.uint64)) + tl.reshape(i, (32 * NB,)))
    both = tl.reshape(both, (32, NB * 32 // GROUP, GROUP // 32))
    return both.to(tl.uint32).to(tl.float32, bitcast=True), (both >> 32).to(tl.int32)


@triton.jit
def _hidden(u, below, signed, bits, table, BITS: tl.constexpr, NB: tl.constexpr):
    """Codes less 2**(BITS - 1) of groups of 256, in runs, with `bits` for parities: int32.

    below: counts levels and thresholds, so that it is odd if the code may move up; signed: its bits turned over in
    negative values.
    """
    shape: tl.constexpr = (16, 2, NB // 8, 8)  # value 16t + 8s + l of a group is at [t, s, group, l]
    middle, gap = _pair(table + 2**BITS + 2 ** (BITS + 5), below, HIDING, NB)
    cost = gap.to(tl.float32, bitcast=True) * tl.abs(u - middle)
    cost = tl.reshape(cost.to(tl.int32, bitcast=True), shape)
    t = tl.arange(0, 16)[:, None, None, None]
    first = tl.min(tl.where(cost == tl.min(cost, axis=0)[None, :, :, :], t, 16), axis=0)
    signed = tl.reshape(signed, shape)
    code = signed >> 1
    bit = tl.arange(0, 2)[:, None, None] * 8 + tl.arange(0, 8)[None, None, :]
    wrong = ((sum_integers(code, 0).to(tl.int32) ^ (bits[None, :, None] >> bit)) & 1) == 1
    moves = t == tl.where(wrong, first, 16)[None, :, :, :]
    return tl.reshape(tl.where(moves, code + (signed & 1) * 2 - 1, code), (32, NB // 8, 8))


@triton.jit
def decode(
    wire, table, rows, features, blocks_per_row, start, low, high,
    BITS: tl.constexpr, GROUP: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """The tile's part of a wire -> fp32 [32, NB], still rotated."""
    n = group_sizes(start, features, blocks_per_row, GROUP, RAGGED, NB)
    codes = load_codes(wire, 0, rows, features, blocks_per_row, start, low, high, BITS, RAGGED, NB)
    if GROUP == HIDING:
        scale = _parities(codes, NB)
        if RAGGED:
            stored = load_scales(
                n, wire, rows, features, blocks_per_row, start, low, high, BITS, GROUP, True, RAGGED, NB
            )
            scale = tl.where(n < GROUP, stored, scale)
    else:
        scale = load_scales(n, wire, rows, features, blocks_per_row, start, low, high, BITS, GROUP, True, RAGGED, NB)
    levels = tl.load(table + tl.reshape(codes, (32 * NB,)))
    levels = tl.reshape(levels, (32, NB * 32 // GROUP, GROUP // 32))
    return tl.reshape(levels * scale[None, :, None], (32, NB))


@triton.jit
def _parities(codes, NB: tl.constexpr):
    """Codes of groups of 256, uint32 [32, NB] -> the scales they hide, fp32 [NG]. Four counts share a word."""
    byte = (8 * tl.arange(0, 4)).to(tl.uint32)
    words = sum_integers((tl.reshape(codes, (8, 4, NB)) & 1) << byte[None, :, None], 1)
    words = sum_integers(sum_integers(tl.reshape(words, (2, 4, NB // 8, 8)), 0), 2) & 0x01010101
    bits = (words | (words >> 7) | (words >> 14) | (words >> 21)) & 15
    return from_bf16_bits(sum_integers(bits << (4 * tl.arange(0, 4)).to(tl.uint32)[:, None], 0))
