"""Which sites the loss comes from: one site, or one group of sites, compressed at a time, all others exact.

The effect of a site is the KL divergence it causes alone. Two things make it large: much noise in its sum (SQNR), or a
place where the model minds noise much (KL divergence per noise). What the model loses without any compression, as sums
of N products round otherwise than one, is measured too, and taken off.
"""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import pstdev

from ..config import CommConfig
from .cases import Case
from .metrics import Tokens, mean
from .noise import Noise

BY = ("site", "layer", "kind")
ALL = "all"  # the kind of a row of all kinds
_SITE = re.compile(r"(?P<stack>.*?)\blayers\.(?P<layer>\d+)\.(?P<kind>.+)")


@dataclass(frozen=True)
class Group:
    """Sites that are compressed together. layer, kind: what they have in common, None and "all" for nothing."""

    name: str
    sites: tuple[str, ...]
    layer: int | None
    kind: str


def place(site: str) -> tuple[int | None, str]:
    """(layer, kind) of a site: (3, "attention") of "layers.3.attention"; a site in no layer is a kind of its own."""
    match = _SITE.fullmatch(site)
    return (int(match["layer"]), match["stack"] + match["kind"]) if match else (None, site)


def _stack(site: str) -> str:
    match = _SITE.fullmatch(site)
    return match["stack"] if match else ""


def grouped(sites: Sequence[str], by: str = "site") -> list[Group]:
    """Sites in groups, in the order of the sites. by: "site" (each alone), "layer" or "kind"."""
    found: dict[str, list[str]] = {}
    for site in sites:
        layer, kind = place(site)
        name = {"site": site, "layer": kind if layer is None else f"{_stack(site)}layers.{layer}", "kind": kind}[by]
        found.setdefault(name, []).append(site)
    groups = []
    for name, members in found.items():
        layer, kind = place(members[0])
        every = kind if layer is None else _stack(members[0]) + ALL  # an encoder's layer 0 is not the decoder's
        shared = {"site": (layer, kind), "layer": (layer, every), "kind": (None, kind)}[by]
        groups.append(Group(name, tuple(members), *shared))
    return groups


def alone(case: Case, sites: Sequence[str]) -> Case:
    """The case with these sites compressed and all others exact; their names may hold what globs treat specially."""
    return replace(case, config=replace(case.config, sites=tuple(map(glob.escape, sites))))


def uncompressed(case: Case) -> Case:
    """N ranks that send exact sums: what rounding alone does."""
    return Case(CommConfig(None, "exact", 0), case.tp)


def cases(case: Case, groups: Sequence[Group]) -> list[Case]:
    """What must be evaluated for `sensitivity`: nothing compressed, everything, and each group alone."""
    return [
        uncompressed(case),
        alone(case, [s for g in groups for s in g.sites]),
        *(alone(case, g.sites) for g in groups),
    ]


def sensitivity(
    case: Case,
    groups: Sequence[Group],
    found: Mapping[Case, Sequence[Tokens]],
    noise: Mapping[str, Noise],
    features: Mapping[str, int],
) -> Sensitivity:
    """found: of `cases`. noise, features: of every site."""
    floor, everything, *single = ([w.kl.double() for w in found[each]] for each in cases(case, groups))
    effects = [mean([own - none for own, none in zip(each, floor, strict=True)]) for each in (everything, *single)]
    together, *effects = effects
    total, rows = sum(effect.value for effect in effects), []
    for group, effect in zip(groups, effects, strict=True):
        sqnr = sum((noise[site] for site in group.sites), Noise()).sqnr_db
        saved = sum((16 - case.bits_at(site, features[site])) * features[site] for site in group.sites)
        rows.append(
            {
                "site": group.name,
                "layer": group.layer,
                "kind": group.kind,
                "features": sum(features[site] for site in group.sites),
                "kl_mean": effect.value,
                "kl_error": effect.error,
                "share": effect.value / total if total else 0.0,
                "sqnr_db": sqnr if math.isfinite(sqnr) else None,
                "bits_if_exact": saved / sum(features.values()),
            }
        )
    return Sensitivity(case, tuple(rows), together.value, together.error, mean(floor).value)


