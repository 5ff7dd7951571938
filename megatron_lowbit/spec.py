"""The one-line spec: what travels on each leg of a collective.

    SPEC   := LEG [ "/" LEG ]          one leg: used for both hops of the all-reduce; two: scatter leg / gather leg
    LEG    := NAME ( ":" OPTION )*
    OPTION := g32 | g64 | g128 | g256 | sym | spike | outliers=FRACTION

The whole grammar is parsed here, so that a codec this version does not have is refused by name and never ignored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from .errors import ConfigError

PASSTHROUGH = ("bf16", "fp16", "fp32")
INTEGERS = tuple(f"int{b}" for b in range(2, 9))
PLANNED = (*(f"gauss{b}" for b in range(2, 7)), "selective4", "fp8", "mxfp8", "mxfp6", "mxfp4", "nvfp4")
GROUPS = (32, 64, 128, 256)
DEFAULT_GROUP = 32
_EXAMPLES = "for example 'int4:g32' or 'int4:g32/int8:g128'"


@dataclass(frozen=True)
class Leg:
    """One hop's codec. `group` is the number of values that share a scale (0 for passthrough)."""

    name: str
    group: int = 0
    sym: bool = False

    @property
    def bits(self) -> int:
        """Bits of one code, without scales and zeros."""
        return int(self.name[-1]) if self.name in INTEGERS else int(self.name[2:])

    def __str__(self) -> str:
        return self.name + (f":g{self.group}" if self.group else "") + (":sym" if self.sym else "")


@dataclass(frozen=True)
class Spec:
    """Codecs of the two hops of an all-reduce. `str()` gives the canonical spelling."""

    scatter: Leg
    gather: Leg

    def __str__(self) -> str:
        return str(self.scatter) if self.scatter == self.gather else f"{self.scatter}/{self.gather}"


def parse(text: str) -> Spec:
    """Parse a SPEC. Raises ConfigError naming the part that is wrong and what is allowed there."""
    if not isinstance(text, str):
        raise ConfigError(f"a spec is a string, not {type(text).__name__}: write {_EXAMPLES}")
    return _parse(text)


@lru_cache(maxsize=1024)
def _parse(text: str) -> Spec:
    legs = _split(text)
    if len(legs) > 2:
        raise ConfigError(f"spec {text!r} has {len(legs)} legs: write one, or scatter/gather, {_EXAMPLES}")
    parsed = [_parse_leg(leg, text) for leg in legs]
    return Spec(parsed[0], parsed[-1])


def parse_leg(text: str) -> Leg:
    """Parse a spec of exactly one leg. Raises ConfigError."""
    spec = parse(text)
    if len(_split(text)) > 1:
        raise ConfigError(f"spec {text!r} has two legs where one codec is meant: use {str(spec.scatter)!r}")
    return spec.scatter


def _split(text: str) -> list[str]:
    return re.split(r"/(?!\d)", text.strip())  # the slash of a fraction is followed by a digit


def _parse_leg(text: str, spec: str) -> Leg:
    name, *options = text.strip().split(":")
    where = f"in spec {spec!r}"
    if name not in PASSTHROUGH + INTEGERS + PLANNED:
        raise ConfigError(f"unknown codec {name!r} {where}: use one of {', '.join(PASSTHROUGH + INTEGERS)}")
    if name in PLANNED:
        raise ConfigError(
            f"codec {name!r} {where} is not available in this version: use one of {', '.join(PASSTHROUGH + INTEGERS)}"
        )
    seen: dict[str, str] = {}
    for option in options:
        kind = _option_kind(option, where)
        if kind in seen:
            raise ConfigError(f"option {option!r} {where} repeats {seen[kind]!r}: give it once")
        seen[kind] = option
    for kind in ("spike", "outliers"):
        if kind in seen:
            raise ConfigError(f"option {seen[kind]!r} {where} is not available in this version: leave it out")
    if name in PASSTHROUGH:
        if seen:
            raise ConfigError(
                f"{name!r} {where} is passthrough and takes no options: leave out {', '.join(seen.values())}"
            )
        return Leg(name)
    return Leg(name, int(seen["group"][1:]) if "group" in seen else DEFAULT_GROUP, "sym" in seen)


def _option_kind(option: str, where: str) -> str:
    if re.fullmatch(r"g[1-9][0-9]*", option):
        if int(option[1:]) not in GROUPS:
            raise ConfigError(f"group size {option!r} {where}: use one of {', '.join(f'g{g}' for g in GROUPS)}")
        return "group"
    if option in ("sym", "spike"):
        return option
    if option.startswith("outliers="):
        try:
            fraction = Fraction(option.removeprefix("outliers="))
        except (ValueError, ZeroDivisionError):
            fraction = Fraction(0)
        if not 0 < fraction <= 1:
            raise ConfigError(f"option {option!r} {where}: give a fraction above 0 and up to 1, such as outliers=1/64")
        return "outliers"
    raise ConfigError(f"unknown option {option!r} {where}: use g32, g64, g128, g256 or sym")
