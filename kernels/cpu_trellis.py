"""Trellis-coded quantization on CPU (numba): the arithmetic and the wire of `codecs/trellis.py`, bit for bit.

A path is sequential, so 32 groups are encoded at once, one a lane: rotated and normalized one after the other, then
searched together, value by value, then packed one after the other. Decoding is parallel within a group.

Scratch, in bytes: 0 a short block; 128 one word per lane and parameter; then the 32 groups, 256 words each; the choices
of every step, a byte per state; the codes four to a word, lane beside lane; and the codes group after group.

Hazard: nothing but the numbers above keeps the kernel within its scratch, and what it does not need there is stale.
Lanes beyond a batch's last group are searched all the same, over an earlier batch's values or NaNs: lanes do not mix,
indices come from comparisons and stay below 16, and what such lanes write is not read. A group's last word of codes is
filled up with zeros; behind it, up to a whole block of 32, lie older codes, which `inside` keeps out of the sums and
`store_codes` out of the wire.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..codecs.lloyd_max import TRELLIS
from . import cpu_lanes as across
from . import cpu_simd as simd
from .cpu_gauss import signed_level
from .cpu_planes import load_codes, plane_addresses, readable, store_codes, written
from .cpu_rotation import INF, NAN, SIGN_BITS, load_group, normalize, storable, store_group
from .cpu_simd import inline, jit

if TYPE_CHECKING:
    from ..codecs.trellis import Trellis

_INVERSES, _POWERS, _PEAKS, _GROUPS = 128, 256, 384, 512
_CHOICES = _GROUPS + 32 * 1024
_WORDS = _CHOICES + 256 * 128
_CODES = _WORDS + 64 * 128
_SCRATCH = _CODES + 32 * 256


@inline
def _nearest(u, table, count):
    """The nearest of a subset's levels: its index and squared distance. table: 16 levels, then 16 thresholds."""
    index = across.search16(u, table + 64, count)
    level = across.lookup16(table, index)
    distance = simd.fsub(u, level)
    return index, simd.fmul(distance, distance)


@inline
def _step(first, second, first_index, second_index):
    """One new state: its cost, and a byte that holds the chosen index, with the top bit set for the second way."""
    better = simd.fless(second, first)
    choice = simd.or_(simd.choose(better, second_index, first_index), simd.and_(better, np.int32(0x80)))
    return simd.choose(better, second, first), choice


@inline
def _search(n, bits, subsets, unreachable, scratch):
    """The best paths of 32 groups -> their codes in memory, group after group."""
    count = 1 << (bits - 1)
    inverses = simd.load_fp32(scratch + _INVERSES)
    strides = simd.shift_left(across.lanes(), np.int32(8))
    c0 = simd.splat(np.int32(0))
    c1 = simd.splat(simd.as_int(unreachable))
    c2, c3 = c1, c1
    for t in range(n):
        u = simd.fmul(across.lookup(scratch + _GROUPS + 4 * t, strides), inverses)
        i0, d0 = _nearest(u, subsets, count)
        i1, d1 = _nearest(u, subsets + 128, count)
        i2, d2 = _nearest(u, subsets + 256, count)
        i3, d3 = _nearest(u, subsets + 384, count)
        n0, b0 = _step(simd.fadd(c0, d0), simd.fadd(c2, d2), i0, i2)
        n1, b1 = _step(simd.fadd(c0, d2), simd.fadd(c2, d0), i2, i0)
        n2, b2 = _step(simd.fadd(c1, d1), simd.fadd(c3, d3), i1, i3)
        n3, b3 = _step(simd.fadd(c1, d3), simd.fadd(c3, d1), i3, i1)
        c0, c1, c2, c3 = n0, n1, n2, n3
        low = simd.or_(b0, simd.shift_left(b1, np.int32(8)))
        high = simd.or_(simd.shift_left(b2, np.int32(16)), simd.shift_left(b3, np.int32(24)))
        simd.store_fp32(scratch + _CHOICES + 128 * t, simd.or_(low, high))
    state, best = simd.splat(np.int32(0)), c0
    better = simd.fless(c1, best)
    state, best = simd.choose(better, simd.splat(np.int32(1)), state), simd.choose(better, c1, best)
    better = simd.fless(c2, best)
    state, best = simd.choose(better, simd.splat(np.int32(2)), state), simd.choose(better, c2, best)
    better = simd.fless(c3, best)
    state = simd.choose(better, simd.splat(np.int32(3)), state)
    word = simd.splat(np.int32(0))
    for back in range(n):
        t = n - 1 - back
        choices = simd.load_fp32(scratch + _CHOICES + 128 * t)
        choice = simd.shift_right(choices, simd.shift_left(state, np.int32(3)))
        code = simd.shift_left(simd.and_(choice, np.int32(0x0F)), np.int32(1))
        code = simd.or_(code, simd.and_(state, np.int32(1)))
        word = simd.or_(word, simd.shift_left(code, np.int32(8 * (t % 4))))
        if t % 4 == 0:
            simd.store_fp32(scratch + _WORDS + 32 * t, word)
            word = simd.splat(np.int32(0))
        second = simd.and_(simd.shift_right(choice, np.int32(6)), np.int32(2))
        state = simd.add(simd.shift_right(state, np.int32(1)), second)
    for t in range(0, n, 4):
        for lane in range(32):
            simd.store_word(scratch + _CODES + 256 * lane + t, simd.load_word(scratch + _WORDS + 32 * t + 4 * lane))


