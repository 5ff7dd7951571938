"""Rotating and normalizing a group on CPU (numba): the arithmetic of `codecs/hadamard.py` and of `codecs/gauss.py`.

A group lies in memory of the caller's, as fp32, with zeros up to a whole number of blocks of 32.
"""

from __future__ import annotations

import numpy as np
import torch

from ..codecs import hadamard
from . import cpu_lanes as across
from . import cpu_simd as simd
from .cpu_planes import fill_tail, load, store_values
from .cpu_simd import inline

ABSOLUTE = np.int32(0x7FFFFFFF)
INF, NAN = np.int32(0x7F800000), np.int32(0x7FC0)  # of fp32, of bf16
SIGN_BITS = (hadamard.SIGNS.view(torch.int32) & -(2**31)).contiguous()  # to be xored


@inline
def _scale_by(at, n, factor):
    for j in range(0, n, 32):
        simd.store_fp32(at + 4 * j, simd.fmul(simd.load_fp32(at + 4 * j), factor))


@inline
def _butterfly(at, n):
    """n fp32 values in memory, a power of two from 32 up."""
    for j in range(0, n, 32):
        simd.store_fp32(at + 4 * j, across.butterfly(simd.load_fp32(at + 4 * j)))
    h = 32
    while h < n:
        for start in range(0, n, 2 * h):
            for j in range(start, start + h, 32):
                a, b = simd.load_fp32(at + 4 * j), simd.load_fp32(at + 4 * (j + h))
                simd.store_fp32(at + 4 * j, simd.fadd(a, b))
                simd.store_fp32(at + 4 * (j + h), simd.fsub(a, b))
        h *= 2


@inline
def _negate(at, n, signs):
    for j in range(0, n, 32):
        simd.store_fp32(at + 4 * j, simd.xor(simd.load_fp32(at + 4 * j), simd.load_fp32(signs + 4 * j)))


@inline
def rotate(at, n, signs, backwards):
    """The group in memory, without the signs of its values."""
    p, factor = 32, np.float32(0.17677669)  # 1 / sqrt(32)
    while 2 * p <= n:
        p *= 2
        factor = np.float32(0.125) if p == 64 else np.float32(0.088388346) if p == 128 else np.float32(0.0625)
    if p == n:
        _butterfly(at, p)
        if backwards:
            _scale_by(at, p, np.float32(1) / np.float32(p))
    else:
        for step in range(2):
            last = (step == 1) != backwards
            part = at + 4 * (n - p) if last else at
            if last and not backwards:
                _negate(part, p, signs)
            _butterfly(part, p)
            _scale_by(part, p, factor)
            if last and backwards:
                _negate(part, p, signs)


@inline
def _bf16(value):
    """fp32 -> its bf16 bits, to nearest even."""
    bits = simd.as_int(value)
    return ((bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16)) & np.int32(0xFFFF)


@inline
def storable(value):
    """An fp32 scale -> bf16 bits: 0 unless it is positive and normal (-0 is neither), NaN if it overflows."""
    bits = _bf16(value)
    if bits < np.int32(0x80) or bits >= np.int32(0x8000):
        return np.int32(0)
    return NAN if bits >= np.int32(0x7F80) else bits


@inline
def load_group(source, n, bf16, turned, signs, z, scratch):
    """n values -> z, rotated if `turned`."""
    itemsize = 2 if bf16 else 4
    for j in range(0, n, 32):
        if n - j < 32:
            fill_tail(source + j * itemsize, n - j, itemsize, scratch)
        values = load(source + j * itemsize if n - j >= 32 else scratch, bf16)
        if turned:
            values = simd.xor(values, simd.load_fp32(signs + 4 * j))
        simd.store_fp32(z + 4 * j, values)
    if turned:
        rotate(z, n, signs, False)
    for j in range(n, (n + 31) // 32 * 32):
        simd.store_word(z + 4 * j, np.int32(0))


@inline
def store_group(z, n, turned, signs, target, bf16, scratch):
    """z, rotated back if it was `turned` -> n values."""
    itemsize = 2 if bf16 else 4
    if turned:
        rotate(z, n, signs, True)
    for j in range(0, n, 32):
        values = simd.load_fp32(z + 4 * j)
        if turned:
            values = simd.xor(values, simd.load_fp32(signs + 4 * j))
        store_values(values, target + j * itemsize, min(32, n - j), bf16, scratch)


@inline
def normalize(z, n):
    """z -> w = z * 2**-e in place; (bits of the largest |z|, 2**e, 2**-e, rms of w)."""
    largest = simd.splat(np.int32(0))
    for j in range(0, n, 32):
        largest = simd.maximum(largest, simd.and_(simd.load_fp32(z + 4 * j), ABSOLUTE))
    peak = simd.largest(largest)
    exponent = min(max(peak >> np.int32(23), np.int32(1)), np.int32(253))
    down = simd.as_float((np.int32(254) - exponent) << np.int32(23))
    squares = simd.splat(np.int32(0))
    for j in range(0, n, 32):
        w = simd.fmul(simd.load_fp32(z + 4 * j), down)
        simd.store_fp32(z + 4 * j, w)
        square = simd.fmul(w, w)
        squares = square if j == 0 else simd.fadd(squares, square)
    rms = np.float32(np.sqrt(across.fold(squares) / np.float32(n)))
    return peak, simd.as_float(exponent << np.int32(23)), down, rms
