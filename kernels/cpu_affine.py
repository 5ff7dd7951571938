"""Group-wise affine integers on CPU (numba): the arithmetic and the wire of `codecs/affine.py`, bit for bit.

Everything happens in blocks of 32 values held in registers (cpu_simd.py). Encoding takes 32 groups at a time: the
extremes of each, then scales and zeros of all 32 at once, one group a lane, then the codes, packed block by block.
Extremes are taken on the ordered integer form of the floats, where NaN and Inf end up at the ends and one comparison
finds them. Reducing keeps a block of sums in registers over all wires, so nothing but the wires is read and nothing but
the result is written. Scratch memory belongs to the caller: numba frees an array of its own after its last mention, and
an address is no mention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from . import cpu_simd as simd
from .cpu_planes import fill_tail, load, load_codes, plane_addresses, readable, store_codes, store_values, written
from .cpu_simd import inline, jit

if TYPE_CHECKING:
    from ..codecs.affine import Affine

_INF = np.int32(0x7F800000)  # ordered() of +Inf
_MINUS_INF = np.int32(-0x7F800001)  # ordered() of -Inf
_NAN = np.int32(0x7FC0)  # bf16
_ONE = np.int32(0x3F800000)  # 1.0
_MAGIC = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, half to even
_MAGIC_BITS = np.int32(0x4B400000)


@inline
def _bf16_value(bits):
    return simd.as_float(bits << np.int32(16))


@inline
def _parameters(lowest, highest, bits, sym):
    """Ordered extremes of 32 groups -> bf16 bits of their scales and zeros, both NaN where a group is not finite."""
    finite = simd.and_(simd.less(highest, _INF), simd.less(simd.splat(_MINUS_INF), lowest))
    lo = simd.fadd(simd.ordered(lowest), np.float32(0))
    hi = simd.fadd(simd.ordered(highest), np.float32(0))
    if sym:
        extreme = simd.choose(simd.fless(simd.fmul(lo, np.float32(-1)), hi), hi, lo)
        scale = simd.round_bf16(simd.fdiv(extreme, -np.float32(1 << (bits - 1))))
        zero = simd.splat(np.int32(0))
    else:  # towards minus infinity: cut, and one step further from 0 where a negative number was cut
        cut = simd.less(simd.splat(np.int32(0)), simd.and_(lo, np.int32(0xFFFF)))
        away = simd.and_(simd.and_(cut, simd.less(lo, np.int32(0))), np.int32(1))
        zero = simd.and_(simd.add(simd.shift_right(lo, np.int32(16)), away), np.int32(0xFFFF))
        span = simd.fsub(hi, simd.shift_left(zero, np.int32(16)))
        finite = simd.and_(finite, simd.less(simd.and_(span, np.int32(0x7FFFFFFF)), _INF))
        scale = simd.round_bf16(simd.fdiv(span, np.float32((1 << bits) - 1)))
    normal = simd.less(simd.splat(np.int32(0x007F)), simd.and_(scale, np.int32(0x7FFF)))
    scale = simd.choose(finite, simd.and_(normal, scale), simd.splat(_NAN))
    return scale, zero if sym else simd.choose(finite, zero, simd.splat(_NAN))


@jit
def _encode(x, bf16, rows, features, planes, scales, zeros, bits, group, sym, scratch):
    itemsize = 2 if bf16 else 4
    top = np.int32((1 << bits) - 1)
    half = np.int32(1 << (bits - 1)) if sym else np.int32(0)
    padded = (features + 7) // 8 * 8
    groups = rows * ((features + group - 1) // group)
    lows, highs = scratch + 128, scratch + 256  # then, of the same 32 groups:
    scale_at, zero_at, inverse_at = scratch + 128, scratch + 256, scratch + 384
    first_row, first_start = 0, 0
    for batch in range(0, groups, 32):
        count = min(32, groups - batch)

        row, start = first_row, first_start
        for k in range(count):  # extremes
            stop = min(start + group, features)
            tail, blocks = (stop - start) % 32, (stop - start) // 32
            source = x + (row * features + start) * itemsize
            if tail:
                fill_tail(source + blocks * 32 * itemsize, tail, itemsize, scratch)
            lowest = simd.ordered(load(scratch if tail else source, bf16))
            highest = lowest
            for block in range(0 if tail else 1, blocks):
                values = simd.ordered(load(source + block * 32 * itemsize, bf16))
                lowest = simd.minimum(lowest, values)
                highest = simd.maximum(highest, values)
            simd.store_word(lows + 4 * k, simd.smallest(lowest))
            simd.store_word(highs + 4 * k, simd.largest(highest))
            start = stop
            if start == features:
                row, start = row + 1, 0

        scale_bits, zero_bits = _parameters(simd.load_fp32(lows), simd.load_fp32(highs), bits, sym)
        inverses = simd.fdiv(simd.splat(_ONE), simd.shift_left(scale_bits, np.int32(16)))
        simd.store_fp32(inverse_at, simd.choose(simd.equal(scale_bits, np.int32(0)), scale_bits, inverses))
        simd.store_fp32(scale_at, scale_bits)
        simd.store_fp32(zero_at, zero_bits)

        row, start = first_row, first_start
        for k in range(count):  # codes
            stop = min(start + group, features)
            tail, blocks = (stop - start) % 32, (stop - start) // 32
            source = x + (row * features + start) * itemsize
            scale, zero = simd.load_word(scale_at + 4 * k), simd.load_word(zero_at + 4 * k)
            inverse, offset = simd.as_float(simd.load_word(inverse_at + 4 * k)), _bf16_value(zero)
            simd.store_half(scales + 2 * (batch + k), scale)
            if not sym:
                simd.store_half(zeros + 2 * (batch + k), zero)
            at = row * padded + start
            for block in range(blocks + (1 if tail else 0)):
                if block == blocks:
                    fill_tail(source + blocks * 32 * itemsize, tail, itemsize, scratch)
                codes = simd.splat(np.int32(0))
                if scale != _NAN:
                    values = load(source + block * 32 * itemsize if block < blocks else scratch, bf16)
                    rounded = simd.fadd(simd.fmul(simd.fsub(values, offset), inverse), _MAGIC)
                    codes = simd.minimum(simd.add(simd.sub(rounded, _MAGIC_BITS), half), top)
                store_codes(codes, 32 if block < blocks else tail, at, planes, bits, scratch)
                at += 32
            start = stop
            if start == features:
                row, start = row + 1, 0
        first_row, first_start = row, start


@jit
def _reduce(wires, stride, planes, scales, zeros, bits, group, sym, out, bf16, rows, features, scratch):
    itemsize = 2 if bf16 else 4
    half = np.int32(1 << (bits - 1)) if sym else np.int32(0)
    groups = (features + group - 1) // group
    padded = (features + 7) // 8 * 8
    for row in range(rows):
        for start in range(0, features, 32):
            n = min(32, features - start)
            parameter = 2 * (row * groups + start // group)
            total = simd.splat(np.int32(0))
            for wire in range(wires):
                skip = wire * stride
                codes = load_codes(n, row * padded + start, planes, wire * stride, bits, scratch)
                scale = _bf16_value(simd.load_half(scales + skip + parameter))
                values = simd.fmul(simd.to_float(simd.sub(codes, half)), scale)
                if not sym:
                    values = simd.fadd(values, _bf16_value(simd.load_half(zeros + skip + parameter)))
                total = values if wire == 0 else simd.fadd(total, values)
            target = out + (row * features + start) * itemsize
            store_values(total, target, n, bf16, scratch)


def _addresses(codec: Affine, wire: torch.Tensor, rows: int, features: int) -> list:
    """Of the planes, the scales and the zeros in one wire; 0 for an absent section."""
    views = codec.split(wire, rows, features)
    return [plane_addresses(views), *(views[name].data_ptr() if name in views else 0 for name in ("scales", "zeros"))]


def encode_rows(codec: Affine, x: torch.Tensor, wire: torch.Tensor) -> None:
    """x [rows, features] contiguous -> wire, as `Codec.encode_rows`."""
    values, scratch = readable(x), torch.zeros(4 * 32, dtype=torch.int32)
    _encode(
        values.data_ptr(),
        values.dtype == torch.bfloat16,
        *x.shape,
        *_addresses(codec, wire, *x.shape),
        codec.bits,
        codec.group,
        codec.sym,
        scratch.data_ptr(),
    )
    codec.clear_gaps(wire, *x.shape)


def reduce_rows(codec: Affine, wires: torch.Tensor, out: torch.Tensor) -> None:
    """Sum of the decoded wires -> out, as `Codec.reduce_rows`."""
    scratch = torch.empty(32, dtype=torch.int32)
    with written(out) as target:
        _reduce(
            wires.shape[0],
            wires.stride(0),
            *_addresses(codec, wires[0], *out.shape),
            codec.bits,
            codec.group,
            codec.sym,
            target.data_ptr(),
            target.dtype == torch.bfloat16,
            *out.shape,
            scratch.data_ptr(),
        )
