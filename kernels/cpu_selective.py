"""Codes within static ranges on CPU (numba): the arithmetic and the wire of `codecs/selective.py`, bit for bit.

Ranges are per feature, so they are loaded as vectors, 32 features at a time, from tables padded to whole blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from . import cpu_simd as simd
from .cpu_planes import fill_tail, load, load_codes, plane_addresses, readable, store_codes, store_values
from .cpu_simd import jit

if TYPE_CHECKING:
    from ..codecs.selective import Ranges

_MAGIC = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, half to even
_MAGIC_BITS = np.int32(0x4B400000)
_ZERO = np.float32(0)


@jit
def _encode(x, bf16, rows, features, planes, low, inverse, bits, scratch):
    itemsize, padded = 2 if bf16 else 4, (features + 7) // 8 * 8
    top = np.float32((1 << bits) - 1)
    for row in range(rows):
        for start in range(0, features, 32):
            n = min(32, features - start)
            source = x + (row * features + start) * itemsize
            if n < 32:
                fill_tail(source, n, itemsize, scratch)
            values = load(source if n == 32 else scratch, bf16)
            t = simd.fmul(simd.fsub(values, simd.load_fp32(low + 4 * start)), simd.load_fp32(inverse + 4 * start))
            t = simd.and_(simd.fless(_ZERO, t), t)
            t = simd.choose(simd.fless(t, top), t, simd.splat(simd.as_int(top)))
            codes = simd.sub(simd.fadd(t, _MAGIC), _MAGIC_BITS)
            store_codes(codes, n, row * padded + start, planes, bits, scratch)


@jit
def _reduce(wires, stride, planes, low, scale, step, bits, out, bf16, rows, features, scratch):
    """step: bytes from one sender's ranges to the next one's; 0 where all have the same."""
    itemsize, padded = 2 if bf16 else 4, (features + 7) // 8 * 8
    for row in range(rows):
        for start in range(0, features, 32):
            n = min(32, features - start)
            total = simd.splat(np.int32(0))
            for wire in range(wires):
                codes = load_codes(n, row * padded + start, planes, wire * stride, bits, scratch)
                table = wire * step + 4 * start
                values = simd.fmul(simd.to_float(codes), simd.load_fp32(scale + table))
                values = simd.fadd(simd.load_fp32(low + table), values)
                total = values if wire == 0 else simd.fadd(total, values)
            store_values(total, out + (row * features + start) * itemsize, n, bf16, scratch)


def encode_rows(codec: Ranges, x: torch.Tensor, wire: torch.Tensor) -> None:
    """x [rows, features] contiguous -> wire, as `Codec.encode_rows`."""
    values, scratch = readable(x), torch.empty(32, dtype=torch.int32)
    _encode(
        values.data_ptr(),
        values.dtype == torch.bfloat16,
        *x.shape,
        plane_addresses(codec.split(wire, *x.shape)),
        codec.low[codec.sender].data_ptr(),
        codec.inverse[codec.sender].data_ptr(),
        codec.bits,
        scratch.data_ptr(),
    )


def reduce_rows(codec: Ranges, wires: torch.Tensor, out: torch.Tensor) -> None:
    """Sum of the decoded wires -> out fp32 or bf16, as `Codec.reduce_rows`."""
    first = codec.sender if len(wires) == 1 else 0
    scratch = torch.empty(32, dtype=torch.int32)
    _reduce(
        len(wires),
        wires.stride(0),
        plane_addresses(codec.split(wires[0], *out.shape)),
        codec.low[first].data_ptr(),
        codec.scale[first].data_ptr(),
        4 * codec.low.shape[1] if len(codec.low) > 1 else 0,
        codec.bits,
        out.data_ptr(),
        out.dtype == torch.bfloat16,
        *out.shape,
        scratch.data_ptr(),
    )
