"""Trellis codes on the GPU: tiles of the definition in codecs/trellis.py.

Layout: planes of codes, then scales bf16 of all groups.

Decoding takes the lowest bits of a block's codes together into a word, which shifted by one and by two has those of the
codes before; so no value waits for another.

Encoding does: it goes through a group's values one by one, all of the tile's groups side by side, and back. What it
has to remember lies in `scratch`, a word for each value, int32 [32 * NB] for each program: first u, then which
predecessor each state has and the nearest level of each subset, then the code and its level. The search is
slow beside everything else here. The table has the levels and then, by subset, the thresholds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_groups import clear_gaps, fitted, is_usable, is_value, load_scales, normalized, reciprocal, store_scales
from .triton_planes import load_codes, store_codes
from .triton_rotation import from_runs, group_sizes, rotate, to_runs
from .triton_tiles import sum_integers


@triton.jit
def encode(
    x, wire, table, scratch, rows, features, blocks_per_row, start, low, high,
    BITS: tl.constexpr, GROUP: tl.constexpr, ROTATES: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """x fp32 [32, NB] -> its part of the wire; what is beyond a row's end does not matter."""
    L: tl.constexpr = GROUP // 32
    NG: tl.constexpr = NB // L
    n = group_sizes(start, features, blocks_per_row, GROUP, RAGGED, NB)
    if ROTATES:
        x = rotate(x, n, GROUP, RAGGED, NB)
    w, rms, power, _, finite = normalized(to_runs(x, GROUP, NB), n, GROUP, RAGGED, NB)

    value = tl.arange(0, 32)[:, None, None] * L + tl.arange(0, L)[None, None, :]
    place = scratch + (tl.arange(0, NG)[None, :, None] * GROUP + value)
    tl.store(place, (w * reciprocal(rms)[None, :, None]).to(tl.int32, bitcast=True))
    tl.debug_barrier()
    _search(scratch + tl.arange(0, NG) * GROUP, n, table, BITS, GROUP, NG)
    tl.debug_barrier()
    found = tl.load(place)

    level = tl.reshape(tl.load(table + tl.reshape(found >> 8, (32 * NB,))), (32, NG, L))
    bits = fitted(w, level, power, finite, n, GROUP, RAGGED, NB)
    store_scales(bits, n, wire, rows, features, blocks_per_row, start, low, high, BITS, GROUP, False, RAGGED, NB)
    code = tl.where(is_usable(bits)[None, :, None], found & 0xFF, 0).to(tl.uint32)
    if RAGGED:
        code = tl.where(is_value(n, GROUP, NB), code, 0)
    store_codes(from_runs(code, GROUP, NB), wire, 0, rows, features, blocks_per_row, start, low, high, BITS, RAGGED, NB)
    if start == 0:
        clear_gaps(wire, rows, features, BITS, GROUP, False, RAGGED)


@triton.jit
def _search(word, n, table, BITS: tl.constexpr, GROUP: tl.constexpr, NG: tl.constexpr):
    """The path of least distance through the n values of each group that begins at `word`: [NG] each.

    A word turns from u into its code and, 8 bits up, the index of its level.
    """
    a = tl.zeros([NG], tl.float32)  # the costs of states 0 to 3
    b, c, d = a + 1e9, a + 1e9, a + 1e9
    for t in range(0, GROUP):
        u = tl.load(word + t).to(tl.float32, bitcast=True)
        i, p = _nearest(u, table, 0, BITS)
        j, q = _nearest(u, table, 1, BITS)
        k, r = _nearest(u, table, 2, BITS)
        m, s = _nearest(u, table, 3, BITS)
        a, b, c, d, seconds = _step(a, b, c, d, p, q, r, s, t < n)
        tl.store(word + t, seconds | (i << 4) | (j << 8) | (k << 12) | (m << 16))
    lowest = tl.minimum(tl.minimum(a, b), tl.minimum(c, d))
    state = tl.where(a == lowest, 0, tl.where(b == lowest, 1, tl.where(c == lowest, 2, 3)))
    for back in range(0, GROUP):
        t = GROUP - 1 - back
        choices = tl.load(word + t)
        second = (choices >> state) & 1
        # Subsets by state are 0, 2, 1, 3 after the first predecessor and 2, 0, 3, 1 after the second.
        subset = ((state & 1) ^ second) * 2 + (state >> 1)
        index = (choices >> (4 * subset + 4)) & 15
        tl.store(word + t, (2 * index + (state & 1)) | ((4 * index + subset) << 8))
        state = tl.where(t < n, (state >> 1) + 2 * second, state)


