"""Codes of 2 to 8 bits as planes of bits (layout: codecs/packing.py), for tiles of [32, NB] codes.

The 32 codes of a block are first put into 8 words of 4 bytes, one code a byte: word k holds the values 4k to 4k + 3. A
plane of width w has w words for a block, and its word m collects the words m, m + w, m + 2w, ..., w bits of each. So
what must move between lanes is a quarter of the codes, and each load and store is of whole words.

A row's last block is laid out otherwise when it is short: there each byte of the plane is put together from single
codes, and each code is read from its byte. That costs more, and only tiles in which a row ends do it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_loads import whole_words
from .triton_tiles import (
    align,
    clear_gap,
    group_numbers,
    live_blocks,
    numbers_of_bytes,
    row_and_column,
    sum_integers,
)


@triton.jit
def plane_nbytes(rows, features, WIDTH: tl.constexpr):
    """Length of a plane, up to the next section."""
    return align(rows.to(tl.int64) * ((features + 7) // 8 * WIDTH))


@triton.jit
def planes_nbytes(rows, features, BITS: tl.constexpr):
    """Length of all planes of a code."""
    total = rows.to(tl.int64) * 0
    if BITS == 8:
        total += plane_nbytes(rows, features, 8)
    else:
        if BITS & 4:
            total += plane_nbytes(rows, features, 4)
        if BITS & 2:
            total += plane_nbytes(rows, features, 2)
        if BITS & 1:
            total += plane_nbytes(rows, features, 1)
    return total


@triton.jit
def clear_plane_gaps(wire, rows, features, BITS: tl.constexpr):
    """Zero the bytes between a code's planes and what follows them."""
    row = (features + 7) // 8
    rows = rows.to(tl.int64)
    if BITS == 8:
        clear_gap(wire, rows * row * 8)
    else:
        if BITS & 4:
            clear_gap(wire, rows * row * 4)
            wire += plane_nbytes(rows, features, 4)
        if BITS & 2:
            clear_gap(wire, rows * row * 2)
            wire += plane_nbytes(rows, features, 2)
        if BITS & 1:
            clear_gap(wire, rows * row)


