"""Small floats with block scales on the GPU: tiles of the definition in codecs/microscaling.py.

Layout: planes of codes, scales [rows, blocks], and in nvfp4 row scales [rows]. BITS names the element
(triton_minifloat.py); SCALE says what a block's scale is: 0 bf16 (fp8), 1 E8M0 (MX), 2 E4M3 under a row's (nvfp4).

A group is a block of GROUP values, but two blocks of 16 in nvfp4. So there are [PARTS, groups] scales, and values are
seen as [PARTS, 32 / PARTS, groups, GROUP / 32].

Magnitudes are compared as integers, which sort like them and have NaN above Inf. Hazard: a row scale needs the whole
row before there is any code. `row_peak` finds what `encode` is given for it, tile by tile if the row has several.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..codecs.minifloat import E2M1, E2M3, E4M3
from . import triton_minifloat as minifloat
from .triton_planes import clear_plane_gaps, load_codes, planes_nbytes, store_codes
from .triton_tiles import (
    align,
    bf16_bits,
    clear_gap,
    div_rn,
    from_bf16_bits,
    group_numbers,
    live_blocks,
    live_groups,
    row_and_column,
)

_SMALLEST_NORMAL, _SMALLEST_ROW_SCALE = tl.constexpr(2.0**-126), tl.constexpr(2.0**-117)
_E4M3_LARGEST, _E2M1_LARGEST = tl.constexpr(E4M3.largest), tl.constexpr(E2M1.largest)
_E4M3_HIGHEST, _E2M3_HIGHEST, _E2M1_HIGHEST = (tl.constexpr(element.highest) for element in (E4M3, E2M3, E2M1))
_E4M3_NAN = tl.constexpr(E4M3.nan)
_INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def _blocks(x, inside, GROUP: tl.constexpr, SCALE: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr):
    """x [32, NB] -> by parts and groups, 0 where there is none; the bits of each block's largest magnitude, int32."""
    PARTS: tl.constexpr = 2 if SCALE == 2 else 1
    if RAGGED:
        x = tl.where(inside, x, 0.0)
    x = tl.reshape(x, (PARTS, 32 // PARTS, NB * 32 // GROUP, GROUP // 32))
    return x, tl.max(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1), axis=2)


@triton.jit
def row_peak(x, inside, start, low, high, RAGGED: tl.constexpr, NB: tl.constexpr):
    """Bits of the largest magnitude in the tile's finite blocks of 16, int32."""
    _, amax = _blocks(x, inside, 32, 2, RAGGED, NB)
    live = live_blocks(start, low, high, NB)[None, :] & (amax < _INFINITY)
    return tl.max(tl.max(tl.where(live, amax, 0), axis=0), axis=0)


@triton.jit
def _reciprocal(scale):
    """1 / scale, and 0 of 0."""
    return tl.where(scale > 0, div_rn(tl.zeros_like(scale) + 1.0, tl.where(scale > 0, scale, 1.0)), 0.0)


@triton.jit
def encode(
    x, inside, peak, wire, rows, features, blocks_per_row, start, low, high,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """x fp32 [32, NB], of which the values `inside` count -> their part of the wire.

    peak: for SCALE 2, the largest `row_peak` of the row's tiles; `low` is the first block of the row then.
    """
    x, amax = _blocks(x, inside, GROUP, SCALE, RAGGED, NB)
    finite = amax < _INFINITY
    amax = tl.where(finite, amax, 0)
    scales = wire + planes_nbytes(rows, features, BITS)
    number, there = _scale_places(start, features, blocks_per_row, low, high, GROUP, SCALE, RAGGED, NB)
    magnitude = amax.to(tl.float32, bitcast=True)
    if SCALE == 0:
        scale = div_rn(magnitude, tl.zeros_like(magnitude) + _E4M3_LARGEST)
        code = tl.where(scale >= _SMALLEST_NORMAL, bf16_bits(scale), 0)
        inverse = _reciprocal(from_bf16_bits(code))
        code = tl.where(finite, code, 0x7FC0).to(tl.uint16)
        scales = scales.to(tl.pointer_type(tl.uint16))
    elif SCALE == 1:
        HIGHEST: tl.constexpr = _E4M3_HIGHEST if BITS == 8 else (_E2M3_HIGHEST if BITS == 6 else _E2M1_HIGHEST)
        code = tl.maximum((amax >> 23) - HIGHEST, 0)
        inverse = ((254 - code) << 23).to(tl.float32, bitcast=True)
        code = tl.where(finite, code, 0xFF).to(tl.uint8)
    else:
        row = div_rn(peak.to(tl.float32, bitcast=True), _E4M3_LARGEST * _E2M1_LARGEST)
        row = tl.where(row >= _SMALLEST_ROW_SCALE, row, 0.0)
        ratio = div_rn(magnitude, tl.zeros_like(magnitude) + tl.where(row > 0, row * _E2M1_LARGEST, 1.0))
        code = minifloat.encode(tl.where(row > 0, ratio, 0.0), 8)
        inverse = _reciprocal(minifloat.decode(code, 8) * row)
        code = tl.where(finite, code, _E4M3_NAN).to(tl.uint8)
        row_scales = (scales + align(_scales_nbytes(rows, features, GROUP, SCALE))).to(tl.pointer_type(tl.float32))
        tl.store(row_scales + low // blocks_per_row, row, mask=(start == low) & (low < high))
    tl.store(scales + number, code, mask=there)
    codes = minifloat.encode(tl.where(finite[:, None, :, None], x, 0.0) * inverse[:, None, :, None], BITS)
    codes = tl.reshape(codes, (32, NB))
    store_codes(codes, wire, 0, rows, features, blocks_per_row, start, low, high, BITS, RAGGED, NB)
    if start == 0:
        clear_gaps(wire, rows, features, blocks_per_row, BITS, GROUP, SCALE, RAGGED)


@triton.jit
def clear_gaps(
    wire, rows, features, blocks_per_row,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    scales = wire + planes_nbytes(rows, features, BITS)
    size = _scales_nbytes(rows, features, GROUP, SCALE)
    clear_plane_gaps(wire, rows, features, BITS)
    clear_gap(scales, size)
    if SCALE == 2:
        clear_gap(scales + align(size), 4 * (rows if RAGGED else features // (32 * blocks_per_row)).to(tl.int64))


@triton.jit
def _scales_nbytes(rows, features, GROUP: tl.constexpr, SCALE: tl.constexpr):
    """Of the section of block scales."""
    BLOCK: tl.constexpr = 16 if SCALE == 2 else GROUP
    return rows.to(tl.int64) * ((features + BLOCK - 1) // BLOCK) * (1 if SCALE else 2)


@triton.jit
def _scale_places(
    start, features, blocks_per_row, low, high,
    GROUP: tl.constexpr, SCALE: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """For each of the tile's blocks: its number on the wire, int64, and whether it is there: [PARTS, groups]."""
    if SCALE == 2:
        part = tl.arange(0, 2)[:, None]
        there = live_blocks(start, low, high, NB)[None, :] & (part >= 0)
        if RAGGED:
            row, column = row_and_column(start, blocks_per_row, NB)
            column = column[None, :] + 16 * part
            number = row[None, :] * (features // 16) + column // 16
            there = there & (column < features)
        else:
            number = start.to(tl.int64) * 2 + (tl.arange(0, NB)[None, :] * 2 + part)
    else:
        number, there = group_numbers(start, features, blocks_per_row, GROUP, RAGGED, NB)
        number, there = number[None, :], (there & live_groups(start, low, high, GROUP, NB))[None, :]
    return number, there


@triton.jit
def decode(
    wire, rows, features, blocks_per_row, start, low, high,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """The tile's part of a wire -> fp32 [32, NB]."""
    PARTS: tl.constexpr = 2 if SCALE == 2 else 1
    scales = wire + planes_nbytes(rows, features, BITS)
    number, there = _scale_places(start, features, blocks_per_row, low, high, GROUP, SCALE, RAGGED, NB)
    if SCALE == 0:
        scale = from_bf16_bits(tl.load(scales.to(tl.pointer_type(tl.uint16)) + number, mask=there, other=0))
    elif SCALE == 1:
        code = tl.load(scales + number, mask=there, other=0).to(tl.int32)
        # Byte 0 is 2**-127, a subnormal number: Triton's products take it as it is, so one factor will do.
        scale = tl.where(code == 0xFF, 0x7FC00000, tl.maximum(code << 23, 0x00400000)).to(tl.float32, bitcast=True)
    else:
        row_scales = (scales + align(_scales_nbytes(rows, features, GROUP, SCALE))).to(tl.pointer_type(tl.float32))
        row, _ = row_and_column(start, blocks_per_row, NB)
        row = tl.load(row_scales + row, mask=live_blocks(start, low, high, NB), other=0.0)
        scale = minifloat.decode(tl.load(scales + number, mask=there, other=0).to(tl.uint32), 8) * row[None, :]
    codes = load_codes(wire, 0, rows, features, blocks_per_row, start, low, high, BITS, RAGGED, NB)
    values = tl.reshape(minifloat.decode(codes, BITS), (PARTS, 32 // PARTS, NB * 32 // GROUP, GROUP // 32))
    return tl.reshape(values * scale[:, None, :, None], (32, NB))
