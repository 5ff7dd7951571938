"""What travels: one file per codec family, written as its definition in plain PyTorch."""

from __future__ import annotations

from functools import lru_cache

from ..errors import ConfigError
from ..spec import INTEGERS, PASSTHROUGH, Leg, parse_leg
from .affine import Affine
from .base import Codec
from .passthrough import Passthrough
from .spike import Spike

__all__ = ["Codec", "codec", "make"]


def codec(spec: str) -> Codec:
    """The codec of a one-leg spec such as "int4:g32". Raises ConfigError saying what is allowed."""
    return make(parse_leg(spec))


@lru_cache(maxsize=256)
def make(leg: Leg) -> Codec:
    """The codec of a parsed leg."""
    if leg.name in PASSTHROUGH:
        return Passthrough(leg)
    if leg.name in INTEGERS and not leg.outliers:
        return Spike(leg) if leg.spike else Affine(leg)
    raise ConfigError(f"codec {str(leg)!r} is not available in this version")
