"""The one-line spec: what travels on each leg of a collective.

    SPEC   := LEG [ "/" LEG ]          one leg: used everywhere; two: scatter leg / gather leg
    LEG    := NAME ( ":" OPTION )*
    OPTION := g32 | g64 | g128 | g256 | sym | spike | trellis | outliers=FRACTION

Which options a codec takes, and what it does without them, is the table `FAMILIES`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from .errors import ConfigError

PASSTHROUGH = ("bf16", "fp16", "fp32")
INTEGERS = tuple(f"int{b}" for b in range(2, 9))
GAUSS = tuple(f"gauss{b}" for b in range(2, 8))
SELECTIVE = ("selective4",)
FLOATS = ("fp8",)
MICROSCALING = ("mxfp8", "mxfp6", "mxfp4", "nvfp4")
GROUPS = (32, 64, 128, 256)
_EXAMPLES = "for example 'int4:g32' or 'int4:g32/int8:g128'"


@dataclass(frozen=True)
class Family:
    """Names that share their options. group: values per scale by default, 0 where that is no choice."""

    names: tuple[str, ...]
    group: int
    flags: tuple[str, ...] = ()
    outliers: Fraction | bool | None = None  # False: never; a fraction: by default


FAMILIES = (
    Family(PASSTHROUGH, 0, outliers=False),
    Family(INTEGERS, 32, ("sym", "spike")),
    Family(GAUSS[:4], 128, ("trellis",)),
    Family(GAUSS[4:], 128),
    Family(SELECTIVE, 0, outliers=Fraction(1, 64)),
    Family(FLOATS, 128),
    Family(MICROSCALING, 0),
)
NAMES = tuple(name for family in FAMILIES for name in family.names)


@dataclass(frozen=True)
class Leg:
    """One hop's codec. group: values that share a scale (0: not a choice); outliers: fraction of features in bf16."""

    name: str
    group: int = 0
    sym: bool = False
    spike: bool = False
    trellis: bool = False
    outliers: Fraction | None = None

    @property
    def bits(self) -> int:
        """Bits of one code, without scales and the like."""
        return int(re.search(r"\d+$", self.name)[0])

    @property
    def family(self) -> Family:
        return next(family for family in FAMILIES if self.name in family.names)

    @property
    def calibrated(self) -> bool:
        """Whether this codec needs to know a site's statistics."""
        return self.outliers is not None

    @property
    def ranged(self) -> bool:
        """Whether what it needs to know are ranges, those of each rank's values, and not only which are outliers."""
        return self.name in SELECTIVE

    def __str__(self) -> str:
        options = [f"g{self.group}"] if self.group else []
        options += [flag for flag in self.family.flags if getattr(self, flag)]
        options += [] if self.outliers == (self.family.outliers or None) else [f"outliers={self.outliers}"]
        return ":".join([self.name, *options])


@dataclass(frozen=True)
class Spec:
    """Codecs of the hop that scatters and of the one that gathers. `str()` gives the canonical spelling."""

    scatter: Leg
    gather: Leg

    @property
    def calibrated(self) -> bool:
        return self.scatter.calibrated or self.gather.calibrated

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
    if name not in NAMES:
        raise ConfigError(f"unknown codec {name!r} {where}: use one of {', '.join(NAMES)}")
    family = next(family for family in FAMILIES if name in family.names)
    seen: dict[str, str] = {}
    for option in options:
        kind = _option_kind(option, where)
        if kind in seen:
            raise ConfigError(f"option {option!r} {where} repeats {seen[kind]!r}: give it once")
        seen[kind] = option
    allowed = {"group": ", ".join(f"g{g}" for g in GROUPS)} if family.group else {}
    allowed |= {flag: flag for flag in family.flags}
    allowed |= {} if family.outliers is False else {"outliers": "outliers=FRACTION"}
    for kind, option in seen.items():
        if kind not in allowed:
            takes = f"takes {', '.join(allowed.values())}" if allowed else "is passthrough and takes no options"
            raise ConfigError(f"option {option!r} {where}: {name!r} {takes}; leave it out")
    return Leg(
        name,
        group=int(seen["group"][1:]) if "group" in seen else family.group,
        outliers=fraction(seen["outliers"].removeprefix("outliers="))
        if "outliers" in seen
        else family.outliers or None,
        **{flag: True for flag in family.flags if flag in seen},
    )


def _option_kind(option: str, where: str) -> str:
    if re.fullmatch(r"g[1-9][0-9]{0,8}", option):
        if int(option[1:]) not in GROUPS:
            raise ConfigError(f"group size {option!r} {where}: use one of {', '.join(f'g{g}' for g in GROUPS)}")
        return "group"
    if any(option in family.flags for family in FAMILIES):
        return option
    if option.startswith("outliers="):
        if not 0 < (fraction(option.removeprefix("outliers=")) or 0) <= 1:
            raise ConfigError(f"option {option!r} {where}: give a fraction above 0 and up to 1, such as outliers=1/64")
        return "outliers"
    raise ConfigError(
        f"unknown option {option!r} {where}: use g32, g64, g128, g256, sym, spike, trellis or outliers=1/64, as the "
        "codec allows"
    )


def fraction(text: str) -> Fraction | None:
    """The number that `text` spells, as 1/64 or 0.05 do; None if it spells none, or one of absurd length."""
    if not re.fullmatch(r"\d{1,9}(/0*[1-9]\d{0,8})?|\d?\.\d{1,9}", text):  # no 1e999999999, which takes for ever
        return None
    value = Fraction(text)
    return value if value.denominator < 10**9 else None  # else its own spelling would not be one
