"""Outlier features on the GPU (codecs/outliers.py): what a tile of any family does besides, in the same program.

OUTLIERS: 0 where a codec has none, 1 where rows come as they are, 2 where they are split already, into ordinary
features followed by outliers. The former are gathered and scattered by `index`, int32: offsets from the start of a row,
of its own ordinary features and those of the rows behind it, each row filled up to whole units with -1, over
(blocks_per_row + NB) blocks, so that a tile that starts anywhere in the row finds all of its own; then the row's
outlier features.

Section: the outliers, bf16 [rows, count], behind the wire of the ordinary features. They are dealt out to the blocks of
their row, SHARE for each, so that a program touches neighbours in x at one time, while the cache still holds them.

SPOILS (selective4, whose tiles are rows): a value that is not finite makes NaNs of all outliers of its row when
encoded, and a first outlier that is NaN makes NaNs of a row when decoded.

Hazard: gathered and scattered tiles are [NB, 32]. The other way round neighbouring threads would have neighbouring
blocks and not neighbouring values, each with a cache line, and each store with a sector, of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_loads import hidden_zero, load_tile, settled
from .triton_tiles import (
    clear_gap,
    from_bf16_bits,
    inside,
    live_blocks,
    load_values,
    places,
    rounded_bits,
    row_and_column,
    store_rounded,
)


@triton.jit
def load(
    x, table, index, pitch, features, blocks_per_row, start, low, high,
    OUTLIERS: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """The tile's ordinary features of x, whose rows are `pitch` apart: fp32 [32, NB], 0 where there are none."""
    if OUTLIERS == 1:
        number = tl.arange(0, NB)[:, None] * 32 + tl.arange(0, 32)[None, :]
        place = tl.load(index + start % blocks_per_row * 32 + number)
        live = live_blocks(start, low, high, NB)[:, None] & (place >= 0)
        values = load_values(x + (start // blocks_per_row).to(tl.int64) * pitch + place, live)
        values = settled(tl.trans(values), table, NB)
    elif 1 < RAGGED and RAGGED < 32:
        live = inside(start, features, blocks_per_row, low, high, RAGGED, NB)
        values = load_values(x + places(start, pitch, blocks_per_row, 0, NB), live)
    else:
        values = load_tile(x, pitch, features, blocks_per_row, start, low, high, RAGGED + OUTLIERS, RAGGED, NB)
    return values


@triton.jit
def store(
    out, values, table, index, pitch, features, blocks_per_row, start, low, high,
    OUTLIERS: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """The inverse of `load`, rounded to the dtype of out."""
    if OUTLIERS == 1:
        number = tl.arange(0, NB)[:, None] * 32 + tl.arange(0, 32)[None, :]
        number = number ^ hidden_zero(number).to(tl.int32)  # else Triton loads several at once, and stores them so
        place = tl.load(index + start % blocks_per_row * 32 + number)
        live = live_blocks(start, low, high, NB)[:, None] & (place >= 0)
        values = tl.trans(settled(values, table, NB))
        store_rounded(out + (start // blocks_per_row).to(tl.int64) * pitch + place, values, live)
    else:
        live = inside(start, features, blocks_per_row, low, high, RAGGED, NB)
        APART: tl.constexpr = OUTLIERS or (RAGGED == 1 or RAGGED == 32)  # Triton 3.2 takes no chains
        store_rounded(out + places(start, pitch, blocks_per_row, APART, NB), values, live)


@triton.jit
def encode(
    x, values, index, section, pitch, rows, ordinary, count, blocks_per_row, start, low, high,
    OUTLIERS: tl.constexpr, SHARE: tl.constexpr, SPOILS: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """The outliers of x that are this tile's -> their part of the section. values: its ordinary features."""
    WIDTH: tl.constexpr = SHARE if SHARE < 32 else 32
    row, first, end = _dealt(count, blocks_per_row, start, low, high, SHARE, NB)
    spoilt = False
    if SPOILS:
        spoilt = not_finite(values)
        for j in range(0, SHARE, WIDTH):
            number = first + j + tl.arange(0, WIDTH)[None, :]
            place = _place(index, pitch, ordinary, blocks_per_row, row, number, end, OUTLIERS, NB)
            spoilt = spoilt | not_finite(load_values(x + place, number < end))
    for j in range(0, SHARE, WIDTH):
        number = first + j + tl.arange(0, WIDTH)[None, :]
        place = _place(index, pitch, ordinary, blocks_per_row, row, number, end, OUTLIERS, NB)
        _write(section, load_values(x + place, number < end), row * count + number, number < end, spoilt, SPOILS)
    if start == 0:
        clear_gap(section, 2 * rows.to(tl.int64) * count)


@triton.jit
def reduce(
    section, stride, out, spoilt, index, pitch, ordinary, count, blocks_per_row, start, low, high,
    OUTLIERS: tl.constexpr, SHARE: tl.constexpr, SPOILS: tl.constexpr, NB: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The sum of COUNT sections' outliers that are this tile's -> their places in out. spoilt: as `spoils` finds."""
    WIDTH: tl.constexpr = SHARE if SHARE < 32 else 32
    row, first, end = _dealt(count, blocks_per_row, start, low, high, SHARE, NB)
    for j in range(0, SHARE, WIDTH):
        number = first + j + tl.arange(0, WIDTH)[None, :]
        total = _sum(section, stride, row * count + number, number < end, COUNT)
        if SPOILS:
            total = tl.where(spoilt, float("nan"), total)
        place = _place(index, pitch, ordinary, blocks_per_row, row, number, end, OUTLIERS, NB)
        store_rounded(out + place, total, number < end)


@triton.jit
def reduce_encode(
    section, stride, summed, values, spoilt, rows, count, blocks_per_row, start, low, high,
    SHARE: tl.constexpr, SPOILS: tl.constexpr, TO_SPOILS: tl.constexpr, NB: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The sum of COUNT sections' outliers that are this tile's -> their part of the section at `summed`.

    values: the sum of its ordinary features; spoilt: as `spoils` finds of the wires.
    """
    WIDTH: tl.constexpr = SHARE if SHARE < 32 else 32
    row, first, end = _dealt(count, blocks_per_row, start, low, high, SHARE, NB)
    if TO_SPOILS:
        if SPOILS:
            spoilt = spoilt | not_finite(values)
        else:
            spoilt = not_finite(values)
        for j in range(0, SHARE, WIDTH):
            number = first + j + tl.arange(0, WIDTH)[None, :]
            spoilt = spoilt | not_finite(_sum(section, stride, row * count + number, number < end, COUNT))
    for j in range(0, SHARE, WIDTH):
        number = first + j + tl.arange(0, WIDTH)[None, :]
        total = _sum(section, stride, row * count + number, number < end, COUNT)
        _write(summed, total, row * count + number, number < end, spoilt, SPOILS or TO_SPOILS)
    if start == 0:
        clear_gap(summed, 2 * rows.to(tl.int64) * count)


@triton.jit
def spoils(section, stride, count, blocks_per_row, start, high, COUNT: tl.constexpr):
    """Whether the first outlier of the tile's row is NaN in the sum of COUNT sections: a scalar."""
    row = (start // blocks_per_row).to(tl.int64)
    first = _sum(section, stride, row * count, start < high, COUNT)
    return first != first


@triton.jit
def not_finite(x):
    """Whether any of x [m, n] is NaN or infinite: a scalar."""
    return tl.max(tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), axis=0), axis=0) > 0


@triton.jit
def _dealt(count, blocks_per_row, start, low, high, SHARE: tl.constexpr, NB: tl.constexpr):
    """Of each block, [NB, 1]: its row, int64, the number of the first outlier that falls to it, and where they end."""
    row, column = row_and_column(start, blocks_per_row, NB)
    first = column // 32 * SHARE
    end = tl.where(live_blocks(start, low, high, NB), tl.minimum(first + SHARE, count), 0)
    return row[:, None], first[:, None], end[:, None]


@triton.jit
def _place(index, pitch, ordinary, blocks_per_row, row, number, end, OUTLIERS: tl.constexpr, NB: tl.constexpr):
    """Offset of an outlier in a tensor whose rows are `pitch` apart."""
    if OUTLIERS == 1:
        place = row * pitch + tl.load(index + (blocks_per_row + NB) * 32 + number, mask=number < end, other=0)
    else:
        place = row * pitch + (ordinary + number)
    return place


@triton.jit
def _sum(section, stride, place, there, COUNT: tl.constexpr):
    """The sum of what COUNT sections, `stride` bytes apart, hold at `place`, in order: fp32."""
    total = from_bf16_bits(tl.load(section.to(tl.pointer_type(tl.uint16)) + place, mask=there, other=0))
    for _ in range(1, COUNT):
        section += stride
        total += from_bf16_bits(tl.load(section.to(tl.pointer_type(tl.uint16)) + place, mask=there, other=0))
    return total


@triton.jit
def _write(section, x, place, there, spoilt, SPOILS: tl.constexpr):
    """x, or NaNs, in bf16 -> the section."""
    if SPOILS:
        x = tl.where(spoilt, float("nan"), x)
    tl.store(section.to(tl.pointer_type(tl.uint16)) + place, rounded_bits(x, tl.bfloat16), mask=there)
