"""An independent reading of docs/wire-format.md, Gaussian codebook: single fp32 numbers, none of the package's code."""

from __future__ import annotations

import math
import re
import struct
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from tests.codecs.oracle import PLANES, aligned, bf16, to_bf16

PAGE = (Path(__file__).parents[2] / "docs" / "wire-format.md").read_text()
SIGN_BYTES = bytes.fromhex(re.search(r"`([0-9a-f]{64})`", PAGE)[1])
ONE, NAN = np.float32(1), np.float32(np.nan)


@cache
def levels(bits: int) -> list[np.float32]:
    """The positive levels, as the page lists them."""
    listed = re.search(rf"\n{bits} bits\n((?:  [\d. ]+\n)+)", PAGE)[1]
    return [np.float32(number) for number in listed.split()]


def butterfly(x: list[np.float32]) -> list[np.float32]:
    """The last of its steps joins two halves, so it is that of both halves, then theirs."""
    if len(x) == 1:
        return x
    a, b = butterfly(x[: len(x) // 2]), butterfly(x[len(x) // 2 :])
    return [p + q for p, q in zip(a, b)] + [p - q for p, q in zip(a, b)]


def signed(x: list[np.float32]) -> list[np.float32]:
    return [-v if SIGN_BYTES[i // 8] >> (i % 8) & 1 else v for i, v in enumerate(x)]


def rotated(x: list[np.float32], back: bool = False) -> list[np.float32]:
    """One group, or with `back` the inverse."""
    n = len(x)
    if n < 32:
        return list(x)
    x = list(x) if back else signed(x)
    p = 2 ** int(math.log2(n))
    if p == n:
        x = butterfly(x)
        x = [v * (ONE / np.float32(n)) for v in x] if back else x
    else:
        factor = np.float32(1 / math.sqrt(p))
        first, last = slice(0, p), slice(n - p, n)
        if back:
            x[last] = signed([v * factor for v in butterfly(x[last])])
            x[first] = [v * factor for v in butterfly(x[first])]
        else:
            x[first] = [v * factor for v in butterfly(x[first])]
            x[last] = [v * factor for v in butterfly(signed(x[last]))]
    return signed(x) if back else x


def total(terms: list[np.float32]) -> np.float32:
    sums = [np.float32(0)] * 32
    for i, term in enumerate(terms):
        sums[i % 32] = sums[i % 32] + term
    for half in (16, 8, 4, 2, 1):
        sums = [sums[i] + sums[i + half] for i in range(half)]
    return sums[0]


def storable(scale: np.float32) -> np.float32:
    scale = to_bf16(scale) if math.isfinite(scale) else scale
    return NAN if math.isinf(scale) else np.float32(0) if scale < 2.0**-126 else scale


def scale_bits(scale: np.float32) -> int:
    return 0x7FC0 if math.isnan(scale) else struct.unpack("<I", struct.pack("<f", scale))[0] >> 16


def encode_group(z: list[np.float32], bits: int, hides: bool) -> tuple[list[int], np.float32]:
    """A rotated group -> codes, scale."""
    half, level = 2 ** (bits - 1), levels(bits)
    thresholds = [(a + b) * np.float32(0.5) for a, b in pairwise(level)]
    scale, codes, w = NAN, [half] * len(z), z
    if all(math.isfinite(v) for v in z):
        peak = float(max(abs(v) for v in z))
        e = min(126, max(-126, math.frexp(peak)[1] - 1)) if peak else -126
        down, up = np.float32(2.0**-e), np.float32(2.0**e)
        w = [v * down for v in z]
        rms = np.sqrt(total([v * v for v in w]) / np.float32(len(w)))
        factor = np.float32(0)
        if hides:
            scale = storable(rms * up)
            factor = ONE / (scale * down) if scale > 0 else factor
        elif rms > 0:
            factor = ONE / rms
        u = [abs(v) * factor for v in w]
        k = [sum(threshold < v for threshold in thresholds) for v in u]
        if not hides:
            best = total([abs(v) * level[i] for v, i in zip(w, k)]) / total([level[i] * level[i] for i in k])
            scale = storable(best * up)
        if scale > 0:
            codes = [half - 1 - i if v < 0 else half + i for v, i in zip(w, k)]
    if hides:
        for bit in range(16):
            places = range(bit, 256, 16)
            if sum(codes[i] for i in places) % 2 == scale_bits(scale) >> bit & 1:
                continue
            if scale > 0:
                moves = [other_code(u[i], k[i], w[i] < 0, codes[i], level) for i in places]
                cheapest = min(range(16), key=lambda j: moves[j][0])  # the first of equals
                codes[places[cheapest]] = moves[cheapest][1]
            else:
                codes[bit] = half + 1
    return codes, scale


def other_code(u, k: int, negative: bool, code: int, level: list[np.float32]) -> tuple[np.float32, int]:
    up = u > level[k] and k < len(level) - 1
    other = level[k + 1] if up else level[k - 1] if k else -level[0]
    return abs(other - level[k]) * abs(u - (other + level[k]) * np.float32(0.5)), code + (1 if up != negative else -1)


def planes(rows: list[list[int]], bits: int) -> bytes:
    """Codes -> the sections of their planes, padded."""
    wire, shift = b"", 0
    for width in PLANES[bits]:
        plane = bytearray()
        for codes in rows:
            codes = codes + [0] * (-len(codes) % 8)
            for start in range(0, len(codes), 32):
                block = [code >> shift & (2**width - 1) for code in codes[start : start + 32]]
                size = len(block) * width // 8
                plane += bytes(
                    sum(block[j + n * size] << n * width for n in range(8 // width)) for j in range(size)
                )  # fmt: skip
        wire += bytes(plane).ljust(aligned(len(plane)), b"\0")
        shift += width
    return wire


def unplanes(wire: bytes, rows: int, features: int, bits: int) -> tuple[list[list[int]], bytes]:
    """-> codes, the rest of the wire."""
    padded = -(-features // 8) * 8
    codes, shift = [[0] * features for _ in range(rows)], 0
    for width in PLANES[bits]:
        for row in range(rows):
            for i in range(features):
                start = i // 32 * 32
                size = min(32, padded - start) * width // 8
                byte = wire[(row * padded + start) * width // 8 + (i - start) % size]
                codes[row][i] |= (byte >> (i - start) // size * width & (2**width - 1)) << shift
        wire = wire[aligned(rows * padded * width // 8) :]
        shift += width
    return codes, wire


def groups(features: int, group: int) -> list[slice]:
    return [slice(start, min(start + group, features)) for start in range(0, features, group)]


def encode(x: np.ndarray, bits: int, group: int, rotates: bool = True) -> bytes:
    """x [rows, features] float32 -> the wire; rotates=False: of rows that are rotated already."""
    all_codes, scales = [], b""
    with np.errstate(all="ignore"):
        for row in x:
            codes = []
            for place in groups(len(row), group):
                z, hides = list(row[place]), place.stop - place.start == 256
                part, scale = encode_group(rotated(z) if rotates else z, bits, hides)
                codes += part
                scales += b"" if hides else scale_bits(scale).to_bytes(2, "little")
            all_codes.append(codes)
    return planes(all_codes, bits) + scales.ljust(aligned(len(scales)), b"\0")


def decode(wires: list[bytes], rows: int, features: int, bits: int, group: int, rotates: bool = True) -> np.ndarray:
    """The sum of the wires' values, float32 [rows, features]; rotates=False: left rotated."""
    half, level = 2 ** (bits - 1), levels(bits)
    out = np.zeros((rows, features), np.float32)
    parsed = [unplanes(wire, rows, features, bits) for wire in wires]
    at = 0  # scales
    with np.errstate(all="ignore"):
        for row in range(rows):
            for place in groups(features, group):
                hides, sums = place.stop - place.start == 256, None
                for codes, rest in parsed:
                    part = codes[row][place]
                    stored = sum(sum(part[i::16]) % 2 << i for i in range(16)) if hides else None
                    pair = stored.to_bytes(2, "little") if hides else rest[at : at + 2]
                    scale = bf16(*pair)
                    values = [level[c - half] * scale if c >= half else -(level[half - 1 - c] * scale) for c in part]
                    sums = values if sums is None else [a + b for a, b in zip(sums, values)]
                at += 0 if hides else 2
                out[row, place] = rotated(sums, back=True) if rotates else sums
    return out
