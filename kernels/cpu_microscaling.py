"""Small floats with block scales on CPU (numba): arithmetic and wire of `codecs/microscaling.py`, bit for bit.

One kernel encodes and one decodes all the formats; what tells them apart is a `_Numbers`. As in cpu_affine.py, encoding
takes 32 units at a time: largest magnitudes, then all their scales at once, one a lane, then the codes. A unit is a
block; of blocks of 16 it is two, one in each half of a vector. A row scale is found when its row begins.

Scratch, in bytes: 0 a short block, then vectors of one word per unit: largest magnitudes, scales and inverses of first
and second blocks, row scales.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..codecs.minifloat import E4M3
from . import cpu_lanes as across
from . import cpu_minifloat as minifloat
from . import cpu_simd as simd
from .cpu_planes import fill_tail, load, load_codes, plane_addresses, readable, store_codes, store_values, written
from .cpu_simd import inline, jit

if TYPE_CHECKING:
    from ..codecs.microscaling import Microscaling

_BF16, _E8M0, _E4M3 = 0, 1, 2  # kinds of scales
_AMAX, _SCALE, _INVERSE, _ROW, _SCRATCH = 128, 384, 640, 896, 1024
_SECOND = 128  # from the first blocks' vector to that of the second ones
_ABSOLUTE = np.int32(0x7FFFFFFF)
_INF = np.int32(0x7F800000)
_NAN = np.int32(0x7FC00000)
_ONE = np.int32(0x3F800000)
_SMALLEST_ROW_SCALE = np.int32((127 - 117) << 23)
_SCALE_MANTISSA, _SCALE_LOWEST, _SCALE_TOP = E4M3.mantissa, E4M3.lowest, E4M3.top
_SCALE_LARGEST = np.float32(E4M3.largest)
_scale_values = E4M3.decode(torch.arange(256, dtype=torch.uint8))


class _Numbers(NamedTuple):
    """A format as kernels take it, so that all of them share one compiled kernel."""

    bits: int
    mantissa: int
    lowest: int  # exponent of the smallest normal number
    highest: int  # exponent of the largest number
    top: int
    nan: int  # -1: none
    largest: float
    kind: int
    group: int


@inline
def _e4m3(amax, row, largest):
    """Block scales -> codes, and what elements are encoded with; `row`: the row scale of each."""
    ratio = simd.fdiv(amax, simd.fmul(row, largest))
    ratio = simd.and_(simd.less(simd.splat(np.int32(0)), row), ratio)
    code = minifloat.encode(ratio, _SCALE_MANTISSA, _SCALE_LOWEST, _SCALE_TOP)
    scale = simd.fmul(minifloat.decode(code, 8, _SCALE_MANTISSA, _SCALE_LOWEST, -1), row)
    return code, simd.and_(simd.less(simd.splat(np.int32(0)), code), simd.fdiv(simd.splat(_ONE), scale))


@inline
def _scales(amax, row, kind, highest, largest):
    """Largest magnitudes of 32 blocks, as fp32 bits -> bits of their scales, and what elements are encoded with."""
    finite = simd.less(amax, _INF)
    amax = simd.and_(finite, amax)
    if kind == _BF16:
        scale = simd.fdiv(amax, largest)
        normal = simd.less(simd.splat(np.int32(0x007FFFFF)), scale)
        scale = simd.round_bf16(simd.and_(normal, scale))
        inverse = simd.fdiv(simd.splat(_ONE), simd.shift_left(scale, np.int32(16)))
        inverse = simd.and_(simd.less(simd.splat(np.int32(0)), scale), inverse)
        nan = np.int32(0x7FC0)
    elif kind == _E8M0:
        exponent = simd.shift_right(amax, np.int32(23))
        scale = simd.maximum(simd.sub(exponent, np.int32(highest)), np.int32(0))
        inverse = simd.shift_left(simd.sub(simd.splat(np.int32(254)), scale), np.int32(23))
        nan = np.int32(0xFF)
    else:
        scale, inverse = _e4m3(amax, row, largest)
        nan = np.int32(0x7F)
    return simd.choose(finite, scale, simd.splat(nan)), inverse


@inline
def _magnitudes(address, bf16):
    return simd.and_(load(address, bf16), _ABSOLUTE)


@inline
def _row_amax(source, features, bf16, itemsize, scratch):
    """Largest magnitude in a row's finite blocks of 16, as fp32 bits."""
    tail, blocks = features % 32, features // 32
    if tail:
        fill_tail(source + blocks * 32 * itemsize, tail, itemsize, scratch)
    most = simd.splat(np.int32(0))
    for block in range(blocks + (1 if tail else 0)):
        at = source + block * 32 * itemsize if block < blocks else scratch
        most = simd.maximum(most, _magnitudes(at, bf16))
    amax = simd.largest(most)
    if amax >= _INF:
        amax = np.int32(0)
        for block in range(blocks + (1 if tail else 0)):
            at = source + block * 32 * itemsize if block < blocks else scratch
            most = _magnitudes(at, bf16)
            for low in (np.int32(-1), np.int32(0)):
                part = simd.largest(simd.and_(most, across.halves(low, ~low)))
                amax = part if amax < part < _INF else amax
    return amax