@triton.jit
def store_codes(
    codes, wire, offset, rows, features, blocks_per_row, start, low, high,
    BITS: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """codes uint32 [32, NB], each below 2**BITS and 0 beyond a row's end -> the planes at wire + offset."""
    even, odd = tl.split(tl.permute(tl.reshape(codes, (16, 2, NB)), (0, 2, 1)))  # wants the two in one thread
    even, odd = tl.split(tl.permute(tl.reshape(even | (odd << 8), (8, 2, NB)), (0, 2, 1)))
    words = even | (odd << 16)
    if BITS == 8:
        _store_plane(words, codes, wire + offset, features, blocks_per_row, start, low, high, 8, 0, RAGGED, NB)
    else:
        if BITS & 4:
            _store_plane(words, codes, wire + offset, features, blocks_per_row, start, low, high, 4, 0, RAGGED, NB)
            offset += plane_nbytes(rows, features, 4)
        if BITS & 2:
            _store_plane(
                words, codes, wire + offset, features, blocks_per_row, start, low, high, 2, BITS & 4, RAGGED, NB
            )
            offset += plane_nbytes(rows, features, 2)
        if BITS & 1:
            _store_plane(
                words, codes, wire + offset, features, blocks_per_row, start, low, high, 1, BITS & 6, RAGGED, NB
            )


@triton.jit
def _store_plane(
    words, codes, plane, features, blocks_per_row, start, low, high,
    WIDTH: tl.constexpr, SHIFT: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """SHIFT: of the plane's lowest bit in the codes."""
    PARTS: tl.constexpr = 8 // WIDTH
    MASK: tl.constexpr = (2**WIDTH - 1) * 0x01010101
    parts = tl.reshape((words >> SHIFT) & MASK, (PARTS, WIDTH, NB))
    packed = sum_integers(parts << (WIDTH * tl.arange(0, PARTS)).to(tl.uint32)[:, None, None], 0)
    word = tl.arange(0, WIDTH)[:, None]
    live = live_blocks(start, low, high, NB)
    if RAGGED != 1:
        number, there = group_numbers(start, features, blocks_per_row, 32, RAGGED, NB)
        place = number[None, :] * WIDTH + word
        tl.store(plane.to(tl.pointer_type(tl.uint32)) + place, packed, mask=(live & there)[None, :] & (word >= 0))
    else:
        row, column = row_and_column(start, blocks_per_row, NB)
        place = row * ((features + 7) // 8 * WIDTH) + column // 8 * WIDTH  # of the block's first byte
        full = live & (column + 32 <= features)
        byte = tl.arange(0, 4)[None, :, None]
        tl.store(
            plane + (place[None, None, :] + word[:, None, :] * 4 + byte),
            ((packed[:, None, :] >> (8 * byte).to(tl.uint32)) & 0xFF).to(tl.uint8),
            mask=full[None, None, :] & (word[:, None, :] + byte >= 0),
        )
        short = live & (column < features) & (column + 32 > features)
        if tl.max(short.to(tl.int32), axis=0) > 0:  # names of their own in here: Triton keeps a name's type
            stride = (features % 32 + 7) // 8 * WIDTH  # bytes of the short block
            value, own = tl.arange(0, 32)[:, None, None], tl.arange(0, 4 * WIDTH)
            part = ((codes >> SHIFT) & (2**WIDTH - 1))[:, None, :] << (value // stride * WIDTH).to(tl.uint32)
            last = sum_integers(tl.where(value % stride == own[None, :, None], part, 0), 0)
            tl.store(
                plane + (place[None, :] + own[:, None]),
                last.to(tl.uint8),
                mask=short[None, :] & (own < stride)[:, None],
            )


@triton.jit
def load_codes(
    wire, offset, rows, features, blocks_per_row, start, low, high,
    BITS: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """The inverse of `store_codes`: -> codes uint32 [32, NB]; beyond a row's end they are anything below 2**BITS."""
    codes = _load_planes(wire, offset, rows, features, blocks_per_row, start, low, high, BITS, RAGGED, NB)
    if RAGGED != 1:
        codes = tl.reshape((codes[:, None, :] >> (8 * tl.arange(0, 4)).to(tl.uint32)[None, :, None]) & 0xFF, (32, NB))
    return codes


@triton.jit
def load_numbers(
    wire, offset, rows, features, blocks_per_row, start, low, high,
    BITS: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """`load_codes` as fp32 [32, NB]."""
    codes = _load_planes(wire, offset, rows, features, blocks_per_row, start, low, high, BITS, RAGGED, NB)
    if RAGGED == 1:
        return codes.to(tl.float32)
    else:
        return numbers_of_bytes(codes, NB)


@triton.jit
def _load_planes(
    wire, offset, rows, features, blocks_per_row, start, low, high,
    BITS: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """Codes uint32: words [8, NB] with a byte for each; single ones, [32, NB], if RAGGED == 1."""
    if BITS == 8:
        codes = _load_plane(wire + offset, features, blocks_per_row, start, low, high, 8, RAGGED, NB)
    else:
        codes = tl.zeros([32 if RAGGED == 1 else 8, NB], tl.uint32)
        if BITS & 4:
            codes = _load_plane(wire + offset, features, blocks_per_row, start, low, high, 4, RAGGED, NB)
            offset += plane_nbytes(rows, features, 4)
        if BITS & 2:
            part = _load_plane(wire + offset, features, blocks_per_row, start, low, high, 2, RAGGED, NB)
            codes = codes | (part << (BITS & 4))
            offset += plane_nbytes(rows, features, 2)
        if BITS & 1:
            part = _load_plane(wire + offset, features, blocks_per_row, start, low, high, 1, RAGGED, NB)
            codes = codes | (part << (BITS & 6))
    return codes


@triton.jit
def _load_plane(
    plane, features, blocks_per_row, start, low, high, WIDTH: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr
):
    """The bits of a plane, uint32: words [8, NB], a byte for a code; single ones, [32, NB], if RAGGED == 1."""
    live = live_blocks(start, low, high, NB)[None, :]
    if RAGGED == 1:
        row, column = row_and_column(start, blocks_per_row, NB)
        place = row * ((features + 7) // 8 * WIDTH) + column // 8 * WIDTH  # of the block's first byte
        stride = tl.minimum(32, (features - column + 7) // 8 * 8) // 8 * WIDTH  # bytes of the block
        stride = tl.maximum(stride, 1).to(tl.int32)[None, :]
        value = tl.arange(0, 32)[:, None]
        mask = live & (column[None, :] + value < features)
        byte = tl.load(plane + (place[None, :] + value % stride), mask=mask, other=0).to(tl.uint32)
        return (byte >> (value // stride * WIDTH).to(tl.uint32)) & (2**WIDTH - 1)
    else:
        PARTS: tl.constexpr = 8 // WIDTH
        MASK: tl.constexpr = (2**WIDTH - 1) * 0x01010101
        word = tl.arange(0, WIDTH)[:, None]
        number, there = group_numbers(start, features, blocks_per_row, 32, RAGGED, NB)
        place = number[None, :] * WIDTH + word
        mask = live & there[None, :] & (word >= 0)
        packed = tl.load(plane.to(tl.pointer_type(tl.uint32)) + place, mask=mask, other=0)
        if WIDTH == 8:  # a thread would load half a block
            packed = whole_words(packed, NB)
        shifts = (WIDTH * tl.arange(0, PARTS)).to(tl.uint32)[:, None, None]
        return tl.reshape((packed[None, :, :] >> shifts) & MASK, (8, NB))
