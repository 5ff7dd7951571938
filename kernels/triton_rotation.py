"""The rotation of codecs/hadamard.py on tiles: signs and Hadamard butterflies of each group, and the way back.

A tile comes as [32, NB], a block to a thread. A stage of the butterfly splits the tile in two along the axis of its
pairs, for which Triton wants the two in one thread. Stages between neighbouring values are so as they are; for the
others the tile is turned into *runs*, [32, NG, L]: the group's values in 32 runs of L = GROUP / 32, a run to L threads.
That takes one trip through shared memory, there and back, instead of a shuffle for each stage.

A row's last group may be short, of n values, and then has one butterfly of p = n or two overlapping ones of p < n, or
none. In a tile with such a group every group goes that way: a stage stops at p, and the last p values are moved to the
group's start and back by a cyclic shift, in stages like those of the butterfly. That takes four times as long.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_runs(x, GROUP: tl.constexpr, NB: tl.constexpr):
    """[32, NB] -> [32, NG, L]: value q * L + l of group g at [q, g, l]."""
    L: tl.constexpr = GROUP // 32
    x = tl.permute(tl.reshape(x, (32 // L, L, NB // L, L)), (3, 0, 2, 1))
    return tl.reshape(x, (32, NB // L, L))


@triton.jit
def from_runs(x, GROUP: tl.constexpr, NB: tl.constexpr):
    """The inverse of `to_runs`."""
    L: tl.constexpr = GROUP // 32
    x = tl.permute(tl.reshape(x, (L, 32 // L, NB // L, L)), (1, 3, 2, 0))
    return tl.reshape(x, (32, NB))


@triton.jit
def halves(x, N: tl.constexpr, H: tl.constexpr, M: tl.constexpr):
    """x [N, M] -> those of its rows without and those with the bit H of the row's number, [N / 2H, H, M]."""
    return tl.split(tl.permute(tl.reshape(x, (N // (2 * H), 2, H, M)), (0, 2, 3, 1)))


@triton.jit
def whole(a, b, N: tl.constexpr, M: tl.constexpr):
    """The inverse of `halves`."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 3, 1, 2)), (N, M))


@triton.jit
def group_sizes(start, features, blocks_per_row, GROUP: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr):
    """How many values each group has: int32 [NG]."""
    here = tl.arange(0, NB * 32 // GROUP)
    if RAGGED:
        column = (start + here * (GROUP // 32)) % blocks_per_row * 32
        return tl.minimum(tl.maximum(features - column, 0), GROUP).to(tl.int32)
    else:
        return here * 0 + GROUP


@triton.jit
def any_short(n, GROUP: tl.constexpr):
    """Whether any of these groups is shorter than the others."""
    return tl.max(((n > 0) & (n < GROUP)).to(tl.int32), axis=0) > 0


@triton.jit
def rotate(x, n, GROUP: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr):
    """x fp32 [32, NB], n: the groups' sizes -> alike, each group rotated; beyond a group's end, anything."""
    if RAGGED:
        if any_short(n, GROUP):
            z = _rotate_short(x, _of_blocks(n, GROUP, NB), GROUP, NB)
        else:
            z = _butterfly(_signed(x, GROUP, NB), GROUP, NB)
    else:
        z = _butterfly(_signed(x, GROUP, NB), GROUP, NB)
    return z


@triton.jit
def unrotate(z, n, GROUP: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr):
    """The inverse of `rotate`."""
    if RAGGED:
        if any_short(n, GROUP):
            x = _unrotate_short(z, _of_blocks(n, GROUP, NB), GROUP, NB)
        else:
            x = _signed(_butterfly(z, GROUP, NB) * (1.0 / GROUP), GROUP, NB)
    else:
        x = _signed(_butterfly(z, GROUP, NB) * (1.0 / GROUP), GROUP, NB)
    return x


@triton.jit
def _of_blocks(n, GROUP: tl.constexpr, NB: tl.constexpr):
    """[NG] -> [NB], the same for all blocks of a group."""
    return tl.reshape(tl.broadcast_to(n[:, None], (NB * 32 // GROUP, GROUP // 32)), (NB,))


@triton.jit
def _signed(x, GROUP: tl.constexpr, NB: tl.constexpr):
    """The fixed signs: bit i of word k is that of value 32k + i."""
    k = tl.arange(0, NB) % (GROUP // 32)
    word = tl.where(k == 0, 0xF7BDEAB3, tl.zeros([NB], tl.uint32))
    if GROUP > 32:
        word = tl.where(k == 1, 0x75890938, word)
    if GROUP > 64:
        word = tl.where(k == 2, 0x52F1B408, tl.where(k == 3, 0xA8AE2AC1, word))
    if GROUP > 128:
        word = tl.where(k == 4, 0xE5808779, tl.where(k == 5, 0xF9D1F463, word))
        word = tl.where(k == 6, 0x1E6B87CB, tl.where(k == 7, 0xCDC7764B, word))
    sign = (word[None, :] << (31 - tl.arange(0, 32)).to(tl.uint32)[:, None]) & 0x80000000
    return (x.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def _butterfly(x, GROUP: tl.constexpr, NB: tl.constexpr):
    """Of all values of each group."""
    L: tl.constexpr = GROUP // 32
    for bit in tl.static_range(3):
        if 1 << bit < L:
            a, b = halves(x, 32, 1 << bit, NB)
            x = whole(a + b, a - b, 32, NB)
    x = tl.reshape(to_runs(x, GROUP, NB), (32, NB))
    for bit in tl.static_range(5):
        a, b = halves(x, 32, 1 << bit, NB)
        x = whole(a + b, a - b, 32, NB)
    return from_runs(tl.reshape(x, (32, NB // L, L)), GROUP, NB)


@triton.jit
def _stages(x, p, by, GROUP: tl.constexpr, SHIFTS: tl.constexpr, NB: tl.constexpr):
    """Through the stages of a butterfly: that of the first p values; or, if SHIFTS, value i goes to place i - by.

    p, by: [NB]. Both happen in all runs of a power of two, around the end of a run in a shift.
    """
    L: tl.constexpr = GROUP // 32
    for bit in tl.static_range(3):
        if 1 << bit < L:
            x = _stage(x, p, by, 1 << bit, 1, SHIFTS, NB)
    x = tl.reshape(to_runs(x, GROUP, NB), (32, NB))
    for bit in tl.static_range(5):
        x = _stage(x, p, by, 1 << bit, L, SHIFTS, NB)
    return from_runs(tl.reshape(x, (32, NB // L, L)), GROUP, NB)


@triton.jit
def _stage(x, p, by, H: tl.constexpr, STEP: tl.constexpr, SHIFTS: tl.constexpr, NB: tl.constexpr):
    """Distance H of [32, NB], whose rows are STEP values of a group apart."""
    SIZE: tl.constexpr = H * STEP
    a, b = halves(x, 32, H, NB)
    if SHIFTS:  # what went around in a run of SIZE changes sides, and so does everything if `by` has the bit SIZE
        place = tl.arange(0, H)[:, None] * STEP + tl.arange(0, NB)[None, :] % STEP
        changes = (place + (by % SIZE)[None, :] >= SIZE) ^ ((by // SIZE) % 2 == 1)[None, :]
        return whole(tl.where(changes[None, :, :], b, a), tl.where(changes[None, :, :], a, b), 32, NB)
    else:
        goes_on = (SIZE < p)[None, None, :]
        return whole(tl.where(goes_on, a + b, a), tl.where(goes_on, a - b, b), 32, NB)


@triton.jit
def _part(n):
    """Of group sizes: p, the largest power of two up to n, but 0 if n < 32; where the last p values begin; what the
    butterfly is multiplied with, 1 / sqrt(p) or, if n is p, 1; and 1 / p."""
    p = tl.where(n >= 256, 256, tl.where(n >= 128, 128, tl.where(n >= 64, 64, tl.where(n >= 32, 32, 0))))
    factor = tl.where(n > 128, 0.0883883461356163, tl.where(n > 64, 0.125, 0.1767766922712326))
    inverse = tl.where(n >= 256, 2.0**-8, tl.where(n >= 128, 2.0**-7, tl.where(n >= 64, 2.0**-6, 2.0**-5)))
    return p, tl.where(n < 32, 0, n - p), tl.where((n == p) | (n < 32), 1.0, factor), inverse


@triton.jit
def _is_first(p, GROUP: tl.constexpr, NB: tl.constexpr):
    """p: [NB] -> whether each value is one of the first p of its group: bool [32, NB]."""
    return tl.arange(0, NB)[None, :] % (GROUP // 32) * 32 + tl.arange(0, 32)[:, None] < p[None, :]


@triton.jit
def _rotate_short(x, n, GROUP: tl.constexpr, NB: tl.constexpr):
    """n: [NB]. Groups of less than 32 values only have their signs changed, twice."""
    p, rest, factor, _ = _part(n)
    x = _signed(x, GROUP, NB)
    y = _stages(x, p, rest, GROUP, False, NB) * factor[None, :]
    x = tl.where(_is_first(p, GROUP, NB), y, x)
    y = _signed(_stages(x, p, rest, GROUP, True, NB), GROUP, NB)
    y = _stages(y, p, rest, GROUP, False, NB) * factor[None, :]
    y = _stages(y, p, GROUP - rest, GROUP, True, NB)
    return tl.where((n == p)[None, :] | _is_first(rest, GROUP, NB), x, y)


@triton.jit
def _unrotate_short(z, n, GROUP: tl.constexpr, NB: tl.constexpr):
    """The inverse of `_rotate_short`."""
    p, rest, factor, inverse = _part(n)
    y = _stages(_stages(z, p, rest, GROUP, True, NB), p, rest, GROUP, False, NB) * factor[None, :]
    y = _stages(_signed(y, GROUP, NB), p, GROUP - rest, GROUP, True, NB)
    z = tl.where((n == p)[None, :] | _is_first(rest, GROUP, NB), z, y)
    y = _stages(z, p, rest, GROUP, False, NB) * tl.where(n == p, inverse, factor)[None, :]
    return _signed(tl.where(_is_first(p, GROUP, NB), y, z), GROUP, NB)
