"""Floating-point numbers of 4, 6 and 8 bits on the GPU: the arithmetic of codecs/minifloat.py.

BITS names the element: 8 is E4M3, 6 is E2M3, 4 is E2M1. Processors from compute capability 8.9 on convert E4M3, and
what they do is the definition, saturation included. For the others, elsewhere, and in the interpreter:

Encoding to m mantissa bits adds the power of two whose last bit is worth one step: fp32 addition then rounds half to
even, at the step of the value's own exponent, or of the smallest normal number's for what is subnormal. The code
follows from the bits of the sum. Hazard: magnitudes must be below 2**(104 + m), or that power of two overflows.

Decoding puts exponent and mantissa where fp32 has them. That makes the value too small by the power of two between the
biases, subnormal fp32 numbers of the element's subnormals, and multiplying puts it right: exact, all of it. Hazard: the
multiplication must not flush subnormal operands. Triton's does not.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from ..codecs.minifloat import E2M1, E2M3, E4M3

try:
    from triton.language import target_info
except ImportError:  # an older Triton, with which kernels cannot ask what they are compiled for
    target_info = None

_ASK = tl.constexpr(target_info is not None and os.environ.get("TRITON_INTERPRET") != "1")
_E4M3_MANTISSA, _E4M3_LOWEST, _E4M3_TOP = tl.constexpr(E4M3.mantissa), tl.constexpr(E4M3.lowest), tl.constexpr(E4M3.top)
_E2M3_MANTISSA, _E2M3_LOWEST, _E2M3_TOP = tl.constexpr(E2M3.mantissa), tl.constexpr(E2M3.lowest), tl.constexpr(E2M3.top)
_E2M1_MANTISSA, _E2M1_LOWEST, _E2M1_TOP = tl.constexpr(E2M1.mantissa), tl.constexpr(E2M1.lowest), tl.constexpr(E2M1.top)
_E4M3_NAN = tl.constexpr(E4M3.nan)


@triton.jit
def encode(x, BITS: tl.constexpr):
    """fp32 of any shape, finite -> codes, uint32."""
    CONVERTS: tl.constexpr = target_info.cuda_capability_geq(8, 9) if _ASK else False
    MANTISSA: tl.constexpr = _E4M3_MANTISSA if BITS == 8 else (_E2M3_MANTISSA if BITS == 6 else _E2M1_MANTISSA)
    LOWEST: tl.constexpr = _E4M3_LOWEST if BITS == 8 else (_E2M3_LOWEST if BITS == 6 else _E2M1_LOWEST)
    TOP: tl.constexpr = _E4M3_TOP if BITS == 8 else (_E2M3_TOP if BITS == 6 else _E2M1_TOP)
    if CONVERTS and BITS == 8:
        codes = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.uint32)
    else:
        bits = x.to(tl.int32, bitcast=True)
        exponent = tl.maximum(bits & 0x7F800000, (LOWEST + 127) << 23)
        step = exponent + ((23 - MANTISSA) << 23)
        total = (tl.abs(x) + step.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
        binades = (exponent >> (23 - MANTISSA)) - ((LOWEST + 127) << MANTISSA)
        magnitude = tl.minimum(total + (binades - step), TOP)
        codes = (magnitude | ((bits >> (32 - BITS)) & 2 ** (BITS - 1))).to(tl.uint32, bitcast=True)
    return codes


@triton.jit
def decode(codes, BITS: tl.constexpr):
    """Codes, uint32 below 2**BITS, of any shape -> their values, fp32."""
    CONVERTS: tl.constexpr = target_info.cuda_capability_geq(8, 9) if _ASK else False
    MANTISSA: tl.constexpr = _E4M3_MANTISSA if BITS == 8 else (_E2M3_MANTISSA if BITS == 6 else _E2M1_MANTISSA)
    LOWEST: tl.constexpr = _E4M3_LOWEST if BITS == 8 else (_E2M3_LOWEST if BITS == 6 else _E2M1_LOWEST)
    MAGNITUDE: tl.constexpr = (2 ** (BITS - 1) - 1) * 2 ** (23 - MANTISSA)
    if CONVERTS and BITS == 8:
        values = codes.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        placed = (codes << (32 - BITS)).to(tl.int32, bitcast=True) >> (9 - BITS + MANTISSA)  # 8 bits of sign in front
        values = (placed & (MAGNITUDE - 0x80000000)).to(tl.float32, bitcast=True) * 2.0 ** (126 + LOWEST)
        if BITS == 8:
            values = tl.where((placed & MAGNITUDE) == (_E4M3_NAN << (23 - MANTISSA)), float("nan"), values)
    return values
