"""An independent reading of docs/wire-format.md: plain Python on single values, sharing no code with the package."""

from __future__ import annotations

import math
import struct

import numpy as np

PLANES = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}


def bf16(low: int, high: int) -> np.float32:
    return np.frombuffer(bytes([0, 0, low, high]), np.float32)[0]


def to_bf16(value: float, down: bool = False) -> np.float32:
    """Round a finite fp32 value to bf16 by looking at both neighbours."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    inward = struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]
    if inward == value:
        return np.float32(inward)
    outward_bits = (bits & 0xFFFF0000) + 0x10000
    outward = struct.unpack("<f", struct.pack("<I", outward_bits))[0]
    if down:
        return np.float32(min(inward, outward))
    if math.isinf(outward):
        outward = math.copysign(2.0**128, value)
    near = min(
        (inward, outward), key=lambda candidate: (abs(candidate - value), (bits >> 16) % 2 == (candidate == inward))
    )
    return np.float32(near) if abs(near) < 2.0**128 else np.float32(math.copysign(np.inf, value))


def aligned(size: int) -> int:
    return (size + 15) // 16 * 16


def encode_group(values: list[np.float32], bits: int, sym: bool):
    """-> codes, scale, zero (None if sym); scale NaN for a group that cannot be represented."""
    nan = np.float32(np.nan)
    if not all(math.isfinite(v) for v in values):
        return [0] * len(values), nan, None if sym else nan
    lo, hi = np.float32(min(values)) + np.float32(0), np.float32(max(values)) + np.float32(0)
    half, top = 2 ** (bits - 1), 2**bits - 1
    if sym:
        zero, scale = None, to_bf16((lo if -lo >= hi else hi) / np.float32(-half))
    else:
        zero = to_bf16(lo, down=True)
        with np.errstate(over="ignore", invalid="ignore"):
            span = np.float32(hi - zero)
        if not math.isfinite(span):
            return [0] * len(values), nan, nan
        scale = to_bf16(np.float32(span / np.float32(top)))
    if abs(scale) < 2.0**-126:
        return [half if sym else 0] * len(values), np.float32(0), zero
    inverse = np.float32(1) / scale
    codes = []
    for value in values:
        step = np.float32((value if sym else np.float32(value - zero)) * inverse)
        codes.append(max(0, min(top, round(float(step)) + (half if sym else 0))))  # Python rounds half to even
    return codes, scale, zero


def encode(x: np.ndarray, bits: int, group: int, sym: bool) -> bytes:
    """x [rows, features] float32 -> the wire."""
    features = x.shape[1]
    all_codes, scales, zeros = [], [], []
    for row in x:
        codes = []
        for start in range(0, features, group):
            part, scale, zero = encode_group(list(row[start : start + group]), bits, sym)
            codes += part
            scales.append(scale)
            zeros.append(zero)
        all_codes.append(codes + [0] * (-features % 8))
    wire, shift = b"", 0
    for width in PLANES[bits]:
        plane = bytearray()
        for codes in all_codes:
            for start in range(0, len(codes), 32):
                block = codes[start : start + 32]
                size = len(block) * width // 8
                for j in range(size):
                    byte = 0
                    for k in range(8 // width):
                        byte |= (block[j + k * size] >> shift) % 2**width << (k * width)
                    plane.append(byte)
        wire += bytes(plane).ljust(aligned(len(plane)), b"\0")
        shift += width
    for section in [scales] if sym else [scales, zeros]:
        raw = b"".join(b"\xc0\x7f" if math.isnan(v) else struct.pack("<f", v)[2:] for v in section)
        wire += raw.ljust(aligned(len(raw)), b"\0")
    return wire


def decode(wire: bytes, rows: int, features: int, bits: int, group: int, sym: bool) -> np.ndarray:
    """-> float32 [rows, features]."""
    padded, groups = -(-features // 8) * 8, -(-features // group)
    codes = np.zeros((rows, features), int)
    at = shift = 0
    for width in PLANES[bits]:
        for row in range(rows):
            base = at + row * padded * width // 8
            for value in range(features):
                start = value // 32 * 32
                size = min(32, padded - start) * width // 8
                j, k = (value - start) % size, (value - start) // size
                byte = wire[base + start * width // 8 + j]
                codes[row, value] |= (byte >> (k * width)) % 2**width << shift
        at += aligned(rows * padded * width // 8)
        shift += width
    out = np.zeros((rows, features), np.float32)
    zeros_at = at + aligned(2 * rows * groups)
    with np.errstate(over="ignore", invalid="ignore"):
        for row in range(rows):
            for value in range(features):
                index = 2 * (row * groups + value // group)
                scale = bf16(wire[at + index], wire[at + index + 1])
                if sym:
                    out[row, value] = np.float32(codes[row, value] - 2 ** (bits - 1)) * scale
                else:
                    zero = bf16(wire[zeros_at + index], wire[zeros_at + index + 1])
                    out[row, value] = zero + np.float32(np.float32(codes[row, value]) * scale)
    return out
