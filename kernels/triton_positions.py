"""Positions of the spikes on the wire, for tiles: one of the minimum and one of the maximum for each group.

Layout: two rows of planes as in triton_planes.py, the minima's and the maxima's, in which the groups of all the
message's rows are the values. So a byte holds the positions of groups from all over a block of 32 groups (8 bits: of
one group). Tiles that begin at multiples of 32 groups, as `together` in `Kernel` asks for, own their bytes. Where tiles
are cut otherwise (SHARED), each sets its own bits in words that others may be changing: first and, then or, both of
them atomic. Nothing else writes to such words, and no bit has two owners, so the order in which tiles run is all one.

PLACES: bits of a position, 5 to 8. padded: the number of groups, up to a multiple of 8; a row is stored like that.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_planes import clear_plane_gaps, plane_nbytes
from .triton_tiles import align, sum_integers


@triton.jit
def store_positions(
    low_at, high_at, wire, count, number, there, first,
    PLACES: tl.constexpr, SHARED: tl.constexpr, NG: tl.constexpr,
):  # fmt: skip
    """Positions uint32 [NG] of the groups number, of which there are those `there` -> the planes at `wire`.

    count: the message's groups, int64; first: number of the tile's first.
    """
    padded = (count + 7) // 8 * 8
    if PLACES == 8:
        tl.store(wire + number, low_at.to(tl.uint8), mask=there)
        tl.store(wire + padded + number, high_at.to(tl.uint8), mask=there)
    else:
        both = tl.where(there, low_at | (high_at << 16), 0)
        if PLACES & 4:
            _store_plane(both, wire, padded, number, there, first, 4, 0, SHARED, NG)
            wire += plane_nbytes(count * 0 + 2, count, 4)
        if PLACES & 2:
            _store_plane(both, wire, padded, number, there, first, 2, PLACES & 4, SHARED, NG)
            wire += plane_nbytes(count * 0 + 2, count, 2)
        if PLACES & 1:
            _store_plane(both, wire, padded, number, there, first, 1, PLACES & 6, SHARED, NG)


@triton.jit
def _store_plane(
    both, plane, padded, number, there, first,
    WIDTH: tl.constexpr, SHIFT: tl.constexpr, SHARED: tl.constexpr, NG: tl.constexpr,
):  # fmt: skip
    """both: the minima's codes, and the maxima's 16 bits further up."""
    MASK: tl.constexpr = 2**WIDTH - 1
    codes = (both >> SHIFT) & (MASK * 0x10001)
    row = padded // 8 * WIDTH
    if SHARED:
        byte, shift = _place(number, padded, WIDTH)
        _merge(plane, byte, MASK << shift, (codes & MASK) << shift, there)
        _merge(plane, byte + row, MASK << shift, (codes >> 16) << shift, there)
    else:
        PARTS: tl.constexpr = 8 // WIDTH
        STRIDE: tl.constexpr = 4 * WIDTH  # bytes of a block
        tl.static_assert(NG % 32 == 0, "a tile must hold whole blocks of 32 groups")
        parts = (
            tl.reshape(codes, (NG // 32, PARTS, STRIDE)) << (WIDTH * tl.arange(0, PARTS)).to(tl.uint32)[None, :, None]
        )
        packed = sum_integers(parts, 1)
        block = first // 32 + tl.arange(0, NG // 32)[:, None]
        place = block * STRIDE + tl.arange(0, STRIDE)[None, :]
        full = (block * 32 + 32 <= padded) & (place >= 0)
        tl.store(plane + place, (packed & 0xFF).to(tl.uint8), mask=full)
        tl.store(plane + row + place, (packed >> 16).to(tl.uint8), mask=full)
        start = padded // 32 * 32
        if (start < padded) & (first <= start) & (start < first + NG):
            last = sum_integers(tl.where(block == start // 32, tl.reshape(codes, (NG // 32, 32)), 0), 0)
            _store_short(last, plane, padded, start, WIDTH)


@triton.jit
def _store_short(codes, plane, padded, start, WIDTH: tl.constexpr):
    """codes [32] of a row's last block, of 8, 16 or 24 groups from number `start` on."""
    byte, shift = _place(tl.arange(0, 32), (padded - start).to(tl.int32), WIDTH)
    own = tl.arange(0, 4 * WIDTH)
    packed = sum_integers(tl.where(byte[:, None] == own[None, :], (codes << shift)[:, None], 0), 0)
    row, plane = padded // 8 * WIDTH, plane + start // 8 * WIDTH
    mask = own < row - start // 8 * WIDTH
    tl.store(plane + own, (packed & 0xFF).to(tl.uint8), mask=mask)
    tl.store(plane + row + own, (packed >> 16).to(tl.uint8), mask=mask)


