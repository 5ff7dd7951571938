"""Gaussian codecs on CPU (numba): the arithmetic and the wire of `codecs/gauss.py`, bit for bit.

One group at a time, in a scratch of 256 values that stays in the first-level cache: load and sign, rotate, normalize,
look up codes, pack. Reducing keeps the sum of a group in the scratch over all wires and rotates it back once.

Scratch, in bytes: 0 a short block, 128 the group (256 words), then its codes and the codes they may move to.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..codecs.lloyd_max import LEVELS
from . import cpu_lanes as across
from . import cpu_simd as simd
from .cpu_planes import load_codes, plane_addresses, readable, store_codes, written
from .cpu_rotation import ABSOLUTE, INF, NAN, SIGN_BITS, load_group, normalize, storable, store_group
from .cpu_simd import inline, jit

if TYPE_CHECKING:
    from ..codecs.gauss import Gauss

_HIDING = 256
_GROUP, _CODES, _MOVED, _SCRATCH = 128, 128 + 4 * 256, 128 + 8 * 256, 128 + 12 * 256


@inline
def _level(levels, k, bits):
    """The positive levels of codebook indices k."""
    low = simd.and_(k, np.int32(15))
    level = across.lookup16(levels, low)
    for segment in range(1, (1 << bits) // 32):
        here = simd.equal(simd.shift_right(k, np.int32(4)), np.int32(segment))
        level = simd.choose(here, across.lookup16(levels + 64 * segment, low), level)
    return level


@inline
def signed_level(levels, signed, bits):
    """Level numbers counted from the lowest positive one, negative below it -> levels."""
    negative = simd.shift_right(signed, np.int32(31))
    k = simd.and_(simd.xor(signed, negative), np.int32((1 << (bits - 1)) - 1))
    return simd.or_(_level(levels, k, bits), simd.shift_left(negative, np.int32(31)))


@inline
def _index(u, thresholds, bits):
    """The number of thresholds below u: of segments of 16 first, then within the segment."""
    k = across.search16(u, thresholds, min(16, 1 << (bits - 1)))
    for segment in range(1, (1 << bits) // 32):
        beyond = simd.fless(simd.as_float(simd.load_word(thresholds + 64 * segment - 4)), u)
        within = simd.add(across.search16(u, thresholds + 64 * segment, 16), np.int32(16 * segment))
        k = simd.choose(beyond, within, k)
    return k


@jit
def _encode(x, bf16, rows, features, planes, scales, bits, group, rotates, signs, levels, thresholds, scratch):
    itemsize = 2 if bf16 else 4
    half = np.int32(1 << (bits - 1))
    padded = (features + 7) // 8 * 8
    z = scratch + _GROUP
    stored = 0
    for row in range(rows):
        for start in range(0, features, group):
            n = min(group, features - start)
            blocks = (n + 31) // 32
            source = x + (row * features + start) * itemsize
            turned = rotates and n >= 32
            load_group(source, n, bf16, turned, signs, z, scratch)
            peak, power, down, rms = normalize(z, n)

            hides = n == _HIDING
            scale = np.int32(0)
            inverse = np.float32(0)
            if hides:
                scale = storable(rms * power) if peak < INF else NAN
                if scale > np.int32(0) and scale != NAN:
                    inverse = np.float32(1) / (simd.as_float(scale << np.int32(16)) * down)
            elif peak < INF and rms > np.float32(0):
                inverse = np.float32(1) / rms
            dot, norm = simd.splat(np.int32(0)), simd.splat(np.int32(0))
            best, best_block = simd.splat(INF), simd.splat(np.int32(0))
            odd = simd.splat(np.int32(0))
            for block in range(blocks):
                j = 4 * 32 * block
                w = simd.load_fp32(z + j)
                magnitude = simd.and_(w, ABSOLUTE)
                u = simd.fmul(magnitude, inverse)
                k = _index(u, thresholds, bits)
                level = _level(levels, k, bits)
                negative = simd.fless(w, np.float32(0))
                code = simd.add(simd.xor(k, negative), half)
                if hides:
                    up = simd.and_(simd.fless(level, u), simd.less(k, half - np.int32(1)))
                    next_ = simd.sub(k, simd.add(simd.add(up, up), np.int32(1)))
                    other_side = simd.less(next_, np.int32(0))
                    neighbour = _level(levels, simd.choose(other_side, simd.splat(np.int32(0)), next_), bits)
                    neighbour = simd.xor(neighbour, simd.shift_left(other_side, np.int32(31)))
                    gap = simd.and_(simd.fsub(neighbour, level), ABSOLUTE)
                    middle = simd.fmul(simd.fadd(neighbour, level), np.float32(0.5))
                    cost = simd.fmul(gap, simd.and_(simd.fsub(u, middle), ABSOLUTE))
                    turn = simd.xor(up, negative)  # -1: the code goes up
                    moved = simd.sub(simd.add(code, np.int32(-1)), simd.add(turn, turn))
                    cheaper = simd.fless(cost, best)
                    best = simd.choose(cheaper, cost, best)
                    best_block = simd.choose(cheaper, simd.splat(np.int32(block)), best_block)
                    odd = simd.xor(odd, code)
                    simd.store_fp32(scratch + _MOVED + j, moved)
                else:
                    a, b = simd.fmul(magnitude, level), simd.fmul(level, level)
                    if n - 32 * block < 32:
                        b = simd.and_(b, simd.less(across.lanes(), np.int32(n - 32 * block)))
                    dot = a if block == 0 else simd.fadd(dot, a)
                    norm = b if block == 0 else simd.fadd(norm, b)
                simd.store_fp32(scratch + _CODES + j, code)

            if hides:
                nothing = scale == np.int32(0) or scale == NAN
                if nothing:
                    best, best_block, odd = simd.splat(np.int32(0)), simd.splat(np.int32(0)), simd.splat(np.int32(0))
                position = simd.add(simd.add(best_block, best_block), simd.shift_right(across.lanes(), np.int32(4)))
                other, other_position = across.swap_halves(best), across.swap_halves(position)
                first = simd.and_(simd.equal(best, other), simd.less(position, other_position))
                wins = simd.or_(simd.fless(best, other), first)
                parity = simd.xor(odd, across.swap_halves(odd))
                wanted = simd.shift_right(simd.splat(scale), simd.and_(across.lanes(), np.int32(15)))
                wrong = simd.sub(simd.splat(np.int32(0)), simd.and_(simd.xor(parity, wanted), np.int32(1)))
                moves = simd.and_(wins, wrong)
                for block in range(blocks):
                    j = 4 * 32 * block
                    code, moved = simd.load_fp32(scratch + _CODES + j), simd.load_fp32(scratch + _MOVED + j)
                    if nothing:
                        code, moved = simd.splat(half), simd.splat(half + np.int32(1))
                    here = simd.and_(moves, simd.equal(best_block, np.int32(block)))
                    simd.store_fp32(scratch + _CODES + j, simd.choose(here, moved, code))
            else:
                scale = NAN
                if peak < INF:
                    scale = storable(across.fold(dot) / across.fold(norm) * power)
                simd.store_half(scales + 2 * stored, scale)
                stored += 1
                if scale == np.int32(0) or scale == NAN:
                    for block in range(blocks):
                        simd.store_fp32(scratch + _CODES + 4 * 32 * block, simd.splat(half))
            for j in range(0, n, 32):
                codes = simd.load_fp32(scratch + _CODES + 4 * j)
                store_codes(codes, min(32, n - j), row * padded + start + j, planes, bits, scratch)


@jit
def _reduce(
    wires,
    stride,
    planes,
    scales,
    per_row,
    bits,
    group,
    rotates,
    signs,
    levels,
    out,
    bf16,
    rows,
    features,
    scratch,
    factors,
):
    itemsize = 2 if bf16 else 4
    half = np.int32(1 << (bits - 1))
    padded = (features + 7) // 8 * 8
    total = scratch + _GROUP
    for row in range(rows):
        for start in range(0, features, group):
            n = min(group, features - start)
            at = row * padded + start
            turned = rotates and n >= 32
            for wire in range(wires):  # scales
                skip = wire * stride
                if n == _HIDING:
                    odd = simd.splat(np.int32(0))
                    for j in range(0, n, 32):
                        odd = simd.xor(odd, load_codes(32, at + j, planes, skip, bits, scratch))
                    parities = across.is_odd(odd)
                    scale = (parities ^ (parities >> np.int32(16))) & np.int32(0xFFFF)
                else:
                    index = per_row - 1 if n < group else start // group
                    scale = simd.load_half(scales + skip + 2 * (row * per_row + index))
                simd.store_word(factors + 4 * wire, scale << np.int32(16))
            for j in range(0, n, 32):
                sum_ = simd.splat(np.int32(0))
                for wire in range(wires):
                    codes = load_codes(min(32, n - j), at + j, planes, wire * stride, bits, scratch)
                    level = signed_level(levels, simd.sub(codes, half), bits)
                    values = simd.fmul(level, simd.as_float(simd.load_word(factors + 4 * wire)))
                    sum_ = values if wire == 0 else simd.fadd(sum_, values)
                simd.store_fp32(total + 4 * j, sum_)
            store_group(total, n, turned, signs, out + (row * features + start) * itemsize, bf16, scratch)


@lru_cache
def _tables(bits: int) -> torch.Tensor:
    """64 levels, then the 64 thresholds, of which the last is none."""
    levels = torch.tensor(LEVELS[bits])
    thresholds, pad = (levels[1:] + levels[:-1]) * 0.5, torch.nn.functional.pad
    return torch.cat([pad(levels, (0, 64 - len(levels))), pad(thresholds, (0, 64 - len(thresholds)))])


def encode_rows(codec: Gauss, x: torch.Tensor, wire: torch.Tensor) -> None:
    """x [rows, features] contiguous -> wire, as `Codec.encode_rows`."""
    values, scratch, tables = readable(x), torch.zeros(_SCRATCH, dtype=torch.uint8), _tables(codec.bits)
    views = codec.split(wire, *x.shape)
    _encode(
        values.data_ptr(),
        values.dtype == torch.bfloat16,
        *x.shape,
        plane_addresses(views),
        views["scales"].data_ptr() if "scales" in views else 0,
        codec.bits,
        codec.group,
        codec.rotates,
        SIGN_BITS.data_ptr(),
        tables.data_ptr(),
        tables[64:].data_ptr(),
        scratch.data_ptr(),
    )
    codec.clear_gaps(wire, *x.shape)


def reduce_rows(codec: Gauss, wires: torch.Tensor, out: torch.Tensor) -> None:
    """Sum of the decoded wires -> out, as `Codec.reduce_rows`."""
    scratch, tables = torch.zeros(_SCRATCH, dtype=torch.uint8), _tables(codec.bits)
    factors = torch.empty(wires.shape[0])
    views = codec.split(wires[0], *out.shape)
    with written(out) as target:
        _reduce(
            wires.shape[0],
            wires.stride(0),
            plane_addresses(views),
            views["scales"].data_ptr() if "scales" in views else 0,
            codec.scales_per_row(out.shape[1]),
            codec.bits,
            codec.group,
            codec.rotates,
            SIGN_BITS.data_ptr(),
            tables.data_ptr(),
            target.data_ptr(),
            target.dtype == torch.bfloat16,
            *out.shape,
            scratch.data_ptr(),
            factors.data_ptr(),
        )