@dataclass(frozen=True)
class Sensitivity:
    """rows: as docs/sensitivity.md has them, a group each. kl_all: all compressed together. floor: nothing at all."""

    case: Case
    rows: tuple[dict, ...]
    kl_all: float
    kl_all_error: float
    floor: float

    @property
    def facts(self) -> dict:
        """For the JSON."""
        return {
            "spec": self.case.config.spec,
            "tp": self.case.tp,
            "algorithm": self.case.algorithm,
            "rows": list(self.rows),
            "kl_all": self.kl_all,
            "kl_all_error": self.kl_all_error,
            "kl_sum": self.kl_sum,
            "kl_floor": self.floor,
            "explanation": self.explanation,
        }

    @property
    def kl_sum(self) -> float:
        """Of the effects of all groups, each compressed alone."""
        return sum(row["kl_mean"] for row in self.rows)

    @property
    def explanation(self) -> str:
        """One paragraph for a person."""
        if not self.kl_all > 0 or not self.kl_sum > 0:
            return f"{self.case.config.spec} has no effect that could be measured: no site needs another spec."
        if len(self.rows) == 1:  # shares, and sums of effects, say nothing
            return f"Only {self.rows[0]['site']} was compressed: it costs {self.kl_all:.3g} nats. {self._what_to_do()}"
        return " ".join([self._who(), self._why(), self._together(), self._what_to_do()])

    def _who(self) -> str:
        ordered = sorted(self.rows, key=lambda row: -row["share"])
        few = ordered[: max(1, min(3, len(ordered) // 4))]
        share, even = sum(row["share"] for row in few), len(few) / len(ordered)
        names = ", ".join(row["site"] + (f" ({row['share']:.0%})" if len(few) > 1 else "") for row in few)
        carry = "carries" if len(few) == 1 else "carry"
        if share < 1.5 * even:
            return (
                f"Nothing stands out: {names} {carry} {share:.0%} of the KL divergence, and {even:.0%} would be even."
            )
        return f"{names} {carry} {share:.0%} of the KL divergence, {share / even:.1f} times an even share."

    def _why(self) -> str:
        """Whether effects differ by the noise or by the place: KL is noise times weight, so their dB add up."""
        told = [row for row in self.rows if row["kl_mean"] > 0 and row["sqnr_db"] is not None]
        if len(told) < 2:
            return "There is nothing to compare it with."
        noise = [-row["sqnr_db"] for row in told]
        weight = [10 * math.log10(row["kl_mean"]) - n for row, n in zip(told, noise, strict=True)]
        of_noise, of_place = pstdev(noise), pstdev(weight)
        spread = f"the noise differs by {of_noise:.1f} dB, what the model makes of it by {of_place:.1f} dB"
        if of_place > 2 * of_noise:
            return f"What matters is the place, not how much noise there is: {spread} (standard deviations)."
        if of_noise > 2 * of_place:
            return f"What matters is how much noise there is, not the place: {spread} (standard deviations)."
        return f"Both the noise and the place matter: {spread} (standard deviations)."

    def _together(self) -> str:
        ratio = self.kl_sum / self.kl_all
        sums = f"alone they cost {self.kl_sum:.3g} nats in sum, all together {self.kl_all:.3g} ({ratio:.0%})"
        return f"Effects add up: {sums}." if abs(ratio - 1) <= 0.15 else f"Effects do not quite add up: {sums}."

    def _what_to_do(self) -> str:
        top = max(self.rows, key=lambda row: row["share"])
        return (
            f"Keeping {top['site']} exact would take away {top['share']:.0%} of it for {top['bits_if_exact']:.2f} bits "
            "more per value; `megatron-lowbit plan` finds out where bits are spent best."
        )
