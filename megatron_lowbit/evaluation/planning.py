"""What a plan is made of: the effect of every spec at every site and leg, and the choice among them.

A leg is quantized alone: the other one carries fp32, all other sites are exact. Effects on the KL divergence are taken
to add, over legs and over sites, which holds for noise that is small and independent (docs/plan.md has how well). So
the best plan is a multiple-choice knapsack: for every site a pair of specs, or "exact".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from ..calibration_file import Calibration
from ..config import CommConfig
from ..errors import ConfigError
from ..plan_file import EXACT, Plan
from ..spec import parse
from .cases import Case
from .knapsack import choose
from .metrics import Tokens, mean
from .noise import Noise
from .sensitivity import alone, uncompressed

Key = tuple[str, str, str]  # site, leg, spec of one leg


@dataclass(frozen=True)
class Setting:
    """What every case of a plan shares. algorithm: "one-shot" or "two-step"; features: of each site."""

    tp: int
    algorithm: str
    features: Mapping[str, int]
    calibration: Calibration | None = None

    @property
    def legs(self) -> tuple[str, ...]:
        return ("scatter",) if self.algorithm == "one-shot" else ("scatter", "gather")

    def uniform(self, spec: str) -> Case:
        """The same spec everywhere."""
        calibration = self.calibration if parse(spec).calibrated else None
        return Case(CommConfig(spec, self.algorithm, 0, calibration=calibration), self.tp)

    def on_leg(self, leg: str, spec: str) -> Case:
        """The spec on one leg of every site, the other one exact."""
        if self.algorithm == "one-shot":
            return self.uniform(spec)
        return self.uniform(f"{spec}/fp32" if leg == "scatter" else f"fp32/{spec}")

    def everywhere(self, spec: str) -> Case:
        """`uniform`, as a plan."""
        return self.planned(dict.fromkeys(self.features, spec))

    def planned(self, sites: Mapping[str, str]) -> Case:
        """Each site with its own spec."""
        plan = Plan(sites, self.tp, self.algorithm)
        calibration = self.calibration if any(spec.calibrated for spec in plan.specs) else None
        return Case(CommConfig(None, self.algorithm, 0, calibration=calibration, plan=plan), self.tp)


@dataclass(frozen=True)
class Option:
    """A site's spec: what it costs. bits: summed over features, both legs averaged; kl: predicted, nats."""

    spec: str
    bits: float
    bytes: float
    kl: float


def probes(setting: Setting, specs: Iterable[str]) -> dict[Key, Case]:
    """What must be evaluated for the effects of these specs, beside `uncompressed`."""
    return {
        (site, leg, spec): alone(setting.on_leg(leg, spec), [site])
        for site in setting.features
        for leg in setting.legs
        for spec in specs
    }


def measured_effects(
    setting: Setting, cases: Mapping[Key, Case], found: Mapping[Case, Sequence[Tokens]]
) -> dict[Key, float]:
    """The KL divergence that each causes alone, what rounding of exact sums costs taken off, nats; never below zero."""
    floor = [window.kl.double() for window in found[uncompressed(setting.uniform("fp32"))]]
    return {
        key: max(0.0, mean([own.kl - none for own, none in zip(found[case], floor, strict=True)]).value)
        for key, case in cases.items()
    }


def scaled_effects(
    setting: Setting,
    probe: str,
    effects: Mapping[Key, float],
    noise: Mapping[tuple[str, str], Mapping[str, Noise]],
    specs: Iterable[str],
) -> dict[Key, float]:
    """Effects of `specs` from those of `probe`: KL divergence is quadratic in noise, so it grows with its energy.

    noise: of (leg, spec), site by site. Relative to each token's energy: a few huge tokens would decide otherwise.
    """
    found = {}
    for site in setting.features:
        for leg in setting.legs:
            per_noise = effects[site, leg, probe] / (noise[leg, probe][site].relative or 1)
            found |= {(site, leg, spec): per_noise * noise[leg, spec][site].relative for spec in specs}
    return found


def options(setting: Setting, effects: Mapping[Key, float], specs: Sequence[str]) -> dict[str, list[Option]]:
    """Of each site, "exact" first; specs of one leg, any two of them as a pair."""

    @cache
    def price(spec: str, features: int) -> tuple[float, float]:
        case = setting.planned({"site": spec})
        return case.bits_at("site", features) * features, case.bytes_per_token({"site": features})

    pairs = [(a, b) for a in specs for b in specs] if len(setting.legs) == 2 else [(a,) for a in specs]
    found = {}
    for site, features in setting.features.items():
        found[site] = [Option(EXACT, *price(EXACT, features), 0.0)]
        for pair in pairs:
            spec = pair[0] if len({*pair}) == 1 else "/".join(pair)
            kl = sum(effects[site, leg, each] for leg, each in zip(setting.legs, pair, strict=True))
            found[site].append(Option(spec, *price(spec, features), kl))
    return found


def least_kl(setting: Setting, choices: Mapping[str, Sequence[Option]], bits: float) -> dict[str, str]:
    """Site -> spec: the least predicted KL divergence of at most `bits` per value. Raises as `check_bits` does."""
    check_bits(setting, choices, bits)
    return _chosen(choices, "kl", "bits", bits * sum(setting.features.values()))


def check_bits(setting: Setting, choices: Mapping[str, Sequence[Option]], bits: float) -> None:
    """Raise ConfigError if every choice needs more bits per value; effects do not matter."""
    least = sum(min(option.bits for option in own) for own in choices.values()) / sum(setting.features.values())
    if bits < least * (1 - 1e-9):
        raise ConfigError(
            f"{bits:g} bits per value are fewer than the {least:.4g} of the cheapest candidate: give more"
        )


def least_bytes(choices: Mapping[str, Sequence[Option]], kl: float) -> dict[str, str]:
    """Site -> spec: the fewest bytes of a predicted KL divergence of at most `kl`, without that of exact sums."""
    return _chosen(choices, "bytes", "kl", kl)


def _chosen(choices: Mapping[str, Sequence[Option]], cost: str, weight: str, limit: float) -> dict[str, str]:
    costs, weights = (
        [[getattr(option, name) for option in own] for own in choices.values()] for name in (cost, weight)
    )
    picked = choose(costs, weights, limit)
    return {site: own[index].spec for (site, own), index in zip(choices.items(), picked, strict=True)}


def predicted(effects: Mapping[Key, float], setting: Setting, sites: Mapping[str, str]) -> float:
    """The sum of the effects of a plan's specs, nats, without what exact sums cost."""
    total = 0.0
    for site, spec in sites.items():
        if spec != EXACT:
            legs = parse(spec)
            total += sum(effects[site, leg, str(getattr(legs, leg))] for leg in setting.legs)
    return total
