"""An independent reading of docs/wire-format.md for the float formats: plain Python on single values.

Shares no code with the package. The values of all codes are written out, as in the tables of OCP's OFP8 and MX
documents; a number is rounded by looking for the nearest entry.
"""

from __future__ import annotations

import bisect
import math
import struct
from dataclasses import dataclass

import numpy as np

from tests.codecs import oracle

NAN = math.nan

E4M3_POSITIVE = [
    0.0, 0.001953125, 0.00390625, 0.005859375, 0.0078125, 0.009765625, 0.01171875, 0.013671875,
    0.015625, 0.017578125, 0.01953125, 0.021484375, 0.0234375, 0.025390625, 0.02734375, 0.029296875,
    0.03125, 0.03515625, 0.0390625, 0.04296875, 0.046875, 0.05078125, 0.0546875, 0.05859375,
    0.0625, 0.0703125, 0.078125, 0.0859375, 0.09375, 0.1015625, 0.109375, 0.1171875,
    0.125, 0.140625, 0.15625, 0.171875, 0.1875, 0.203125, 0.21875, 0.234375,
    0.25, 0.28125, 0.3125, 0.34375, 0.375, 0.40625, 0.4375, 0.46875,
    0.5, 0.5625, 0.625, 0.6875, 0.75, 0.8125, 0.875, 0.9375,
    1.0, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875,
    2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75,
    4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5,
    8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0,
    16.0, 18.0, 20.0, 22.0, 24.0, 26.0, 28.0, 30.0,
    32.0, 36.0, 40.0, 44.0, 48.0, 52.0, 56.0, 60.0,
    64.0, 72.0, 80.0, 88.0, 96.0, 104.0, 112.0, 120.0,
    128.0, 144.0, 160.0, 176.0, 192.0, 208.0, 224.0, 240.0,
    256.0, 288.0, 320.0, 352.0, 384.0, 416.0, 448.0, NAN,
]  # fmt: skip
E2M3_POSITIVE = [
    0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875,
    1.0, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875,
    2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75,
    4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5,
]  # fmt: skip
E2M1_POSITIVE = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def with_negatives(positive: list[float]) -> list[float]:
    """The sign is the top bit."""
    return positive + [-value for value in positive]


TABLES = {
    "e4m3": with_negatives(E4M3_POSITIVE),
    "e2m3": with_negatives(E2M3_POSITIVE),
    "e2m1": with_negatives(E2M1_POSITIVE),
}


@dataclass(frozen=True)
class Format:
    element: str
    scale: str
    block: int
    highest: int  # exponent of the element's largest value

    @property
    def table(self) -> list[float]:
        return TABLES[self.element]

    @property
    def bits(self) -> int:
        return len(self.table).bit_length() - 1

    @property
    def largest(self) -> float:
        return max(v for v in self.table if v == v)


def format_of(spec: str) -> Format:
    name, _, group = spec.partition(":g")
    if name == "fp8":
        return Format("e4m3", "bf16", int(group or 128), 8)
    return {
        "mxfp8": Format("e4m3", "e8m0", 32, 8),
        "mxfp6": Format("e2m3", "e8m0", 32, 2),
        "mxfp4": Format("e2m1", "e8m0", 32, 2),
        "nvfp4": Format("e2m1", "e4m3", 16, 2),
    }[name]


