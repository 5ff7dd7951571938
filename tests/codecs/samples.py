"""Rows that codecs stumble over, a calibration to go with them, and comparing bits. Shares no code with the package."""

from __future__ import annotations

import hashlib

import torch

from megatron_lowbit.codecs.statistics import Statistics

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FEATURES = [1, 7, 31, 32, 33, 64, 100, 128, 252, 256, 300]
_digest = hashlib.sha256(b"megatron_lowbit").digest()
SIGN_PATTERN = torch.tensor([-1.0 if _digest[i // 8] >> i % 8 & 1 else 1.0 for i in range(256)])

KINDS = (
    "gaussian", "heavy", "large", "small", "subnormal", "zero", "minus zero", "constant", "spike", "two spikes",
    "sign pattern", "alternating", "ramp", "offset", "integers", "span", "nan", "inf", "both infs", "overflow", "top",
)  # fmt: skip


def row(kind: str, features: int, seed: int = 0) -> torch.Tensor:
    """fp32 [features]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(features, generator=generator)
    i = torch.arange(features)
    place = int(torch.randint(features, (1,), generator=generator))
    if kind in ("nan", "inf", "both infs"):
        x[place] = torch.nan if kind == "nan" else torch.inf
        if kind == "both infs":
            x[-1] = -torch.inf
        return x
    if kind in ("spike", "two spikes"):
        x = torch.zeros(features)
        x[place] = -5.0
        if kind == "two spikes":
            x[features // 2] = 5.0
        return x
    return {
        "gaussian": x,
        "heavy": x / torch.rand(features, generator=generator),
        "large": x * 2.0**100,
        "small": x * 2.0**-100,
        "subnormal": x * 2.0**-130,
        "zero": torch.zeros(features),
        "minus zero": -torch.zeros(features),
        "constant": torch.full((features,), -3.0),
        "sign pattern": SIGN_PATTERN.repeat(features // 256 + 1)[:features] * 0.7,
        "alternating": 1.0 - 2.0 * (i % 2),
        "ramp": i - features / 3.0,
        "offset": x + 100.0,
        "integers": (3 * x).round(),
        "span": x * torch.exp2(torch.randint(-140, 100, (features,), generator=generator)),
        "overflow": torch.where(x > 0, 2.0**124, -(2.0**124)),
        "top": torch.where(x > 1, 3.3e38, x),
    }[kind]


def rows(features: int, seed: int = 0, kinds: tuple[str, ...] = KINDS) -> torch.Tensor:
    """fp32 [kinds, features]: one row of each kind."""
    return torch.stack([row(kind, features, seed + n) for n, kind in enumerate(kinds)])


def some_rows(features: int, number: int, first: int) -> torch.Tensor:
    """As `rows`, of only some kinds: `number` of them from the `first` on, around the list."""
    return rows(features, first, tuple(KINDS[(first + n) % len(KINDS)] for n in range(number)))


def statistics(features: int, count: int, senders: int = 1, seed: int = 0) -> Statistics:
    """`count` outlier features, and ranges that differ in place and size, some of them empty or tiny."""
    generator = torch.Generator().manual_seed(seed)
    outliers = tuple(sorted(torch.randperm(features, generator=generator)[:count].tolist()))
    low = -torch.rand(senders, features, generator=generator) * 3
    high = low + torch.rand(senders, features, generator=generator) * 5
    high[:, 3::11], high[:, 5::11] = low[:, 3::11], low[:, 5::11] + 1e-38
    return Statistics(outliers, low, high)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (a, b)))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same numbers to the bit; any NaN is any other's equal."""
    return torch.equal(a.isnan(), b.isnan()) and same_bits(a.masked_fill(a.isnan(), 0), b.masked_fill(b.isnan(), 0))
