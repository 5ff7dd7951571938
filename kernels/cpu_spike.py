"""Integers with spikes on CPU (numba): the arithmetic and the wire of `codecs/spike.py`, bit for bit.

Everything happens in blocks of 32 values held in registers (cpu_simd.py), and what belongs to groups happens for 32
groups at a time, one group a lane. A value and its place are one integer, the key: the ordered form of the bf16 in the
upper half, the place in the lower. So the smallest key is the minimum and its first position, the second smallest the
low end of the rest, and with the upper half inverted the same two operations find the maximum and the high end.
Scratch memory belongs to the caller: numba frees an array of its own after its last mention, and an address is no
mention.

Hazard: foreign bytes may hold any position. Spikes are placed by comparing lanes, so one outside of its group is lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from . import cpu_lanes as across
from . import cpu_simd as simd
from .cpu_planes import fill_tail, load, load_codes, plane_addresses, readable, store_codes, store_values, written
from .cpu_simd import inline, jit
from .cpu_spike_groups import NAN, SLOT, UPPER, choose_parameters, read_parameters

if TYPE_CHECKING:
    from ..codecs.spike import Spike

_LAST = np.int32(0x7FFFFFFF)  # behind every key
_MAGIC = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, half to even
_MAGIC_BITS = np.int32(0x4B400000)


@inline
def _two_smallest(first, second, slots):
    """Smallest and second smallest keys of each lane -> those of all lanes."""
    smallest = simd.smallest(first)
    simd.store_word(slots, smallest)
    simd.store_word(slots + SLOT, simd.smallest(simd.choose(simd.equal(first, smallest), second, first)))


@jit
def _encode(x, bf16, rows, features, sections, codec, scratch):
    planes, scales, zeros, spikes, positions = sections
    bits, group, places, sym = codec
    itemsize = 2 if bf16 else 4
    half = np.int32(1 << (bits - 1)) if sym else np.int32(0)
    top = np.int32((1 << bits) - 1)
    padded = (features + 7) // 8 * 8
    groups = rows * ((features + group - 1) // group)
    padded_groups = (groups + 7) // 8 * 8
    slots = scratch + SLOT
    first_row, first_start = 0, 0
    for batch in range(0, groups, 32):
        count = min(32, groups - batch)

        row, start = first_row, first_start
        for k in range(count):  # spikes, and the ends of the rest
            stop = min(start + group, features)
            source = x + (row * features + start) * itemsize
            low1 = simd.splat(_LAST)
            low2, high1, high2 = low1, low1, low1
            for at in range(0, stop - start, 32):
                n = min(32, stop - start - at)
                if n < 32:
                    fill_tail(source + at * itemsize, n, itemsize, scratch)
                values = load(source + at * itemsize if n == 32 else scratch, bf16)
                if not bf16:
                    values = simd.shift_left(simd.round_bf16(values), np.int32(16))
                order, place = simd.and_(simd.ordered(values), UPPER), simd.add(across.lanes(), np.int32(at))
                up, down = simd.or_(order, place), simd.or_(simd.sub(simd.splat(UPPER), order), place)
                if n < 32:
                    there = simd.less(across.lanes(), np.int32(n))
                    up, down = simd.choose(there, up, simd.splat(_LAST)), simd.choose(there, down, simd.splat(_LAST))
                low2, low1 = simd.minimum(low2, simd.maximum(low1, up)), simd.minimum(low1, up)
                high2, high1 = simd.minimum(high2, simd.maximum(high1, down)), simd.minimum(high1, down)
            _two_smallest(low1, low2, slots + 4 * k)
            _two_smallest(high1, high2, slots + 2 * SLOT + 4 * k)
            start = stop
            if start == features:
                row, start = row + 1, 0

        choose_parameters(slots, bits, sym)
        for k in range(2):
            place = simd.load_fp32(slots + (4 + k) * SLOT)
            store_codes(place, count, k * padded_groups + batch, positions, places, scratch)

        row, start = first_row, first_start
        for k in range(count):  # codes
            stop = min(start + group, features)
            source, slot = x + (row * features + start) * itemsize, slots + 4 * k
            simd.store_byte(scales + batch + k, simd.load_word(slot))
            if not sym:
                simd.store_byte(zeros + batch + k, simd.load_word(slot + SLOT))
            low, high = simd.load_word(slot + 2 * SLOT), simd.load_word(slot + 3 * SLOT)
            simd.store_half(spikes + 2 * (batch + k), low >> 16)
            simd.store_half(spikes + 2 * (groups + batch + k), high >> 16)
            low_at, high_at = simd.load_word(slot + 4 * SLOT), simd.load_word(slot + 5 * SLOT)
            zero = simd.as_float(simd.load_word(slot + 6 * SLOT))
            inverse = simd.as_float(simd.load_word(slot + 7 * SLOT))
            for at in range(0, stop - start, 32):
                n = min(32, stop - start - at)
                if n < 32:
                    fill_tail(source + at * itemsize, n, itemsize, scratch)
                codes = simd.splat(np.int32(0))
                if low != NAN:
                    values = load(source + at * itemsize if n == 32 else scratch, bf16)
                    rounded = simd.fadd(simd.fmul(simd.fsub(values, zero), inverse), _MAGIC)
                    codes = simd.add(simd.sub(rounded, _MAGIC_BITS), half)
                    codes = simd.minimum(simd.maximum(codes, np.int32(0)), top)
                    place = simd.add(across.lanes(), np.int32(at))
                    spike = simd.or_(simd.equal(place, low_at), simd.equal(place, high_at))
                    codes = simd.choose(spike, simd.splat(np.int32(0)), codes)
                store_codes(codes, n, row * padded + start + at, planes, bits, scratch)
            start = stop
            if start == features:
                row, start = row + 1, 0
        first_row, first_start = row, start


@jit
def _reduce(wires, stride, sections, codec, out, bf16, rows, features, scratch):
    planes, (bits, group, _, sym) = sections[0], codec
    itemsize = 2 if bf16 else 4
    half = np.int32(1 << (bits - 1)) if sym else np.int32(0)
    padded = (features + 7) // 8 * 8
    groups = rows * ((features + group - 1) // group)
    slots, size = scratch + SLOT, 6 * SLOT
    row, start = 0, 0
    for batch in range(0, groups, 32):
        count = min(32, groups - batch)
        for wire in range(wires):
            read_parameters(batch, count, groups, sections, wire * stride, codec, scratch, slots + wire * size)
        for k in range(count):
            stop = min(start + group, features)
            for at in range(0, stop - start, 32):
                n = min(32, stop - start - at)
                place = simd.add(across.lanes(), np.int32(at))
                total = simd.splat(np.int32(0))
                for wire in range(wires):
                    slot = slots + wire * size + 4 * k
                    codes = load_codes(n, row * padded + start + at, planes, wire * stride, bits, scratch)
                    scale = simd.as_float(simd.load_word(slot))
                    values = simd.fmul(simd.to_float(simd.sub(codes, half)), scale)
                    if not sym:
                        values = simd.fadd(values, simd.as_float(simd.load_word(slot + SLOT)))
                    low = simd.splat(simd.load_word(slot + 2 * SLOT))
                    high = simd.splat(simd.load_word(slot + 3 * SLOT))
                    values = simd.at_most(simd.at_least(values, low), high)
                    values = simd.choose(simd.equal(place, simd.load_word(slot + 4 * SLOT)), low, values)
                    values = simd.choose(simd.equal(place, simd.load_word(slot + 5 * SLOT)), high, values)
                    total = values if wire == 0 else simd.fadd(total, values)
                store_values(total, out + (row * features + start + at) * itemsize, n, bf16, scratch)
            start = stop
            if start == features:
                row, start = row + 1, 0


def _sections(codec: Spike, wire: torch.Tensor, rows: int, features: int) -> tuple:
    """Addresses in one wire: planes, scales, zeros (0 if symmetric), spikes, planes of positions."""
    views = codec.split(wire, rows, features)
    single = [views[name].data_ptr() if name in views else 0 for name in ("scales", "zeros", "spikes")]
    return plane_addresses(views), *single, plane_addresses(views, "position")


def encode_rows(codec: Spike, x: torch.Tensor, wire: torch.Tensor) -> None:
    """x [rows, features] contiguous -> wire, as `Codec.encode_rows`."""
    values, scratch = readable(x), torch.zeros(9 * 32, dtype=torch.int32)
    _encode(
        values.data_ptr(),
        values.dtype == torch.bfloat16,
        *x.shape,
        _sections(codec, wire, *x.shape),
        (codec.bits, codec.group, codec.places, codec.sym),
        scratch.data_ptr(),
    )
    codec.clear_gaps(wire, *x.shape)


def reduce_rows(codec: Spike, wires: torch.Tensor, out: torch.Tensor) -> None:
    """Sum of the decoded wires -> out, as `Codec.reduce_rows`."""
    scratch = torch.zeros((1 + 6 * wires.shape[0]) * 32, dtype=torch.int32)
    with written(out) as target:
        _reduce(
            wires.shape[0],
            wires.stride(0),
            _sections(codec, wires[0], *out.shape),
            (codec.bits, codec.group, codec.places, codec.sym),
            target.data_ptr(),
            target.dtype == torch.bfloat16,
            *out.shape,
            scratch.data_ptr(),
        )