@inline
def _levels(codes, before, levels, bits):
    """Codes, after those of the block before -> levels."""
    twice = simd.xor(codes, across.shifted2(before, codes))
    number = simd.add(
        simd.shift_left(simd.shift_right(codes, np.int32(1)), np.int32(2)),
        simd.add(
            simd.shift_left(simd.and_(twice, np.int32(1)), np.int32(1)),
            simd.and_(across.shifted1(before, codes), np.int32(1)),
        ),
    )
    return signed_level(levels, simd.sub(number, np.int32(1 << bits)), bits + 1)


@jit
def _encode(
    x, bf16, rows, features, planes, scales, bits, group, rotates, signs, levels, subsets, unreachable, scratch
):
    itemsize = 2 if bf16 else 4
    padded = (features + 7) // 8 * 8
    full, rest = features // group, features % group
    for part in range(2):  # the full groups of all rows, then the shorter last ones
        n = group if part == 0 else rest
        per_row = full if part == 0 else (1 if rest else 0)
        turned = rotates and n >= 32
        for batch in range(0, rows * per_row, 32):
            count = min(32, rows * per_row - batch)
            for lane in range(count):
                row = (batch + lane) // per_row
                start = ((batch + lane) % per_row + (full if part else 0)) * group
                z = scratch + _GROUPS + 1024 * lane
                load_group(x + (row * features + start) * itemsize, n, bf16, turned, signs, z, scratch)
                peak, power, _, rms = normalize(z, n)
                inverse = np.float32(1) / rms if peak < INF and rms > np.float32(0) else np.float32(0)
                simd.store_word(scratch + _INVERSES + 4 * lane, simd.as_int(inverse))
                simd.store_word(scratch + _POWERS + 4 * lane, simd.as_int(power))
                simd.store_word(scratch + _PEAKS + 4 * lane, peak)
            _search(n, bits, subsets, unreachable, scratch)
            for lane in range(count):
                row = (batch + lane) // per_row
                index = (batch + lane) % per_row + (full if part else 0)
                z, memory = scratch + _GROUPS + 1024 * lane, scratch + _CODES + 256 * lane
                dot, norm, before = simd.splat(np.int32(0)), simd.splat(np.int32(0)), simd.splat(np.int32(0))
                for j in range(0, n, 32):
                    codes = simd.load_bytes(memory + j)
                    level = _levels(codes, before, levels, bits)
                    before = codes
                    a, b = simd.fmul(simd.load_fp32(z + 4 * j), level), simd.fmul(level, level)
                    if n - j < 32:
                        inside = simd.less(across.lanes(), np.int32(n - j))
                        a, b = simd.and_(a, inside), simd.and_(b, inside)
                    dot = a if j == 0 else simd.fadd(dot, a)
                    norm = b if j == 0 else simd.fadd(norm, b)
                scale = NAN
                if simd.load_word(scratch + _PEAKS + 4 * lane) < INF:
                    power = simd.as_float(simd.load_word(scratch + _POWERS + 4 * lane))
                    scale = storable(across.fold(dot) / across.fold(norm) * power)
                simd.store_half(scales + 2 * (row * (full + (1 if rest else 0)) + index), scale)
                nothing = scale == np.int32(0) or scale == NAN
                for j in range(0, n, 32):
                    codes = simd.splat(np.int32(0)) if nothing else simd.load_bytes(memory + j)
                    store_codes(codes, min(32, n - j), row * padded + index * group + j, planes, bits, scratch)


