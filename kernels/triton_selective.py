"""Codes within static ranges on the GPU: tiles of `Ranges` in codecs/selective.py. What outliers do besides is in
triton_outliers.py.

Layout: planes of codes. table: for each sender `low`, `scale` and `inverse`, each of these in eight parts: the first
four values of all blocks of a row, the next four, and so on, so that neighbouring threads, with a block each, load what
lies next to each other. FLAG: 1 where senders have ranges of their own, 0 where all have the first one's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_loads import load_parts
from .triton_planes import clear_plane_gaps, load_numbers, store_codes
from .triton_tiles import block_lengths, greater, inside, lesser, rounded_integer, row_and_column


@triton.jit
def encode(
    x, table, sender, wire, rows, features, blocks_per_row, start, low, high,
    BITS: tl.constexpr, FLAG: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """x fp32 [32, NB] -> its part of the wire."""
    TOP: tl.constexpr = 2**BITS - 1.0
    lowest = _ranges(table, sender, 0, features, blocks_per_row, start, low, high, FLAG, RAGGED, NB)
    inverse = _ranges(table, sender, 2, features, blocks_per_row, start, low, high, FLAG, RAGGED, NB)
    t = greater((x - lowest) * inverse, 0.0)
    codes = rounded_integer(lesser(t, TOP))
    if RAGGED == 1:
        codes = tl.where(inside(start, features, blocks_per_row, low, high, RAGGED, NB), codes, 0)
    store_codes(codes, wire, 0, rows, features, blocks_per_row, start, low, high, BITS, RAGGED, NB)
    if start == 0:
        clear_plane_gaps(wire, rows, features, BITS)


@triton.jit
def decode(
    wire, table, sender, rows, features, blocks_per_row, start, low, high,
    BITS: tl.constexpr, FLAG: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """The tile's part of a wire -> fp32 [32, NB]."""
    codes = load_numbers(wire, 0, rows, features, blocks_per_row, start, low, high, BITS, RAGGED, NB)
    lowest = _ranges(table, sender, 0, features, blocks_per_row, start, low, high, FLAG, RAGGED, NB)
    return lowest + codes * _ranges(table, sender, 1, features, blocks_per_row, start, low, high, FLAG, RAGGED, NB)


@triton.jit
def _ranges(
    table, sender, WHICH: tl.constexpr, features, blocks_per_row, start, low, high,
    FLAG: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """`low`, `scale` or `inverse` of the tile's values: fp32 [32, NB]."""
    _, column = row_and_column(start, blocks_per_row, NB)
    blocks = blocks_per_row  # of the table
    if RAGGED:
        blocks = (features + 31) // 32
    length = block_lengths(start, features, blocks_per_row, low, high, RAGGED, NB)
    return load_parts(table + (sender * FLAG * 3 + WHICH) * blocks * 32 + column // 8, length, blocks * 4, 0)