@triton.jit
def _step(a, b, c, d, p, q, r, s, counts):
    """Costs of the states and of the subsets' levels -> new costs, and bits that say which states come from a second
    predecessor. Where a value does not count, costs stay."""
    first_0, second_0 = a + p, c + r
    first_1, second_1 = a + r, c + p
    first_2, second_2 = b + q, d + s
    first_3, second_3 = b + s, d + q
    seconds = (second_0 < first_0).to(tl.int32) | ((second_1 < first_1).to(tl.int32) << 1)
    seconds |= ((second_2 < first_2).to(tl.int32) << 2) | ((second_3 < first_3).to(tl.int32) << 3)
    return (
        tl.where(counts, tl.where(second_0 < first_0, second_0, first_0), a),
        tl.where(counts, tl.where(second_1 < first_1, second_1, first_1), b),
        tl.where(counts, tl.where(second_2 < first_2, second_2, first_2), c),
        tl.where(counts, tl.where(second_3 < first_3, second_3, first_3), d),
        seconds,
    )


@triton.jit
def _nearest(u, table, SUBSET: tl.constexpr, BITS: tl.constexpr):
    """The index of a subset's level that is nearest to u, and the squared distance."""
    N: tl.constexpr = 2 ** (BITS - 1)  # levels of a subset
    thresholds = table + 4 * N + SUBSET * N
    index = u.to(tl.int32, bitcast=True) * 0
    for step in tl.static_range(1, BITS):
        index += tl.where(tl.load(thresholds + (index + ((N >> step) - 1))) < u, N >> step, 0)
    distance = u - tl.load(table + 4 * index + SUBSET)
    return index, distance * distance


@triton.jit
def decode(
    wire, table, rows, features, blocks_per_row, start, low, high,
    BITS: tl.constexpr, GROUP: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """The tile's part of a wire -> fp32 [32, NB], still rotated."""
    n = group_sizes(start, features, blocks_per_row, GROUP, RAGGED, NB)
    codes = load_codes(wire, 0, rows, features, blocks_per_row, start, low, high, BITS, RAGGED, NB)
    i = tl.arange(0, 32).to(tl.uint32)[:, None]
    word = sum_integers((codes & 1) << i, 0)
    before = _of_block_before(word, GROUP, NB)
    last = ((((word << 1) | (before >> 31))[None, :]) >> i) & 1
    last_but_one = ((((word << 2) | (before >> 30))[None, :]) >> i) & 1
    index = 4 * (codes >> 1) + 2 * ((codes & 1) ^ last_but_one) + last
    levels = tl.load(table + tl.reshape(index, (32 * NB,)))
    scale = load_scales(n, wire, rows, features, blocks_per_row, start, low, high, BITS, GROUP, False, RAGGED, NB)
    levels = tl.reshape(levels, (32, NB * 32 // GROUP, GROUP // 32))
    return tl.reshape(levels * scale[None, :, None], (32, NB))


@triton.jit
def _of_block_before(word, GROUP: tl.constexpr, NB: tl.constexpr):
    """Words uint32 [NB] -> the one of the block before in the same group, 0 for the first."""
    L: tl.constexpr = GROUP // 32
    j, k = tl.arange(0, L)[None, :, None], tl.arange(0, L)[None, None, :]
    word = tl.reshape(word, (NB // L, L))[:, :, None]
    return tl.reshape(sum_integers(tl.where(j + 1 == k, word, 0), 1), (NB,))
