"""An independent reading of docs/wire-format.md, integers with spikes: plain Python on single values and fractions."""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from functools import cache

import numpy as np

from tests.codecs.oracle import PLANES, aligned, bf16, to_bf16

SMALLEST, LARGEST = Fraction(2) ** -126, Fraction(2) ** 128


def exponent(low: np.float32, high: np.float32) -> int:
    bits = struct.unpack("<I", struct.pack("<f", max(abs(low), abs(high))))[0]
    return bits >> 23


def long(byte: int, signed: bool, base: int) -> np.float32:
    """The number a byte stands for; base: the true exponent of k = 0."""
    mantissa = 3 if signed else 4
    code = byte % 128 if signed else byte
    value = Fraction(2) ** (base + code // 2**mantissa) * (1 + Fraction(code % 2**mantissa, 2**mantissa))
    if code == 0 or value < SMALLEST:
        value = 0
    number = np.float32(math.inf if value >= LARGEST else float(value))
    return -number if signed and byte >= 128 else number


@cache
def table(signed: bool, base: int) -> dict[Fraction, int]:
    mantissa = 3 if signed else 4
    codes = [divmod(code, 2**mantissa) for code in range(1, 2 ** (4 + mantissa))]
    return {Fraction(2) ** (base + k) * (1 + Fraction(f, 2**mantissa)): k * 2**mantissa + f for k, f in codes}


def short(number: np.float32, signed: bool, base: int, away: bool) -> int:
    """The byte of a number, found by looking for what it is rounded to among those that exist."""
    value, mantissa = abs(Fraction(float(number))), 3 if signed else 4
    if value == 0:
        return 0
    power = max(math.frexp(float(value))[1] - 1, -126)
    unit = Fraction(2) ** (power - mantissa)
    rounded = (math.ceil(value / unit) if away else math.floor(value / unit)) * unit
    if rounded < SMALLEST:
        return 0
    codes = table(signed, base)
    smallest = next(iter(codes))
    if rounded < smallest:
        if not away:
            return 0
        rounded = smallest
    return codes[rounded] + (128 if number < 0 else 0)


def zero_of(byte: int, low: np.float32, high: np.float32) -> np.float32:
    anchor = low if low > 0 else high if high < 0 else np.float32(0)
    return max(np.float32(anchor + long(byte, True, exponent(low, high) - 14 - 127)), low)


def encode_group(x: list[np.float32], bits: int, sym: bool):
    """-> codes, scale and zero as bytes, min, max, their positions."""
    broken = [0] * len(x), 0, 0, np.float32(np.nan), np.float32(np.nan), 0, 0
    rounded = [to_bf16(v) if math.isfinite(v) else v for v in x]
    if not all(math.isfinite(v) for v in rounded):
        return broken
    rank = [(float(v), 0 if np.signbit(v) else 1) for v in rounded]
    low_at, high_at = rank.index(min(rank)), rank.index(max(rank))
    low, high = rounded[low_at], rounded[high_at]
    others = sorted((rank[i], i) for i in range(len(x)) if i not in (low_at, high_at))
    lo, hi = (rounded[others[0][1]], rounded[others[-1][1]]) if others else (low, low)
    if not math.isfinite(np.float32(hi - low)):
        return broken
    e, half, top = exponent(low, high) - 127, 2 ** (bits - 1), 2**bits - 1
    if sym:
        zero_byte, zero = 0, np.float32(0)
        scale_byte = short((lo if -lo >= hi else hi) / np.float32(-(half + 0.5)), True, e - 13 - bits, True)
    else:
        start = lo if lo == low else lo + np.float32(np.float32(hi - lo) * np.float32(2.0 ** -(bits + 1)))
        anchor = low if low > 0 else high if high < 0 else np.float32(0)
        offset = np.float32(start - anchor)
        zero_byte = short(offset, True, e - 14, bool(offset < 0))
        zero = zero_of(zero_byte, low, high)
        steps = np.float32(top if hi == high else top + 0.5)
        scale_byte = short(max(np.float32(hi - zero), np.float32(0)) / steps, False, e - 13 - bits, True)
    scale = long(scale_byte, sym, e - 13 - bits)
    inverse = np.float32(0) if scale == 0 else np.float32(1) / scale
    codes = []
    for i, value in enumerate(x):
        step = round(float(np.float32(np.float32(value - zero) * inverse)))  # Python rounds half to even
        codes.append(0 if i in (low_at, high_at) else max(0, min(top, step + (half if sym else 0))))
    return codes, scale_byte, zero_byte, low, high, low_at, high_at


def planes(rows: list[list[int]], bits: int) -> bytes:
    wire, shift = b"", 0
    for width in PLANES[bits]:
        plane = bytearray()
        for codes in rows:
            codes = codes + [0] * (-len(codes) % 8)
            for block in (codes[i : i + 32] for i in range(0, len(codes), 32)):
                size = len(block) * width // 8
                for j in range(size):
                    plane.append(sum((code >> shift) % 2**width << k * width for k, code in enumerate(block[j::size])))
        wire += bytes(plane).ljust(aligned(len(plane)), b"\0")
        shift += width
    return wire


def encode(x: np.ndarray, bits: int, group: int, sym: bool) -> bytes:
    """x [rows, features] float32 -> the wire."""
    rows, groups = [], []
    for row in x:
        parts = [encode_group(list(row[i : i + group]), bits, sym) for i in range(0, len(row), group)]
        rows.append([code for part in parts for code in part[0]])
        groups += parts
    _, scales, zeros, lows, highs, low_at, high_at = zip(*groups, strict=True)
    spikes = b"".join(b"\xc0\x7f" if math.isnan(v) else struct.pack("<f", v)[2:] for v in lows + highs)
    sections = [bytes(scales), *([] if sym else [bytes(zeros)]), spikes]
    wire = planes(rows, bits) + b"".join(section.ljust(aligned(len(section)), b"\0") for section in sections)
    return wire + planes([list(low_at), list(high_at)], int(math.log2(group)))


def unplanes(wire: bytes, rows: int, values: int, bits: int) -> tuple[list[list[int]], bytes]:
    """-> codes, and what follows the planes."""
    codes, shift, padded = [[0] * values for _ in range(rows)], 0, -(-values // 8) * 8
    for width in PLANES[bits]:
        for row in range(rows):
            for i in range(values):
                size = min(32, padded - i // 32 * 32) * width // 8
                byte = wire[row * padded * width // 8 + i // 32 * 4 * width + i % 32 % size]
                codes[row][i] += (byte >> i % 32 // size * width) % 2**width << shift
        wire, shift = wire[aligned(rows * padded * width // 8) :], shift + width
    return codes, wire


def decode(wire: bytes, rows: int, features: int, bits: int, group: int, sym: bool) -> np.ndarray:
    """-> float32 [rows, features]."""
    per_row = -(-features // group)
    count = rows * per_row
    codes, wire = unplanes(wire, rows, features, bits)
    scales, wire = wire[:count], wire[aligned(count) :]
    zeros, wire = (b"", wire) if sym else (wire[:count], wire[aligned(count) :])
    spikes = [bf16(wire[2 * i], wire[2 * i + 1]) for i in range(2 * count)]
    positions, wire = unplanes(wire[aligned(4 * count) :], 2, count, int(math.log2(group)))
    assert not wire
    out = np.zeros((rows, features), np.float32)
    for row in range(rows):
        for i in range(features):
            g = row * per_row + i // group
            low, high = spikes[g], spikes[count + g]
            if not (math.isfinite(low) and math.isfinite(high)):
                out[row, i] = np.nan
                continue
            with np.errstate(over="ignore"):
                scale = long(scales[g], sym, exponent(low, high) - 13 - bits - 127)
                value = np.float32(codes[row][i] - (2 ** (bits - 1) if sym else 0)) * scale
                if not sym:
                    value = np.float32(zero_of(zeros[g], low, high) + value)
            value = low if value < low else value
            value = high if value > high else value
            value = low if positions[0][g] == i % group else value
            out[row, i] = high if positions[1][g] == i % group else value
    return out
