"""Integers with spikes, int2 to int8 with `spike` (spike reserving: Flash Communication V2, arXiv 2508.03760).

Each group's minimum and maximum travel apart, exactly; the rest is quantized in the range that is left. Definition, in
fp32, per group of g neighbouring values of a row (a row's last group may be shorter):

    min, max   extremes of the values rounded to bf16 (-0 below +0), first occurrence of each: the spikes
    lo, hi     extremes of the others, rounded likewise; both min where there are no others
    anchor     the point between min and max nearest to 0              L = 2**bits - 1        h = 2**(bits - 1)

    asymmetric   start = lo if lo == min else lo + (hi - lo) / 2**(bits + 1)
                 zero  = max(min, anchor + short(start - anchor))               rounded towards minus infinity
                 scale = short((hi - zero) / (L if hi == max else L + 1/2))     rounded up
                 code  = rint((x - zero) * (1 / scale)), value = zero + code * scale
    symmetric    scale = short(m / -(h + 1/2)), m = lo or hi, the larger magnitude (lo on a tie); rounded away from 0
                 code  = rint(x * (1 / scale)) + h,      value = (code - h) * scale

Codes are clamped to 0 ... L, and 0 at the spikes' positions. Values are clamped to min ... max, then the spikes replace
theirs. `short` is a float of one byte: 4 bits of exponent relative to that of the larger spike, and 4 of mantissa, or a
sign and 3 (zeros, symmetric scales). So no step is below about 2**-(13 + bits) of the larger spike. A group that holds
a NaN, an Inf or what rounds to one in bf16, or whose hi - min overflows, has NaN spikes and decodes to NaN throughout.

Error of the rest: half a step; on the far side of a symmetric range 3/2. For fp32 and fp16 half a unit in bf16's last
place comes on top, at the spikes it is all there is. The asymmetric step is at most 17/16 of (max - min) / L.

Why so (benchmarks/spike_formats.py, g32, Gaussian unless said, at 2 / 3 / 4 bits): one byte for each of scale and zero
loses 0.1 dB at most to bf16's two, which cost what 3 dB cost in codes. As the spikes are safe, the levels may end half
a step inside of lo and hi: 2.1 / 1.0 / 0.7 dB more at the same greatest error. Where the rest touches a spike, as
zeros after a ReLU and integers do, many values may lie there, and a level does: 4 dB or more on ReLU's output. The
anchor is worth 1.5 / 2.0 / 2.3 dB at mean 50, standard deviation 1. Half a step on both sides of the symmetric range
would lose 0.5 dB at 2 bits (1.7 dB at g128).

Wire: planes of codes (codecs/packing.py), scales and (asymmetric) zeros uint8 [groups], spikes bf16 [2, groups], planes
of positions [2, groups]; groups are counted through all rows.
"""

from __future__ import annotations

import torch

from ..spec import Leg
from . import packing
from .base import Codec, Kernel, quotient

INFINITY, SMALLEST_NORMAL = 0x7F800000, 0x00800000  # bits of fp32


