"""Floating-point numbers of 4 to 8 bits on CPU: the arithmetic of `codecs/minifloat.py` on 32 lanes, bit for bit.

Rounding to m mantissa bits adds the power of two whose last bit is worth one step: fp32 addition then rounds half to
even, at the step of the value's own exponent, or of the smallest normal number's for what is subnormal. The code
follows from the bits of the sum. Hazard: magnitudes must be below 2**(104 + m), or that power of two overflows.
No fp32 subnormals are involved.
"""

from __future__ import annotations

import numpy as np

from . import cpu_simd as simd
from .cpu_simd import inline

_EXPONENT = np.int32(0x7F800000)
_NAN = np.int32(0x7FC00000)
_SIGN = np.int32(-(2**31))


@inline
def encode(values, mantissa, lowest, top):
    """fp32 bits of magnitudes -> codes without sign; lowest: exponent of the smallest normal number."""
    smallest = np.int32((lowest + 127) << 23)
    exponent = simd.maximum(simd.and_(values, _EXPONENT), smallest)
    step = simd.add(exponent, np.int32((23 - mantissa) << 23))
    steps = simd.sub(simd.fadd(values, step), step)
    binades = simd.shift_right(simd.sub(exponent, smallest), np.int32(23 - mantissa))
    return simd.minimum(simd.add(binades, steps), np.int32(top))


@inline
def decode(codes, bits, mantissa, lowest, nan):
    """Codes -> fp32 bits of their values; nan: the code of NaN, -1 for none.

    A subnormal is read as if it were normal, which makes it larger by exactly the smallest normal number.
    """
    magnitude = simd.and_(codes, np.int32((1 << (bits - 1)) - 1))
    first, smallest = np.int32(1 << mantissa), np.int32((lowest + 127) << 23)
    subnormal = simd.less(magnitude, first)
    normal = simd.add(magnitude, simd.and_(subnormal, first))
    value = simd.add(simd.shift_left(normal, np.int32(23 - mantissa)), np.int32((lowest + 126) << 23))
    value = simd.fsub(value, simd.and_(subnormal, smallest))
    if nan >= 0:
        value = simd.or_(value, simd.and_(simd.equal(magnitude, np.int32(nan)), _NAN))
    return simd.or_(value, simd.and_(simd.shift_left(codes, np.int32(32 - bits)), _SIGN))
