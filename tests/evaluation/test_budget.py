"""The search for a plan, with measurements made up here: what is predicted is off, and the search finds out."""

import math

import pytest
import torch

pytest.importorskip("scipy")

from megatron_lowbit.errors import ConfigError
from megatron_lowbit.evaluation.budget import Budget, search
from megatron_lowbit.evaluation.metrics import Tokens
from megatron_lowbit.evaluation.planning import Setting, options, predicted

SPECS = {f"int{bits}:g32": bits + 1 for bits in range(2, 9)}
SETTING = Setting(4, "two-step", {f"layers.{i}.mlp": 64 for i in range(6)})
EFFECTS = {
    (site, leg, spec): (1 + i) / 4**bits
    for i, site in enumerate(SETTING.features)
    for leg in SETTING.legs
    for spec, bits in SPECS.items()
}
CHOICES = options(SETTING, EFFECTS, list(SPECS))


class Measurements:
    """Each case costs `factor` times what is predicted, in KL divergence, and a third of that in likelihood."""

    def __init__(self, factor: float, spread: float = 0.0) -> None:
        self.factor, self.spread, self.cases = factor, spread, []

    def cost(self, case) -> float:
        return self.factor * predicted(EFFECTS, SETTING, case.config.planned.sites)

    def __call__(self, case):
        self.cases.append(case)
        costs = [self.cost(case) * (1 + self.spread * sign) for sign in (1, -1, 1, -1)]
        return [Tokens(torch.zeros(8), torch.full((8,), c / 3), torch.full((8,), c), torch.ones(8)) for c in costs]


@pytest.mark.parametrize("factor", [0.1, 0.8, 1.0, 3.0, 40.0])
@pytest.mark.parametrize("budget", [Budget("kl", 0.02), Budget("perplexity", 0.01)])
def test_finds_the_fewest_bytes_that_hold(factor, budget):
    measure = Measurements(factor)
    case = search(budget, SETTING, CHOICES, measure)
    allowed = 0.02 if budget.kind == "kl" else 3 * math.log(1.01)
    assert 0.7 * allowed < measure.cost(case) <= allowed
    assert len(measure.cases) < 20 and case.algorithm == "two-step"


def test_leaves_a_margin_for_the_error():
    sure, unsure = Measurements(1.0), Measurements(1.0, spread=0.3)
    budget = Budget("kl", 0.02)
    error = 1.645 * 0.3 / math.sqrt(3)  # of four windows' mean
    assert unsure.cost(search(budget, SETTING, CHOICES, unsure)) * (1 + error) <= 0.02
    assert sure.cost(search(budget, SETTING, CHOICES, sure)) > 0.02 / (1 + error)


def test_the_least_loss_for_its_bits():
    measure = Measurements(1.0)
    case = search(Budget("bits", 5.25), SETTING, CHOICES, measure, [SETTING.everywhere("int4:g32")])
    assert 5.1 < case.bits_per_value(SETTING.features) <= 5.25
    assert measure.cost(case) < measure.cost(SETTING.everywhere("int4:g32"))


def test_another_case_is_taken_if_it_turns_out_better():
    """Predictions may be wrong: what was measured decides."""
    best = SETTING.everywhere("int4:g32")
    measure = Measurements(1.0)
    measure.cost = lambda case: 0.0 if case == best else 1.0
    assert search(Budget("bits", 5.25), SETTING, CHOICES, measure, [best, SETTING.everywhere("int5:g32")]) == best


def test_refuses():
    with pytest.raises(ConfigError, match="no plan keeps to 0.001 nats of KL divergence: the best of"):
        measure = Measurements(1.0)
        measure.cost = lambda case: 0.5
        search(Budget("kl", 0.001), SETTING, CHOICES, measure)
    with pytest.raises(ConfigError, match="compresses nothing"):
        search(Budget("kl", 1e-9), SETTING, CHOICES, Measurements(1.0))
    with pytest.raises(ConfigError, match="3 of the cheapest candidate"):
        search(Budget("bits", 2.5), SETTING, CHOICES, Measurements(1.0))
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="--budget-kl is"):
            Budget("kl", value)
