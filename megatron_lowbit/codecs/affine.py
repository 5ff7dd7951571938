"""Group-wise affine integers, int2 to int8 (Flash Communication V1, section 3; QuickReduce's symmetric Q4 to Q8).

Definition, in fp32, per group of g neighbouring values of a row (a row's last group may be shorter):

    asymmetric   zero  = bf16(min) rounded towards minus infinity        L = 2**bits - 1
                 scale = bf16((max - zero) / L)                          round to nearest even
                 code  = min(rint((x - zero) * (1 / scale)), L)
                 value = zero + code * scale
    symmetric    scale = bf16(m / -h), m the extreme of larger magnitude (min on a tie), h = 2**(bits - 1)
                 code  = min(rint(x * (1 / scale)) + h, 2h - 1)
                 value = (code - h) * scale

No fused multiply-add; 1 / scale is an IEEE division. A scale too small to be a normal number is stored as 0, with codes
0 (asymmetric) or h (symmetric). A group that holds a NaN or an Inf, or whose range overflows fp32, gets a NaN scale
and decodes to NaN throughout: a non-finite value never comes out finite.

Why so: bf16 has fp32's range, so neither a tiny nor a huge group loses its scale (fp16 loses 23 dB at int8 on values of
1e-5, and overflows at 65504), and its 8 bits cost 0.3 dB at int8 and nothing measurable at int4. The zero rounds down,
so no value lies below it: within 0.1 dB of rounding to nearest on centred data, 13 dB better at int8 on offset data.
The scale rounds to nearest, by at most 1 part in 2**8, so the error is at most max(1/2, L / 2**8) steps: half a step up
to int7; at int8 a group's largest values may lie a whole step above the top code. The symmetric scale is signed: all
2**bits codes are used, 0.75 dB better than the absolute maximum over 2**(bits - 1) and 5 dB better than a balanced
range at 2 bits; its error is at most 1 + h / 2**8 steps. (benchmarks/scale_formats.py measures all this.)

Wire: planes of codes (codecs/packing.py), then scales bf16 [rows, groups], then (asymmetric) zeros, likewise.
"""

from __future__ import annotations

import torch

from ..spec import Leg
from . import packing
from .base import Codec, Kernel, quotient, rounded

SMALLEST_NORMAL = 2.0**-126


class Affine(Codec):
    """bits, group, sym: as in the spec."""

    numba = "cpu_affine"

    def __init__(self, leg: Leg) -> None:
        self.spec = str(leg)
        self.bits, self.group, self.sym = leg.bits, leg.group, leg.sym
        self.kernel = Kernel("affine", leg.bits, leg.group, int(leg.sym))

    def granularity(self, features: int) -> int:
        return self.group

    def sections(self, rows: int, features: int) -> list[tuple[str, int]]:
        parameters = 2 * rows * -(-features // self.group)
        result = [(f"plane{w}", packing.plane_nbytes(rows, features, w)) for w in packing.planes(self.bits)]
        result.append(("scales", parameters))
        if not self.sym:
            result.append(("zeros", parameters))
        return result

    def define_encode(self, x: torch.Tensor, wire: torch.Tensor) -> None:
        codes, scale, zero = quantize(x.float(), self.bits, self.group, self.sym)
        views = self.split(wire, *x.shape)
        packing.store(views, "plane", codes, self.bits)
        views["scales"].view(torch.bfloat16).copy_(scale.flatten())
        if not self.sym:
            views["zeros"].view(torch.bfloat16).copy_(zero.flatten())
        self.clear_gaps(wire, *x.shape)

    def define_reduce(self, wires: torch.Tensor, out: torch.Tensor) -> None:
        total = self._decode(wires[0], *out.shape)
        for wire in wires[1:]:
            total += self._decode(wire, *out.shape)
        out.copy_(rounded(total, out.dtype))

    def _decode(self, wire: torch.Tensor, rows: int, features: int) -> torch.Tensor:
        views = self.split(wire, rows, features)
        codes = packing.load(views, "plane", rows, features, self.bits)
        scale = views["scales"].view(torch.bfloat16).view(rows, -1)
        zero = None if self.sym else views["zeros"].view(torch.bfloat16).view(rows, -1)
        return dequantize(codes, scale, zero, self.bits, self.group)


def quantize(
    x: torch.Tensor, bits: int, group: int, sym: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """x [rows, features] fp32 -> codes uint8 [rows, features], scales and zeros bf16 [rows, groups]."""
    lo, hi = _extremes(x, group)
    half, top = 2 ** (bits - 1), 2**bits - 1
    if sym:
        zero, scale = None, quotient(torch.where(-lo >= hi, lo, hi), -half)
        finite = (hi - hi == 0) & (lo - lo == 0)
    else:
        zero = _bf16_down(lo)
        span = hi - zero.float()
        scale, finite = quotient(span, top), span - span == 0
        zero = zero.masked_fill(~finite, torch.nan)
    scale = scale.bfloat16()
    scale = scale.masked_fill(scale.float().abs() < SMALLEST_NORMAL, 0.0).masked_fill(~finite, torch.nan)
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale.float())
    centred = x if sym else x - _spread(zero.float(), group, x.shape[1])
    codes = torch.round(centred * _spread(inverse, group, x.shape[1])) + (half if sym else 0)
    codes = torch.where(_spread(finite, group, x.shape[1]), codes.clamp(0, top), 0.0)
    return codes.to(torch.uint8), scale, zero


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, group: int
) -> torch.Tensor:
    """The inverse of `quantize`, up to the rounding: -> fp32 [rows, features]."""
    features = codes.shape[1]
    values = (codes.float() - (2 ** (bits - 1) if zero is None else 0)) * _spread(scale.float(), group, features)
    return values if zero is None else _spread(zero.float(), group, features) + values


def _extremes(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimum and maximum of each group, fp32 [rows, groups]; NaN wins; a minus zero becomes plus zero."""
    rows, features = x.shape
    padding = -features % group
    lo = torch.nn.functional.pad(x, (0, padding), value=torch.inf).view(rows, -1, group).amin(-1)
    hi = torch.nn.functional.pad(x, (0, padding), value=-torch.inf).view(rows, -1, group).amax(-1)
    return lo + 0.0, hi + 0.0


def _spread(per_group: torch.Tensor, group: int, features: int) -> torch.Tensor:
    return per_group.repeat_interleave(group, dim=1)[:, :features]


def _bf16_down(x: torch.Tensor) -> torch.Tensor:
    """Round fp32 to bf16 towards minus infinity: cut the mantissa, then one step down if a negative was cut upwards."""
    bits = x.view(torch.int32)
    cut = (bits & 0xFFFF) != 0
    high = bits >> 16
    high = torch.where((bits < 0) & cut, high + 1, high)  # a larger magnitude is further down
    return torch.where(torch.isnan(x), torch.nan, (high << 16).view(torch.float32)).bfloat16()
