"""Sums of values that travel as they are, on CPU (numba): `codecs/passthrough.py`, bit for bit but for kinds of NaN.

A block of 32 sums stays in registers over all wires, so nothing but the wires is read and nothing but the result is
written; PyTorch's operations go through memory once for every wire. Copies, and wires of fp16, are PyTorch's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from . import cpu_simd as simd
from .cpu_planes import fill_tail, load, store_values, written
from .cpu_simd import jit

if TYPE_CHECKING:
    from ..codecs.passthrough import Passthrough


@jit
def _reduce(wires, stride, values, bf16, out, bf16_out, count, scratch):
    itemsize, out_itemsize = 2 if bf16 else 4, 2 if bf16_out else 4
    for start in range(0, count, 32):
        n = min(32, count - start)
        total = simd.splat(np.int32(0))
        for wire in range(wires):
            source = values + wire * stride + start * itemsize
            if n < 32:
                fill_tail(source, n, itemsize, scratch)
                source = scratch
            block = load(source, bf16)
            total = block if wire == 0 else simd.fadd(total, block)
        store_values(total, out + start * out_itemsize, n, bf16_out, scratch)


def encode_rows(codec: Passthrough, x: torch.Tensor, wire: torch.Tensor) -> None:
    """x [rows, features] -> wire, as `Codec.encode_rows`."""
    codec.define_encode(x, wire)


def reduce_rows(codec: Passthrough, wires: torch.Tensor, out: torch.Tensor) -> None:
    """Sum of the wires -> out [rows, features] contiguous, as `Codec.reduce_rows`."""
    if len(wires) == 1 or codec.dtype == torch.float16:
        return codec.define_reduce(wires, out)
    scratch = torch.empty(32, dtype=torch.int32)
    values = codec.split(wires[0], *out.shape)["values"].data_ptr()
    with written(out) as target:
        bf16_out = target.dtype == torch.bfloat16
        arguments = codec.dtype == torch.bfloat16, target.data_ptr(), bf16_out, target.numel(), scratch.data_ptr()
        _reduce(len(wires), wires.stride(0), values, *arguments)
