"""What a plan may cost, and the search for the plan that keeps to it.

Predicted effects are added up and are not quite right; perplexity is not what is predicted at all. So a budget of
accuracy is corrected by what plans turned out to cost when they were measured, for a few rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from ..plan_file import EXACT
from .cases import Case
from .metrics import Mean, Tokens, mean
from .planning import Option, Setting, least_bytes, least_kl

ROUNDS = 6
MARGIN = 1.645  # standard errors above the mean that must keep to the budget: one-sided 95 %
FACTOR = 4.0  # that the budget is corrected by at most in one round

Measure = Callable[[Case], Sequence[Tokens]]


@dataclass(frozen=True)
class Budget:
    """kind: "kl" (nats), "perplexity" (relative rise: 0.01 is 1 %) or "bits" (per value). Raises ConfigError."""

    kind: str
    value: float

    def __post_init__(self) -> None:
        if not (0 < self.value < math.inf):
            raise ConfigError(f"--budget-{self.kind} is {self.value:g}: give a number above 0")
        if self.kind == "bits" and self.value >= 16:
            raise ConfigError(f"--budget-bits is {self.value:g}, and 16 compress nothing: give fewer")

    def __str__(self) -> str:
        return {
            "kl": f"{self.value:g} nats of KL divergence",
            "perplexity": f"{self.value:.2%} of perplexity",
            "bits": f"{self.value:g} bits per value",
        }[self.kind]

    @property
    def nats(self) -> float:
        """What a mean may be: of the KL divergence, or of the change of the negative log likelihood."""
        return math.log1p(self.value) if self.kind == "perplexity" else self.value

    def cost(self, tokens: Sequence[Tokens]) -> Mean:
        """What a case cost, to be compared with `nats`; the KL divergence if the budget is of bits."""
        if self.kind == "perplexity":
            return mean([window.nll.double() - window.nll_exact.double() for window in tokens])
        return mean([window.kl for window in tokens])

    def likely_cost(self, tokens: Sequence[Tokens]) -> float:
        """The cost with a margin for its error, if that is known."""
        cost = self.cost(tokens)
        return cost.value + (MARGIN * cost.error if cost.windows > 1 else 0.0)


def search(
    budget: Budget,
    setting: Setting,
    choices: Mapping[str, Sequence[Option]],
    measure: Measure,
    others: Sequence[Case] = (),
) -> Case:
    """The best plan within the budget among those tried and `others`, all measured. others: such as uniform specs.

    Of a budget of bits the one with the least KL divergence, else the one of the fewest bytes whose cost, with its
    margin, is within. Raises ConfigError if there is none.
    """
    if budget.kind == "bits":
        tried = [setting.planned(least_kl(setting, choices, budget.value))]
        tried += [case for case in others if case.bits_per_value(setting.features) <= budget.value * (1 + 1e-9)]
        return _compressing(budget, min(tried, key=lambda case: budget.cost(measure(case)).value))
    tried = [*others, *_rounds(budget, setting, choices, measure)]
    good = [case for case in tried if budget.likely_cost(measure(case)) <= budget.nats]
    if not good:
        least = min(budget.likely_cost(measure(case)) for case in tried)
        raise ConfigError(
            f"no plan keeps to {budget}: the best of {len(tried)} that were measured cost {least:.3g} nats, where "
            f"{budget.nats:.3g} are allowed; give a larger budget, candidates of more bits, or more --windows"
        )
    return _compressing(budget, min(good, key=lambda case: case.bytes_per_token(setting.features)))


def _compressing(budget: Budget, case: Case) -> Case:
    """Raises ConfigError for a plan that does nothing."""
    if set(case.config.planned.sites.values()) == {EXACT}:
        raise ConfigError(f"{budget}: the best plan compresses nothing; give another budget, or other candidates")
    return case


def _rounds(budget: Budget, setting: Setting, choices: Mapping[str, Sequence[Option]], measure: Measure) -> list[Case]:
    """Plans of one predicted KL divergence after another, until one that holds comes back."""
    price = {(site, option.spec): option.kl for site, own in choices.items() for option in own}
    limit, good, bad, tried = budget.nats, 0.0, math.inf, {}  # predictions up to `good` hold, from `bad` on they do not
    for _ in range(ROUNDS):
        sites = least_bytes(choices, limit)
        case = setting.planned(sites)
        if case.key in tried:
            break
        tried[case.key] = case
        cost = budget.likely_cost(measure(case))
        if cost <= budget.nats:
            good = max(good, limit)
        else:
            bad = min(bad, sum(price[site, spec] for site, spec in sites.items()))
        limit *= min(FACTOR, max(1 / FACTOR, budget.nats / max(cost, 1e-12)))
        limit = min(limit, bad * 0.97) if bad * 0.97 > good else math.sqrt(good * bad)
    return list(tried.values())
