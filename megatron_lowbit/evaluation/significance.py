"""Whether two runs over the same questions differ, by the questions themselves: paired, as their difficulty cancels.

Two runs that get 61.2 % and 60.4 % of 250 questions right differ by less than either score's own standard error, and
still it may be known which is better: only the questions that one run got right and the other did not tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance

from .metrics import CONFIDENCE

NORMAL = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)  # standard errors that a two-sided interval reaches


@dataclass(frozen=True)
class Change:
    """How far the second run's mean is above the first's, the 95 % confidence interval of that, and how probable so
    large a change would be if there were none. NaN where it is unknown."""

    value: float
    interval: tuple[float, float]
    p_value: float


def change(first: Sequence[float], second: Sequence[float]) -> Change:
    """Scores of both runs, question by question, at least one: `of_rights` if all are 0 or 1, else `of_reals`."""
    rights = {*first, *second} <= {0, 1}
    return of_rights(first, second) if rights else of_reals(first, second)


def of_rights(first: Sequence[float], second: Sequence[float]) -> Change:
    """Of questions answered right (1) or wrong (0).

    p_value: McNemar's exact test, which is the sign test of the questions that changed sides. Interval: the adjusted
    one of Bonett and Price (Journal of Educational and Behavioral Statistics 37, 2012), which keeps a width even if no
    question changed sides, as no number of questions shows that there is no change at all.
    """
    from scipy.stats import binomtest

    pairs, count = list(zip(first, second, strict=True)), len(first)
    lost, won = pairs.count((1, 0)), pairs.count((0, 1))
    worse, better = (lost + 1) / (count + 2), (won + 1) / (count + 2)
    middle = better - worse
    reach = NORMAL * math.sqrt((better + worse - middle**2) / (count + 2))
    p = binomtest(won, won + lost).pvalue if won + lost else 1.0
    return Change((won - lost) / count, (max(-1.0, middle - reach), min(1.0, middle + reach)), float(p))


def of_reals(first: Sequence[float], second: Sequence[float]) -> Change:
    """Of any scores, by a paired t test."""
    from scipy.stats import ttest_1samp

    differences = [after - before for before, after in zip(first, second, strict=True)]
    value = fmean(differences)
    if len(differences) < 2:
        return Change(value, (math.nan, math.nan), math.nan)
    if min(differences) == max(differences):  # t would divide by zero
        return Change(value, (value, value), float(value == 0))
    found = ttest_1samp(differences, 0)
    low, high = found.confidence_interval(CONFIDENCE)
    return Change(value, (float(low), float(high)), float(found.pvalue))


def unpaired(scores: Sequence[float]) -> float:
    """How far the interval would reach around the difference of two such runs' means if it were not known which scores
    belong together: all that two published scores allow. NaN of a single score.

    Of rights and wrongs one of each is added, as Agresti and Caffo (The American Statistician 54, 2000) do.
    """
    if {*scores} <= {0, 1}:
        count, middle = len(scores) + 2, (sum(scores) + 1) / (len(scores) + 2)
        return NORMAL * math.sqrt(2 * middle * (1 - middle) / count)
    return NORMAL * math.sqrt(2 * variance(scores) / len(scores)) if len(scores) > 1 else math.nan