def nearest(value: float, table: list[float]) -> int:
    """Code of the entry nearest to a finite value, of two equally near ones the even code; beyond the largest: it."""
    positive = [v for v in table[: len(table) // 2] if v == v]
    magnitude = abs(value)
    above = bisect.bisect_left(positive, magnitude)
    candidates = {max(above - 1, 0), min(above, len(positive) - 1)}
    code = min(candidates, key=lambda c: (abs(positive[c] - magnitude), c % 2))
    return code + (len(table) // 2 if math.copysign(1, value) < 0 else 0)


def encode_block(values: list[np.float32], form: Format, row_scale: np.float32):
    """-> codes, and the scale's bytes."""
    if not all(math.isfinite(v) for v in values):
        return [0] * len(values), {"bf16": b"\xc0\x7f", "e8m0": b"\xff", "e4m3": b"\x7f"}[form.scale]
    amax = np.float32(max(abs(v) for v in values))
    if form.scale == "e8m0":
        exponent = max(-127, math.frexp(amax)[1] - 1 - form.highest) if amax else -127
        codes = [nearest(math.ldexp(float(v), -exponent), form.table) for v in values]
        return codes, bytes([exponent + 127])
    if form.scale == "bf16":
        scale = amax / np.float32(448)
        scale = np.float32(0) if scale < 2.0**-126 else oracle.to_bf16(scale)
        raw = struct.pack("<f", scale)[2:]
    else:
        code = nearest(amax / (row_scale * np.float32(6)), TABLES["e4m3"]) if row_scale else 0
        scale = np.float32(TABLES["e4m3"][code]) * row_scale
        raw = bytes([code])
    inverse = np.float32(1) / scale if scale else np.float32(0)
    return [nearest(v * inverse, form.table) for v in values], raw


def encode(x: np.ndarray, spec: str) -> bytes:
    """x [rows, features] float32 -> the wire."""
    form, features = format_of(spec), x.shape[1]
    all_codes, scales, row_scales = [], b"", b""
    for row in x:
        blocks = [list(row[start : start + form.block]) for start in range(0, features, form.block)]
        finite = [abs(v) for block in blocks if all(math.isfinite(v) for v in block) for v in block]
        row_scale = np.float32(max(finite, default=0)) / np.float32(448 * 6)
        row_scale = np.float32(0) if row_scale < 2.0**-117 else row_scale
        codes = []
        for block in blocks:
            part, raw = encode_block(block, form, row_scale)
            codes += part
            scales += raw
        all_codes.append(codes + [0] * (-features % 8))
        row_scales += struct.pack("<f", row_scale)
    wire, shift = b"", 0
    for width in oracle.PLANES[form.bits]:
        plane = bytearray()
        for codes in all_codes:
            for start in range(0, len(codes), 32):
                part = codes[start : start + 32]
                size = len(part) * width // 8
                plane += bytes(
                    sum((part[j + k * size] >> shift) % 2**width << k * width for k in range(8 // width))
                    for j in range(size)
                )
        wire += bytes(plane).ljust(oracle.aligned(len(plane)), b"\0")
        shift += width
    for section in [scales, row_scales] if form.scale == "e4m3" else [scales]:
        wire += section.ljust(oracle.aligned(len(section)), b"\0")
    return wire


def decode(wire: bytes, rows: int, features: int, spec: str) -> np.ndarray:
    """-> float32 [rows, features]."""
    form, padded = format_of(spec), -(-features // 8) * 8
    blocks = -(-features // form.block)
    codes = np.zeros((rows, features), int)
    at = shift = 0
    for width in oracle.PLANES[form.bits]:
        for row in range(rows):
            for value in range(features):
                start = value // 32 * 32
                size = min(32, padded - start) * width // 8
                j, k = (value - start) % size, (value - start) // size
                byte = wire[at + row * padded * width // 8 + start * width // 8 + j]
                codes[row, value] |= (byte >> (k * width)) % 2**width << shift
        at += oracle.aligned(rows * padded * width // 8)
        shift += width
    rows_at = at + oracle.aligned(rows * blocks)
    out = np.zeros((rows, features), np.float32)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for row in range(rows):
            for value in range(features):
                block = row * blocks + value // form.block
                element = np.float32(form.table[codes[row, value]])
                if form.scale == "e8m0":
                    byte = wire[at + block]
                    exact = float(element) * 2.0 ** (byte - 127) if byte < 255 else NAN
                    out[row, value] = np.float32(exact)
                elif form.scale == "bf16":
                    out[row, value] = element * oracle.bf16(*wire[at + 2 * block : at + 2 * block + 2])
                else:
                    row_scale = np.frombuffer(wire[rows_at + 4 * row : rows_at + 4 * row + 4], "<f4")[0]
                    out[row, value] = element * (np.float32(TABLES["e4m3"][wire[at + block]]) * row_scale)
    return out
