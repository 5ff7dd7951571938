"""The rotation in front of the Gaussian codecs: fixed signs, then the Hadamard transform of each group.

A rotation spreads a group's outliers over all its values and makes them near Gaussian, whatever they were (QuIP#, Tseng
et al. 2024, section 3); the signs keep constant and periodic groups from ending up in one value. It is linear, so it
commutes with sums.

Definition, in fp32, for a group of n values (a row's last group may be shorter than the others):

    signs      value i is negated if bit i % 8 of byte i // 8 of SHA-256("megatron_lowbit") is set
    butterfly  for h = 1, 2, 4, ..., p / 2: (a, b) at distance h in blocks of 2h become (a + b, a - b)

If n is a power of two from 32 up, the transform is that butterfly with p = n, without its factor 1 / sqrt(n), which no
scale notices, and its inverse is the same butterfly times 1 / n, an exact factor. Otherwise p is the largest power of
two below n, and the butterfly times 1 / sqrt(p), as fp32, is applied to the first p values and then, after the signs
of the first p once more, to the last p; the inverse undoes that in the opposite order. Without signs in between,
the second butterfly would undo most of the first: 192 values, one of them 30 times the others' size, would come out at
8.9 dB with 4 bits instead of 20.9. Fewer than 32 values are not rotated at all, signs included.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch

SMALLEST = 32
_bytes = np.frombuffer(hashlib.sha256(b"megatron_lowbit").digest(), np.uint8)
SIGNS = torch.from_numpy(1.0 - 2.0 * np.unpackbits(_bytes, bitorder="little")).float()


def rotate(x: torch.Tensor) -> torch.Tensor:
    """x fp32 [..., n] -> a new tensor, every last dimension rotated as one group of n <= 256 values."""
    n = x.shape[-1]
    if n < SMALLEST:
        return x.clone()
    p, signs = _power(n), SIGNS[:n].to(x.device)
    x = x * signs
    if p == n:
        return _butterfly(x)
    x[..., :p] = _butterfly(x[..., :p]) * _factor(p)
    x[..., n - p :] = _butterfly(x[..., n - p :] * signs[:p]) * _factor(p)
    return x


def unrotate(z: torch.Tensor) -> torch.Tensor:
    """The inverse, up to rounding."""
    n = z.shape[-1]
    if n < SMALLEST:
        return z.clone()
    p, signs = _power(n), SIGNS[:n].to(z.device)
    if p == n:
        return _butterfly(z) * (1.0 / n) * signs
    z = z.clone()
    z[..., n - p :] = _butterfly(z[..., n - p :]) * _factor(p) * signs[:p]
    z[..., :p] = _butterfly(z[..., :p]) * _factor(p)
    return z * signs


def _power(n: int) -> int:
    return 1 << (n.bit_length() - 1)


def _factor(p: int) -> float:
    return float(np.float32(1.0 / math.sqrt(p)))


def _butterfly(x: torch.Tensor) -> torch.Tensor:
    shape, h = x.shape, 1
    while h < shape[-1]:
        pairs = x.reshape(*shape[:-1], -1, 2, h)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x, h = torch.stack([a + b, a - b], -2).reshape(shape), 2 * h
    return x
