"""An independent reading of docs/wire-format.md for trellis codes: plain Python on fp32 scalars, the page's own levels.

Shares no code with the package. The search is the textbook's: every state keeps its cost and its whole path.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import struct
from functools import lru_cache
from pathlib import Path

import numpy as np

from tests.codecs import oracle

PAGE = Path(__file__).parents[2] / "docs" / "wire-format.md"
F = np.float32


@lru_cache
def levels(bits: int) -> list[F]:
    """All 2**(bits + 1) levels, ascending, from the page's list of the positive ones."""
    section = PAGE.read_text().split("## Trellis codes")[1]
    numbers = re.search(rf"^gauss{bits}\s+([\d.\s]+)", section, re.MULTILINE)[1].split()
    assert len(numbers) == 2**bits
    return [-F(number) for number in reversed(numbers)] + [F(number) for number in numbers]


@lru_cache
def negated() -> list[bool]:
    digest = hashlib.sha256(b"megatron_lowbit").digest()
    return [bool(digest[i // 8] >> i % 8 & 1) for i in range(256)]


def butterfly(part: list[F]) -> list[F]:
    part, h = list(part), 1
    while h < len(part):
        for i in range(len(part)):
            if not i // h % 2:
                part[i], part[i + h] = part[i] + part[i + h], part[i] - part[i + h]
        h *= 2
    return part


def signed(x: list[F]) -> list[F]:
    return [-v if negative else v for v, negative in zip(x, negated(), strict=False)]


def rotate(x: list[F], backwards: bool) -> list[F]:
    """A whole group; groups below 32 stay as they are."""
    n = len(x)
    if n < 32:
        return list(x)
    p, z = 2 ** int(math.log2(n)), list(x) if backwards else signed(x)
    if p == n:
        z = [v * F(1 / n) for v in butterfly(z)] if backwards else butterfly(z)
    else:
        for last in (True, False) if backwards else (False, True):
            part = slice(n - p, n) if last else slice(0, p)
            turned = butterfly(signed(z[part]) if last and not backwards else z[part])
            turned = [v * F(1 / math.sqrt(p)) for v in turned]
            z[part] = signed(turned) if last and backwards else turned
    return signed(z) if backwards else z


def total(terms: list[F]) -> F:
    """32 running sums of every 32nd term, of which then the upper half is added to the lower one."""
    sums = [F(0)] * 32
    for i, term in enumerate(terms):
        sums[i % 32] = term if i < 32 else sums[i % 32] + term
    while len(sums) > 1:
        half = len(sums) // 2
        sums = [a + b for a, b in zip(sums[:half], sums[half:], strict=True)]
    return sums[0]


def nearest(u: F, book: list[F], subset: int) -> tuple[int, F]:
    """The number within its subset of the level that u gets, and the squared distance."""
    own = book[subset::4]
    k = sum(bool((a + b) * F(0.5) < u) for a, b in itertools.pairwise(own))
    difference = u - own[k]
    return k, difference * difference


def viterbi(values: list[F], book: list[F]) -> tuple[list[int], F]:
    """The codes of the best path, and its cost."""
    paths: dict[int, tuple[F, list[int]]] = {0: (F(0), [])}
    for u in values:
        extended: dict[int, tuple[F, list[int]]] = {}
        near = [nearest(u, book, subset) for subset in range(4)]
        for state, (cost, codes) in sorted(paths.items()):
            for low in (0, 1):
                k, distance = near[2 * (low ^ state // 2) + state % 2]
                new = 2 * (state % 2) + low
                if new not in extended or cost + distance < extended[new][0]:
                    extended[new] = cost + distance, [*codes, 2 * k + low]
        paths = extended
    best = min(sorted(paths), key=lambda state: paths[state][0])
    return paths[best][1], paths[best][0]


def level_numbers(codes: list[int]) -> list[int]:
    lows = [0, 0, *(code % 2 for code in codes)]
    return [4 * (code // 2) + 2 * (lows[t + 2] ^ lows[t]) + lows[t + 1] for t, code in enumerate(codes)]


def normalized(z: list[F]) -> tuple[list[F], F, int]:
    """w, its root mean square and the exponent e of a finite group."""
    largest = max(abs(v) for v in z)
    e = min(max(math.frexp(largest)[1] - 1, -126), 126) if largest else -126
    w = [F(math.ldexp(float(v), -e)) for v in z]  # rounded once, where it is subnormal
    return w, np.sqrt(total([v * v for v in w]) / F(len(z))), e


def encode_group(z: list[F], bits: int) -> tuple[list[int], F]:
    """A group as it is after rotation -> codes and scale."""
    if not all(math.isfinite(v) for v in z):
        return [0] * len(z), F(math.nan)
    book = levels(bits)
    w, rms, e = normalized(z)
    inverse = F(1) / rms if rms else F(0)
    codes, _ = viterbi([v * inverse for v in w], book)
    level = [book[m] for m in level_numbers(codes)]
    fitted = total([a * b for a, b in zip(w, level, strict=True)]) / total([a * a for a in level])
    scale = fitted * F(2.0**e)
    if math.isinf(scale) or math.isinf(oracle.to_bf16(scale)):
        return [0] * len(z), F(math.nan)
    scale = oracle.to_bf16(scale)
    return ([0] * len(z), F(0)) if scale < 2.0**-126 else (codes, scale)


def encode(x: np.ndarray, bits: int, group: int, rotates: bool = True) -> bytes:
    """x [rows, features] float32 -> the wire."""
    features, all_codes, scales = x.shape[1], [], b""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for row in x:
            codes = []
            for start in range(0, features, group):
                part = list(row[start : start + group])
                part, scale = encode_group(rotate(part, False) if rotates else part, bits)
                codes += part
                scales += b"\xc0\x7f" if math.isnan(scale) else struct.pack("<f", scale)[2:]
            all_codes.append(codes + [0] * (-features % 8))
    wire, shift = b"", 0
    for width in oracle.PLANES[bits]:
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
    return wire + scales.ljust(oracle.aligned(len(scales)), b"\0")


def unpack(wire: bytes, rows: int, features: int, bits: int) -> tuple[np.ndarray, int]:
    """The codes [rows, features], and where the scales begin."""
    padded, at, shift = -(-features // 8) * 8, 0, 0
    codes = np.zeros((rows, features), int)
    for width in oracle.PLANES[bits]:
        for row in range(rows):
            for value in range(features):
                start = value // 32 * 32
                size = min(32, padded - start) * width // 8
                j, k = (value - start) % size, (value - start) // size
                byte = wire[at + row * padded * width // 8 + start * width // 8 + j]
                codes[row, value] |= (byte >> (k * width)) % 2**width << shift
        at += oracle.aligned(rows * padded * width // 8)
        shift += width
    return codes, at


def decode(wires: list[bytes], rows: int, features: int, bits: int, group: int, rotates: bool = True) -> np.ndarray:
    """The sum of some wires -> float32 [rows, features]."""
    book, groups = levels(bits), -(-features // group)
    out = np.zeros((rows, features), F)
    unpacked = [unpack(wire, rows, features, bits) for wire in wires]
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for row in range(rows):
            for start in range(0, features, group):
                sums = None
                for wire, (codes, at) in zip(wires, unpacked, strict=True):
                    index = at + 2 * (row * groups + start // group)
                    scale = oracle.bf16(wire[index], wire[index + 1])
                    numbers = level_numbers([int(code) for code in codes[row, start : start + group]])
                    values = [book[m] * scale for m in numbers]
                    sums = values if sums is None else [a + b for a, b in zip(sums, values, strict=True)]
                out[row, start : start + group] = rotate(sums, True) if rotates else sums
    return out