@triton.jit
def _place(number, padded, WIDTH: tl.constexpr):
    """Of the groups `number`: the byte of a row of a plane, and the lowest bit in it, uint32."""
    value = (number % 32).to(tl.int32)
    eighths = tl.minimum(tl.maximum(padded - number // 32 * 32, 8), 32).to(tl.int32) // 8  # of a block
    inverse = tl.where(eighths == 3, 11, 32 >> (eighths >> 1))  # 32 / eighths, so that there is no division
    part = (value // WIDTH * inverse) >> 5
    return number // 32 * (4 * WIDTH) + (value - part * (eighths * WIDTH)), (part * WIDTH).to(tl.uint32)


@triton.jit
def _merge(plane, byte, own, bits, mask):
    """Set the bits `own` of bytes to `bits`, whatever becomes of the others meanwhile."""
    word = (plane + byte // 4 * 4).to(tl.pointer_type(tl.int32))
    shift = (byte % 4 * 8).to(tl.uint32)
    own, bits = (own.to(tl.uint32) << shift).to(tl.int32), (bits.to(tl.uint32) << shift).to(tl.int32)
    tl.atomic_and(word, ~own, mask=mask, sem="relaxed")
    tl.debug_barrier()
    tl.atomic_or(word, bits, mask=mask, sem="relaxed")


@triton.jit
def clear_position_gaps(wire, count, PLACES: tl.constexpr, SHARED: tl.constexpr):
    """Zero what tiles leave: the gaps behind planes and, where no tile owns such bytes, groups that are missing."""
    padded = (count + 7) // 8 * 8
    if PLACES == 8:
        missing = count + tl.arange(0, 8)
        tl.store(wire + missing, tl.zeros([8], tl.uint8), mask=missing < padded)
        tl.store(wire + padded + missing, tl.zeros([8], tl.uint8), mask=missing < padded)
    if SHARED and PLACES < 8:
        if PLACES & 4:
            _clear_shared(wire, count, 4)
            wire += plane_nbytes(count * 0 + 2, count, 4)
        if PLACES & 2:
            _clear_shared(wire, count, 2)
            wire += plane_nbytes(count * 0 + 2, count, 2)
        if PLACES & 1:
            _clear_shared(wire, count, 1)
    else:
        clear_plane_gaps(wire, count * 0 + 2, count, PLACES)


@triton.jit
def _clear_shared(plane, count, WIDTH: tl.constexpr):
    padded = (count + 7) // 8 * 8
    row = padded // 8 * WIDTH
    missing = count + tl.arange(0, 8)
    byte, shift = _place(missing, padded, WIDTH)
    own = (2**WIDTH - 1) << shift
    _merge(plane, byte, own, own * 0, missing < padded)
    _merge(plane, byte + row, own, own * 0, missing < padded)
    gap = 2 * row + tl.arange(0, 16)
    _merge(plane, gap, gap * 0 + 0xFF, gap * 0, gap < align(2 * row))


@triton.jit
def load_positions(wire, count, number, there, PLACES: tl.constexpr):
    """-> positions of the minima and of the maxima, int32, of the groups `number`."""
    padded = (count + 7) // 8 * 8
    if PLACES == 8:
        low_at = tl.load(wire + number, mask=there, other=0).to(tl.int32)
        high_at = tl.load(wire + padded + number, mask=there, other=0).to(tl.int32)
    else:
        low_at, high_at = number.to(tl.int32) * 0, number.to(tl.int32) * 0
        if PLACES & 4:
            low_at, high_at = _load_plane(low_at, high_at, wire, padded, number, there, 4, 0)
            wire += plane_nbytes(count * 0 + 2, count, 4)
        if PLACES & 2:
            low_at, high_at = _load_plane(low_at, high_at, wire, padded, number, there, 2, PLACES & 4)
            wire += plane_nbytes(count * 0 + 2, count, 2)
        if PLACES & 1:
            low_at, high_at = _load_plane(low_at, high_at, wire, padded, number, there, 1, PLACES & 6)
    return low_at, high_at


@triton.jit
def _load_plane(low_at, high_at, plane, padded, number, there, WIDTH: tl.constexpr, SHIFT: tl.constexpr):
    """low_at, high_at with this plane's bits added."""
    byte, shift = _place(number, padded, WIDTH)
    low = tl.load(plane + byte, mask=there, other=0).to(tl.uint32) >> shift
    high = tl.load(plane + padded // 8 * WIDTH + byte, mask=there, other=0).to(tl.uint32) >> shift
    MASK: tl.constexpr = 2**WIDTH - 1
    return low_at | ((low & MASK) << SHIFT).to(tl.int32), high_at | ((high & MASK) << SHIFT).to(tl.int32)
