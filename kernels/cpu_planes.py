"""What the CPU kernels share: blocks of up to 32 values, and planes of codes, between memory and registers.

The layout of planes is that of `codecs/packing.py`. `planes` are the addresses of the planes of 8, 4, 2 and 1 bits of
one wire, 0 where a width has none; `at` counts a block's first value in padded values. A block of n < 32 values goes
through `scratch`, 128 bytes that the caller owns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from . import cpu_simd as simd
from .cpu_simd import inline


@inline
def load(address, bf16):
    """32 values -> their fp32 bits."""
    return simd.load_bf16(address) if bf16 else simd.load_fp32(address)


@inline
def copy(source, target, nbytes):
    for j in range(nbytes):
        simd.store_byte(target + j, simd.load_byte(source + j))


@inline
def fill_tail(source, n, itemsize, scratch):
    """A block of n < 32 values, filled up by repeating them, which leaves the extremes alone."""
    for j in range(32):
        copy(source + (j % n) * itemsize, scratch + j * itemsize, itemsize)


@inline
def store_values(values, target, n, bf16, scratch):
    """fp32 bits of n <= 32 values -> memory, as bf16 or fp32, with one kind of NaN."""
    place = target if n == 32 else scratch
    if bf16:
        simd.store_bf16(place, values)
    else:
        simd.store_fp32(place, simd.canonical(values))
    if n < 32:
        copy(scratch, target, n * (2 if bf16 else 4))


@inline
def _tail_planes(codes, n, at, planes, skip, bits, store):
    """A block of n < 32 codes (memory of int32; n a multiple of 8) to its planes or from them."""
    for p in range(4):
        width = 8 >> p
        if bits & width:
            address, size = planes[p] + skip + at * width // 8, n * width // 8
            shift, mask = np.int32(bits & (16 - 2 * width)), np.int32((1 << width) - 1)
            for j in range(size):
                byte = np.int32(0) if store else simd.load_byte(address + j)
                for k in range(8 // width):
                    code, place = codes + 4 * (j + k * size), np.int32(k * width)
                    if store:
                        byte |= ((simd.load_byte(code) >> shift) & mask) << place
                    else:
                        simd.store_byte(code, simd.load_byte(code) | (((byte >> place) & mask) << shift))
                if store:
                    simd.store_byte(address + j, byte)


@inline
def store_codes(codes, n, at, planes, bits, scratch):
    """n <= 32 codes -> their planes; what lies behind a short block's n codes is ignored."""
    if n == 32:
        if bits & 8:
            simd.store_plane(planes[0] + at, codes, 8, np.int32(0))
        if bits & 4:
            simd.store_plane(planes[1] + at // 2, codes, 4, np.int32(0))
        if bits & 2:
            simd.store_plane(planes[2] + at // 4, codes, 2, np.int32(bits & 4))
        if bits & 1:
            simd.store_plane(planes[3] + at // 8, codes, 1, np.int32(bits & 6))
    else:
        simd.store_fp32(scratch, codes)
        padded = (n + 7) // 8 * 8
        for j in range(n, padded):
            simd.store_byte(scratch + 4 * j, np.int32(0))
        _tail_planes(scratch, padded, at, planes, 0, bits, True)


@inline
def load_codes(n, at, planes, skip, bits, scratch):
    """The inverse, `skip` bytes further on; undefined codes behind a short block's n."""
    codes = simd.splat(np.int32(0))
    if n == 32:
        if bits & 8:
            codes = simd.load_plane(planes[0] + skip + at, 8, np.int32(0))
        if bits & 4:
            codes = simd.load_plane(planes[1] + skip + at // 2, 4, np.int32(0))
        if bits & 2:
            codes = simd.or_(codes, simd.load_plane(planes[2] + skip + at // 4, 2, np.int32(bits & 4)))
        if bits & 1:
            codes = simd.or_(codes, simd.load_plane(planes[3] + skip + at // 8, 1, np.int32(bits & 6)))
    else:
        simd.store_fp32(scratch, codes)
        _tail_planes(scratch, (n + 7) // 8 * 8, at, planes, skip, bits, False)
        codes = simd.load_fp32(scratch)
    return codes


def plane_addresses(views: dict[str, torch.Tensor], prefix: str = "plane") -> tuple[int, int, int, int]:
    """Sections of a wire (`Codec.split`) -> `planes`."""
    return tuple(views[name].data_ptr() if (name := f"{prefix}{width}") in views else 0 for width in (8, 4, 2, 1))


@contextmanager
def written(out: torch.Tensor) -> Iterator[torch.Tensor]:
    """Where a kernel writes: out itself, or for fp16 an fp32 tensor that is rounded into it afterwards."""
    target = torch.empty(out.shape, dtype=torch.float32) if out.dtype == torch.float16 else out
    yield target
    if target is not out:
        out.copy_(target)


def readable(x: torch.Tensor) -> torch.Tensor:
    """x as kernels read it: bf16 and fp32 are taken as they are, fp16 goes through a converted copy."""
    return x.float() if x.dtype == torch.float16 else x
