"""An independent reading of docs/wire-format.md, outlier features and selective4: none of the package's code."""

from __future__ import annotations

import math
import struct

import numpy as np

from tests.codecs.oracle import aligned, bf16, to_bf16
from tests.codecs.oracle_gauss import planes, unplanes


def split(x: np.ndarray, outliers: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Rows -> their ordinary features, their outliers."""
    ordinary = [i for i in range(x.shape[1]) if i not in outliers]
    return x[:, ordinary], x[:, list(outliers)]


def join(ordinary: np.ndarray, picked: np.ndarray, outliers: tuple[int, ...]) -> np.ndarray:
    out = np.zeros((len(ordinary), ordinary.shape[1] + picked.shape[1]), np.float32)
    rest = iter(ordinary.T)
    for feature in range(out.shape[1]):
        out[:, feature] = picked[:, outliers.index(feature)] if feature in outliers else next(rest)
    return out


def outlier_section(picked: np.ndarray) -> bytes:
    raw = b""
    for value in picked.flatten():
        value = to_bf16(value) if math.isfinite(value) else value
        raw += b"\xc0\x7f" if math.isnan(value) else struct.pack("<f", value)[2:]
    return raw.ljust(aligned(len(raw)), b"\0")


def outliers_of(section: bytes, rows: int, count: int) -> np.ndarray:
    values = [bf16(section[2 * i], section[2 * i + 1]) for i in range(rows * count)]
    return np.array(values, np.float32).reshape(rows, count)


def steps(low: np.float32, high: np.float32) -> tuple[np.float32, np.float32]:
    """-> scale, inverse."""
    scale = (high - low) / np.float32(15)
    return (scale, np.float32(1) / scale) if scale >= 2.0**-126 else (np.float32(0), np.float32(0))


def encode(x: np.ndarray, low: np.ndarray, high: np.ndarray, outliers: tuple[int, ...]) -> bytes:
    """selective4: x [rows, features] float32, low and high [features] of the rank that sends -> the wire."""
    ordinary, picked = split(x, outliers)
    low, high = (split(bound[None], outliers)[0][0] for bound in (low, high))
    picked = np.where(np.isfinite(x).all(1, keepdims=True), picked, np.float32(np.nan))
    codes = []
    with np.errstate(all="ignore"):
        for row in ordinary:
            codes.append([])
            for value, start, end in zip(row, low, high):
                t = (value - start) * steps(start, end)[1]
                codes[-1].append(15 if t > 15 else round(float(t)) if t > 0 else 0)  # half to even; NaN: 0
    return planes(codes, 4) + outlier_section(picked)


def decode(wires: list[bytes], rows: int, low: np.ndarray, high: np.ndarray, outliers: tuple[int, ...]) -> np.ndarray:
    """The sum of the wires' values; low and high [wires, features], those of each wire's sender."""
    features, values, picked = low.shape[1], None, None
    for wire, start, end in zip(wires, low, high):
        start, end = (split(bound[None], outliers)[0][0] for bound in (start, end))
        codes, rest = unplanes(wire, rows, features - len(outliers), 4)
        scales = np.array([steps(a, b)[0] for a, b in zip(start, end)], np.float32)
        one = start + np.array(codes, np.float32).reshape(rows, -1) * scales
        kept = outliers_of(rest, rows, len(outliers))
        values, picked = (one, kept) if values is None else (values + one, picked + kept)
    out = join(values, picked, outliers)
    out[np.isnan(picked[:, 0])] = np.nan
    return out