@jit
def _reduce(wires, stride, planes, scales, bits, group, rotates, signs, levels, out, bf16, rows, features, scratch):
    itemsize = 2 if bf16 else 4
    padded, groups = (features + 7) // 8 * 8, (features + group - 1) // group
    total = scratch + _GROUPS
    for row in range(rows):
        for start in range(0, features, group):
            n = min(group, features - start)
            turned = rotates and n >= 32
            for wire in range(wires):
                skip = wire * stride
                scale = simd.load_half(scales + skip + 2 * (row * groups + start // group))
                factor = simd.as_float(scale << np.int32(16))
                before = simd.splat(np.int32(0))
                for j in range(0, n, 32):
                    codes = load_codes(min(32, n - j), row * padded + start + j, planes, skip, bits, scratch)
                    values = simd.fmul(_levels(codes, before, levels, bits), factor)
                    before = codes
                    if wire:
                        values = simd.fadd(simd.load_fp32(total + 4 * j), values)
                    simd.store_fp32(total + 4 * j, values)
            store_group(total, n, turned, signs, out + (row * features + start) * itemsize, bf16, scratch)


@lru_cache
def _tables(bits: int) -> torch.Tensor:
    """64 positive levels; then of each subset 16 levels and the 16 thresholds between them."""
    positive = torch.tensor(TRELLIS[bits])
    levels, pad = torch.cat([-positive.flip(0), positive]), torch.nn.functional.pad
    tables = [pad(positive, (0, 64 - len(positive)))]
    for subset in range(4):
        own = levels[subset::4]
        tables += [pad(own, (0, 16 - len(own))), pad((own[1:] + own[:-1]) * 0.5, (0, 17 - len(own)))]
    return torch.cat(tables)


def encode_rows(codec: Trellis, x: torch.Tensor, wire: torch.Tensor) -> None:
    """x [rows, features] contiguous -> wire, as `Codec.encode_rows`."""
    values, scratch, tables = readable(x), torch.zeros(_SCRATCH, dtype=torch.uint8), _tables(codec.bits)
    views = codec.split(wire, *x.shape)
    _encode(
        values.data_ptr(),
        values.dtype == torch.bfloat16,
        *x.shape,
        plane_addresses(views),
        views["scales"].data_ptr(),
        codec.bits,
        codec.group,
        codec.rotates,
        SIGN_BITS.data_ptr(),
        tables.data_ptr(),
        tables[64:].data_ptr(),
        np.float32(codec.unreachable),
        scratch.data_ptr(),
    )
    codec.clear_gaps(wire, *x.shape)


def reduce_rows(codec: Trellis, wires: torch.Tensor, out: torch.Tensor) -> None:
    """Sum of the decoded wires -> out, as `Codec.reduce_rows`."""
    scratch, tables = torch.zeros(_GROUPS + 1024, dtype=torch.uint8), _tables(codec.bits)
    views = codec.split(wires[0], *out.shape)
    with written(out) as target:
        _reduce(
            wires.shape[0],
            wires.stride(0),
            plane_addresses(views),
            views["scales"].data_ptr(),
            codec.bits,
            codec.group,
            codec.rotates,
            SIGN_BITS.data_ptr(),
            tables.data_ptr(),
            target.data_ptr(),
            target.dtype == torch.bfloat16,
            *out.shape,
            scratch.data_ptr(),
        )
