"""What travels: one file per codec family, written as its definition in plain PyTorch."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from ..spec import GAUSS, INTEGERS, PASSTHROUGH, SELECTIVE, Leg, parse_leg
from . import passthrough
from .affine import Affine
from .base import Codec
from .gauss import Gauss
from .microscaling import Microscaling
from .outliers import Outliers
from .passthrough import Passthrough
from .selective import Selective
from .spike import Spike
from .trellis import Trellis

__all__ = ["Codec", "codec", "make", "plain"]


def codec(spec: str) -> Codec:
    """The codec of a one-leg spec such as "int4:g32". Raises ConfigError saying what is allowed."""
    return make(parse_leg(spec))


@lru_cache(maxsize=256)
def make(leg: Leg) -> Codec:
    """The codec of a parsed leg. One that needs a site's statistics knows its sizes, and encodes once it is bound."""
    if leg.name in SELECTIVE:
        return Selective(leg)
    if leg.outliers is not None:
        return Outliers(leg, make(replace(leg, outliers=None)))
    if leg.name in PASSTHROUGH:
        return Passthrough(leg)
    if leg.name in INTEGERS:
        return Spike(leg) if leg.spike else Affine(leg)
    if leg.name in GAUSS:
        return Trellis(leg) if leg.trellis else Gauss(leg)
    return Microscaling(leg)


def plain(dtype: torch.dtype) -> Codec:
    """The passthrough codec that leaves values of `dtype` as they are."""
    return make(Leg(next(name for name, own in passthrough.DTYPES.items() if own == dtype)))