@jit
def _encode(x, bf16, rows, features, planes, scales, row_scales, numbers, scratch):
    bits, mantissa, lowest, highest, top, _, largest, kind, group = numbers
    itemsize = 2 if bf16 else 4
    padded = (features + 7) // 8 * 8
    pairs = group < 32
    unit = 32 if pairs else group
    second = _SECOND if pairs else 0  # without second blocks, the first ones stand for them
    units = rows * ((features + unit - 1) // unit)
    row_scale = np.int32(0)
    first_row, first_start = 0, 0
    for batch in range(0, units, 32):
        count = min(32, units - batch)

        row, start = first_row, first_start
        for k in range(count):  # largest magnitudes
            stop = min(start + unit, features)
            tail, blocks = (stop - start) % 32, (stop - start) // 32
            source = x + (row * features + start) * itemsize
            if kind == _E4M3 and start == 0:
                amax = _row_amax(source, features, bf16, itemsize, scratch)
                row_scale = simd.as_int(simd.as_float(amax) / (_SCALE_LARGEST * np.float32(largest)))
                row_scale = row_scale if row_scale >= _SMALLEST_ROW_SCALE else np.int32(0)
                simd.store_word(row_scales + 4 * row, row_scale)
            if tail:
                fill_tail(source + blocks * 32 * itemsize, tail, itemsize, scratch)
            most = _magnitudes(scratch if tail else source, bf16)
            for block in range(0 if tail else 1, blocks):
                most = simd.maximum(most, _magnitudes(source + block * 32 * itemsize, bf16))
            if pairs:
                other = simd.and_(most, across.halves(np.int32(0), np.int32(-1)))
                simd.store_word(scratch + _AMAX + _SECOND + 4 * k, simd.largest(other))
                simd.store_word(scratch + _ROW + 4 * k, row_scale)
                most = simd.and_(most, across.halves(np.int32(-1), np.int32(0)))
            simd.store_word(scratch + _AMAX + 4 * k, simd.largest(most))
            start = stop
            if start == features:
                row, start = row + 1, 0

        for part in range(0, second + 1, _SECOND):
            amaxs, row_scales_of = simd.load_fp32(scratch + _AMAX + part), simd.load_fp32(scratch + _ROW)
            scale, inverse = _scales(amaxs, row_scales_of, kind, highest, np.float32(largest))
            simd.store_fp32(scratch + _SCALE + part, scale)
            simd.store_fp32(scratch + _INVERSE + part, inverse)

        row, start = first_row, first_start
        for k in range(count):  # codes
            stop = min(start + unit, features)
            tail, blocks = (stop - start) % 32, (stop - start) // 32
            source = x + (row * features + start) * itemsize
            scale = simd.load_word(scratch + _SCALE + 4 * k)
            if kind == _BF16:
                simd.store_half(scales + 2 * (batch + k), scale)
            elif kind == _E8M0:
                simd.store_byte(scales + batch + k, scale)
            else:
                byte = scales + (row * features + start) // 16
                simd.store_byte(byte, scale)
                if stop > start + 16:
                    simd.store_byte(byte + 1, simd.load_word(scratch + _SCALE + second + 4 * k))
            a, b = scratch + 4 * k, scratch + second + 4 * k
            inverse = across.halves(simd.load_word(a + _INVERSE), simd.load_word(b + _INVERSE))
            finite = simd.less(across.halves(simd.load_word(a + _AMAX), simd.load_word(b + _AMAX)), _INF)
            at = row * padded + start
            for block in range(blocks + (1 if tail else 0)):
                if block == blocks:
                    fill_tail(source + blocks * 32 * itemsize, tail, itemsize, scratch)
                values = simd.and_(load(source + block * 32 * itemsize if block < blocks else scratch, bf16), finite)
                scaled = simd.fmul(simd.and_(values, _ABSOLUTE), inverse)
                sign = simd.and_(simd.shift_right(values, np.int32(32 - bits)), np.int32(1 << (bits - 1)))
                codes = simd.or_(minifloat.encode(scaled, mantissa, lowest, top), sign)
                store_codes(codes, 32 if block < blocks else tail, at, planes, bits, scratch)
                at += 32
            start = stop
            if start == features:
                row, start = row + 1, 0
        first_row, first_start = row, start


@jit
def _reduce(wires, stride, planes, scales, row_scales, numbers, out, bf16, rows, features, scratch, table):
    bits, mantissa, lowest, _, _, nan, _, kind, group = numbers
    itemsize = 2 if bf16 else 4
    padded = (features + 7) // 8 * 8
    groups = (features + group - 1) // group
    for row in range(rows):
        for start in range(0, features, 32):
            n = min(32, features - start)
            index = row * groups + start // group
            total = simd.splat(np.int32(0))
            for wire in range(wires):
                skip = wire * stride
                codes = load_codes(n, row * padded + start, planes, skip, bits, scratch)
                values = minifloat.decode(codes, bits, mantissa, lowest, nan)
                if kind == _BF16:
                    scale = simd.load_half(scales + skip + 2 * index) << np.int32(16)
                    values = simd.fmul(values, simd.as_float(scale))
                elif kind == _E8M0:
                    scale = simd.load_byte(scales + skip + index)
                    half = (scale >> np.int32(1)) + np.int32(64)
                    rest = scale + np.int32(127) - half
                    first = _NAN if scale == np.int32(0xFF) else half << np.int32(23)
                    values = simd.fmul(simd.fmul(values, simd.as_float(first)), simd.as_float(rest << np.int32(23)))
                else:
                    byte = scales + skip + index
                    row_scale = simd.as_float(simd.load_word(row_scales + skip + 4 * row))
                    first = simd.as_float(simd.load_word(table + 4 * simd.load_byte(byte)))
                    second = simd.as_float(simd.load_word(table + 4 * simd.load_byte(byte + (1 if n > 16 else 0))))
                    values = simd.fmul(values, across.halves(first * row_scale, second * row_scale))
                total = values if wire == 0 else simd.fadd(total, values)
            target = out + (row * features + start) * itemsize
            store_values(total, target, n, bf16, scratch)


@lru_cache(maxsize=64)
def _numbers(codec: Microscaling) -> _Numbers:
    element = codec.format.element
    return _Numbers(
        bits=element.bits,
        mantissa=element.mantissa,
        lowest=element.lowest,
        highest=element.highest,
        top=element.top,
        nan=-1 if element.nan is None else element.nan,
        largest=element.largest,
        kind={"bf16": _BF16, "e8m0": _E8M0, "e4m3": _E4M3}[codec.format.scale],
        group=codec.group,
    )


def _addresses(codec: Microscaling, wire: torch.Tensor, rows: int, features: int) -> list:
    """Of the planes, the scales and the row scales in one wire; 0 for an absent section."""
    views = codec.split(wire, rows, features)
    names = ("scales", "row_scales")
    return [plane_addresses(views), *(views[name].data_ptr() if name in views else 0 for name in names)]


def encode_rows(codec: Microscaling, x: torch.Tensor, wire: torch.Tensor) -> None:
    """x [rows, features] contiguous -> wire, as `Codec.encode_rows`."""
    values, scratch = readable(x), torch.zeros(_SCRATCH, dtype=torch.uint8)
    _encode(
        values.data_ptr(),
        values.dtype == torch.bfloat16,
        *x.shape,
        *_addresses(codec, wire, *x.shape),
        _numbers(codec),
        scratch.data_ptr(),
    )
    codec.clear_gaps(wire, *x.shape)


def reduce_rows(codec: Microscaling, wires: torch.Tensor, out: torch.Tensor) -> None:
    """Sum of the decoded wires -> out, as `Codec.reduce_rows`."""
    scratch = torch.empty(32, dtype=torch.int32)
    with written(out) as target:
        _reduce(
            wires.shape[0],
            wires.stride(0),
            *_addresses(codec, wires[0], *out.shape),
            _numbers(codec),
            target.data_ptr(),
            target.dtype == torch.bfloat16,
            *out.shape,
            scratch.data_ptr(),
            _scale_values.data_ptr(),
        )
