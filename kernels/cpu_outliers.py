"""Splitting outlier features off and putting them back on CPU (numba), as `codecs/outliers.py` defines it, and which
rows are finite.

The ordinary features between two outliers are a segment, copied 32 values at a time. A copy may run over the end of its
segment: what it spoils there is written later. In the last rows, where it would run over the end of the memory, it is
cut to size.
"""

from __future__ import annotations

import numpy as np
import torch

from . import cpu_simd as simd
from .cpu_planes import copy, fill_tail, load, readable, store_values, written
from .cpu_simd import jit

_INF = np.int32(0x7F800000)
_MAGNITUDE = np.int32(0x7FFFFFFF)


@jit
def _split(x, itemsize, rows, features, segments, number, count, out):
    """Rows of `features` values -> rows of the `count` ordinary ones. segments: int32 [number, 3], see `segments`."""
    for row in range(rows):
        last = (rows - row - 1) * count * itemsize < 128
        for segment in range(segments, segments + 12 * number, 12):
            source = x + (row * features + simd.load_word(segment)) * itemsize
            target = out + (row * count + simd.load_word(segment + 4)) * itemsize
            size = simd.load_word(segment + 8) * itemsize
            if last:
                copy(source, target, size)
            else:
                for j in range(0, size, 128):
                    simd.store_fp32(target + j, simd.load_fp32(source + j))


@jit
def _join(x, rows, features, segments, number, count, out, bf16, scratch):
    """Rows of `count` fp32 values -> their places in rows of `features` values, bf16 or fp32."""
    itemsize = 2 if bf16 else 4
    for row in range(rows):
        last = (rows - row - 1) * features * itemsize < 128
        for segment in range(segments, segments + 12 * number, 12):
            target = out + (row * features + simd.load_word(segment)) * itemsize
            source = x + (row * count + simd.load_word(segment + 4)) * 4
            size = np.int64(simd.load_word(segment + 8))
            for j in range(0, size, 32):
                n = min(32, size - j) if last else 32
                store_values(simd.load_fp32(source + 4 * j), target + j * itemsize, n, bf16, scratch)


@jit
def _finite(x, bf16, rows, features, out, scratch):
    """Of each row a byte: 1 if all of its values are finite, else 0."""
    itemsize = 2 if bf16 else 4
    for row in range(rows):
        highest = simd.splat(np.int32(0))
        for start in range(0, features, 32):
            source = x + (row * features + start) * itemsize
            if features - start < 32:
                fill_tail(source, features - start, itemsize, scratch)
                source = scratch
            highest = simd.maximum(highest, simd.and_(load(source, bf16), _MAGNITUDE))
        simd.store_byte(out + row, np.int32(1) if simd.largest(highest) < _INF else np.int32(0))


def finite(x: torch.Tensor) -> torch.Tensor:
    """x [rows, features] contiguous -> bool [rows]: whether all of a row's values are finite."""
    values, out, scratch = readable(x), torch.empty(len(x), dtype=torch.bool), torch.empty(32)
    bf16 = values.dtype == torch.bfloat16
    _finite(values.data_ptr(), bf16, *x.shape, out.data_ptr(), scratch.data_ptr())
    return out


def segments(kept: torch.Tensor) -> torch.Tensor:
    """Ascending features -> int32 [segments, 3]: of each run of neighbours its first feature, its place, its length."""
    features = torch.arange(len(kept))
    places = features[kept != torch.cat([kept.new_full((1,), -2), kept[:-1] + 1])[: len(kept)]]
    ends = torch.cat([places[1:], torch.tensor([len(kept)])])[: len(places)]
    return torch.stack([kept[places], places, ends - places], 1).int()


def split(x: torch.Tensor, runs: torch.Tensor, count: int) -> torch.Tensor:
    """x [rows, features] contiguous -> its `count` ordinary features, contiguous, alike. runs: `segments`."""
    out = torch.empty(x.shape[0], count, dtype=x.dtype)
    _split(x.data_ptr(), x.itemsize, *x.shape, runs.data_ptr(), len(runs), count, out.data_ptr())
    return out


def join(ordinary: torch.Tensor, runs: torch.Tensor, out: torch.Tensor) -> None:
    """The inverse: fp32 [rows, count], with 32 values' space behind it, into out [rows, features]."""
    scratch = torch.empty(32)
    with written(out) as target:
        _join(
            ordinary.data_ptr(),
            *out.shape,
            runs.data_ptr(),
            len(runs),
            ordinary.shape[1],
            target.data_ptr(),
            target.dtype == torch.bfloat16,
            scratch.data_ptr(),
        )