class Spike(Codec):
    """bits, group, sym: as in the spec. places: bits of a position."""

    numba = "cpu_spike"

    def __init__(self, leg: Leg) -> None:
        self.spec = str(leg)
        self.bits, self.group, self.sym = leg.bits, leg.group, leg.sym
        self.places = leg.group.bit_length() - 1
        together = 32 if leg.group < 256 else 1  # groups whose positions share bytes
        self.kernel = Kernel("spike", leg.bits, leg.group, int(leg.sym), together=together)

    def granularity(self, features: int) -> int:
        return self.group

    def sections(self, rows: int, features: int) -> list[tuple[str, int]]:
        groups = rows * -(-features // self.group)
        result = [(f"plane{w}", packing.plane_nbytes(rows, features, w)) for w in packing.planes(self.bits)]
        result += [("scales", groups)] if self.sym else [("scales", groups), ("zeros", groups)]
        result += [("spikes", 4 * groups)]
        return result + [(f"position{w}", packing.plane_nbytes(2, groups, w)) for w in packing.planes(self.places)]

    def define_encode(self, x: torch.Tensor, wire: torch.Tensor) -> None:
        views, groups = self.split(wire, *x.shape), _grouped(x.float(), self.group)
        inside = _grouped(torch.ones_like(x, dtype=torch.bool), self.group)
        codes, scales, zeros, spikes, positions = quantize(groups, inside, self.bits, self.sym)
        packing.store(views, "plane", _ungrouped(codes, *x.shape), self.bits)
        views["scales"].copy_(scales)
        if not self.sym:
            views["zeros"].copy_(zeros)
        views["spikes"].view(torch.bfloat16).copy_(spikes.flatten())
        packing.store(views, "position", positions, self.places)
        self.clear_gaps(wire, *x.shape)

    def define_reduce(self, wires: torch.Tensor, out: torch.Tensor) -> None:
        total = self._decode(wires[0], *out.shape)
        for wire in wires[1:]:
            total += self._decode(wire, *out.shape)
        out.copy_(total).masked_fill_(total.isnan(), torch.nan)  # conversions give NaNs of different bits

    def _decode(self, wire: torch.Tensor, rows: int, features: int) -> torch.Tensor:
        views = self.split(wire, rows, features)
        codes = packing.load(views, "plane", rows, features, self.bits)
        spikes = views["spikes"].view(torch.bfloat16).view(2, -1).float()
        positions = packing.load(views, "position", *spikes.shape, self.places)
        zeros = None if self.sym else views["zeros"]
        values = dequantize(_grouped(codes, self.group), views["scales"], zeros, spikes, positions, self.bits)
        return _ungrouped(values, rows, features)


def quantize(
    x: torch.Tensor, inside: torch.Tensor, bits: int, sym: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """x [groups, group] fp32, inside: False where it is padding -> codes uint8 [groups, group], scales and zeros uint8
    [groups], spikes bf16 and positions uint8 [2, groups]."""
    as_bf16 = x.bfloat16().view(torch.int16).int()
    ordered = as_bf16 ^ ((as_bf16 >> 15) & 0x7FFF)  # sorts like the values
    low, lo, low_at = _two_smallest(ordered, inside)
    high, hi, high_at = _two_smallest(~ordered, inside)
    high, hi = ~high, ~hi
    lo, hi = torch.where(lo > hi, low, lo), torch.where(lo > hi, low, hi)  # where there are no others
    finite = (low > -0x7F81) & (high < 0x7F80)  # the infinities, ordered
    low, high, lo, hi = (_from_ordered(v) for v in (low, high, lo, hi))
    finite &= (hi - low).isfinite()
    low, high, lo, hi = (v.where(finite, 0.0) for v in (low, high, lo, hi))

    half, top = 2 ** (bits - 1), 2**bits - 1
    if sym:
        zeros, zero = None, torch.zeros_like(low)
        ideal = quotient(torch.where(-lo >= hi, lo, hi), -(half + 0.5))
    else:
        start = torch.where(lo == low, lo, lo + (hi - lo) * 2.0 ** -(bits + 1))
        offset = start - _anchor(low, high)
        zeros = _shorten(offset, True, _exponent(low, high) - 14, offset < 0)
        zero = _zero(zeros, low, high)
        ideal = (hi - zero).clamp(min=0) / (top + (hi != high).float() / 2)
    scales = _shorten(ideal, sym, _exponent(low, high) - 13 - bits, finite)
    scale = _lengthen(scales, sym, _exponent(low, high) - 13 - bits)
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
    codes = torch.round((x - zero[:, None]) * inverse[:, None]) + (half if sym else 0)

    place, positions = torch.arange(x.shape[1], device=x.device), torch.stack([low_at, high_at]).where(finite, 0)
    rest = finite[:, None] & (place != low_at[:, None]) & (place != high_at[:, None])
    codes = codes.clamp(0, top).where(rest, 0.0).to(torch.uint8)
    spikes = torch.stack([low, high]).bfloat16().masked_fill(~finite, torch.nan)  # converted, NaNs would vary
    return codes, scales, zeros, spikes, positions.to(torch.uint8)


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    spikes: torch.Tensor,
    positions: torch.Tensor,
    bits: int,
) -> torch.Tensor:
    """The inverse of `quantize`, up to the rounding: -> fp32 [groups, group]."""
    sym = zeros is None
    spikes = spikes.masked_fill(~spikes.isfinite().all(0), torch.nan)
    low, high = spikes
    scale = _lengthen(scales, sym, _exponent(low, high) - 13 - bits)
    values = (codes.float() - (2 ** (bits - 1) if sym else 0)) * scale[:, None]
    if not sym:
        values = _zero(zeros, low, high)[:, None] + values
    low, high = low[:, None], high[:, None]
    values = torch.where(values < low, low, values)
    values = torch.where(high < values, high, values)
    place = torch.arange(codes.shape[1], device=codes.device)
    values = torch.where(place == positions[0][:, None], low, values)
    values = torch.where(place == positions[1][:, None], high, values)
    return values.masked_fill(low.isnan(), torch.nan)


def _two_smallest(ordered: torch.Tensor, inside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The smallest of each group, its first one's position left out the smallest of the others, and that position."""
    keys = ordered * 256 + torch.arange(ordered.shape[1], device=ordered.device, dtype=torch.int32)
    keys = keys.masked_fill(~inside, 2**31 - 1)
    first = keys.amin(1)
    second = keys.masked_fill(keys == first[:, None], 2**31 - 1).amin(1)
    return first >> 8, second >> 8, first & 255


def _from_ordered(ordered: torch.Tensor) -> torch.Tensor:
    return ((ordered ^ ((ordered >> 31) & 0x7FFF)) << 16).view(torch.float32)


def _exponent(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Of the larger magnitude, as fp32 stores it."""
    return torch.maximum(low.abs(), high.abs()).view(torch.int32) >> 23


def _anchor(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return torch.where(low > 0, low, torch.where(high < 0, high, 0.0))


def _zero(zeros: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    zero = _anchor(low, high) + _lengthen(zeros, True, _exponent(low, high) - 14)
    return torch.where(zero < low, low, zero)


def _shorten(value: torch.Tensor, signed: bool, exponent: torch.Tensor, away: torch.Tensor) -> torch.Tensor:
    """fp32 -> short floats uint8, rounded away from 0 where `away` says so, else towards 0.

    exponent: fp32's stored exponent for that of 0 here. No value is too large, and NaN does not occur.
    """
    mantissa = 3 if signed else 4
    one = 1 << (23 - mantissa)
    rounded = (value.abs().view(torch.int32) + away.int() * (one - 1)) >> (23 - mantissa)
    code = torch.maximum(rounded - (exponent << mantissa), away.int()) | ((value < 0).int() << 7)
    return torch.where(rounded < 1 << mantissa, 0, code).to(torch.uint8)  # below fp32's normal numbers


def _lengthen(short: torch.Tensor, signed: bool, exponent: torch.Tensor) -> torch.Tensor:
    """The inverse of `_shorten`, of any bytes: below fp32's normal numbers it is 0, beyond them infinite."""
    code = short.int() & (127 if signed else 255)
    bits = (code << (20 if signed else 19)) + (exponent << 23)
    value = torch.where((code > 0) & (bits >= SMALLEST_NORMAL), bits.clamp(max=INFINITY), 0).view(torch.float32)
    return torch.where(short > 127, -value, value) if signed else value


def _grouped(x: torch.Tensor, group: int) -> torch.Tensor:
    """[rows, features] -> [groups, group], the last group of each row padded with zeros."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % group)).view(-1, group)


def _ungrouped(groups: torch.Tensor, rows: int, features: int) -> torch.Tensor:
    return groups.view(rows, -1)[:, :features]
