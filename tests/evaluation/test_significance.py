"""Against sums written out, and against what an interval promises."""

import math

import pytest

from megatron_lowbit.evaluation.significance import change, of_reals, of_rights, unpaired


def answers(both: int, lost: int, won: int, neither: int) -> tuple[list[int], list[int]]:
    first = [1] * (both + lost) + [0] * (won + neither)
    second = [1] * both + [0] * lost + [1] * won + [0] * neither
    return first, second


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (5, 0), (3, 9), (9, 3), (10, 10), (40, 22)])
def test_mcnemar_is_the_binomial_sum(lost, won):
    total = lost + won
    tail = sum(math.comb(total, k) for k in range(min(lost, won) + 1)) / 2**total
    found = of_rights(*answers(30, lost, won, 17))
    assert found.p_value == pytest.approx(min(1, 2 * tail), rel=1e-12)
    assert found.value == pytest.approx((won - lost) / (total + 47))


def test_the_interval_by_hand():
    """250 questions, 6 lost and 2 won: (3 - 7) / 252 ± 1.96 sqrt((10 / 252 - (4 / 252)²) / 252)"""
    low, high = of_rights(*answers(120, 6, 2, 122)).interval
    assert (low, high) == (pytest.approx(-0.0404, abs=1e-4), pytest.approx(0.0087, abs=1e-4))


@pytest.mark.parametrize("changed", [(0.0, 0.0), (0.02, 0.02), (0.1, 0.02), (0.3, 0.1)])
def test_the_interval_holds_the_truth(changed, count=60):
    """All outcomes of 60 questions, weighted by how likely they are."""
    down, up = changed
    held = 0.0
    for lost in range(count + 1):
        for won in range(count + 1 - lost):
            chance = math.comb(count, lost) * down**lost * math.comb(count - lost, won) * up**won
            chance *= (1 - down - up) ** (count - lost - won)
            if chance > 1e-9:
                low, high = of_rights(*answers(0, lost, won, count - lost - won)).interval
                held += chance * (low <= up - down <= high)
    assert held > 0.93


def test_equal_answers_do_not_show_that_nothing_changes():
    low, high = of_rights(*answers(20, 0, 0, 30)).interval
    assert low == -high and 0.04 < high < 0.08
    assert of_rights(*answers(2000, 0, 0, 3000)).interval[1] < 0.001


def test_t_by_hand():
    """Two differences, 1 and 3: t is 2 with one degree of freedom, Cauchy's."""
    found = of_reals([0.5, 1], [1.5, 4])
    assert found.value == 2 and found.p_value == pytest.approx(1 - 2 / math.pi * math.atan(2))
    assert found.interval == (pytest.approx(2 - 12.7062, abs=1e-3), pytest.approx(2 + 12.7062, abs=1e-3))


def test_scores_that_do_not_vary():
    assert of_reals([1, 2.5], [1, 2.5]).p_value == 1 and of_reals([1, 2.5], [1, 2.5]).interval == (0, 0)
    assert of_reals([1, 2.5], [2, 3.5]).p_value == 0
    alone = of_reals([1], [2])
    assert alone.value == 1 and math.isnan(alone.p_value) and math.isnan(alone.interval[0])


def test_right_and_wrong_are_told_from_other_scores():
    assert change([1, 0, 1.0], [0.0, 0, 1]) == of_rights([1, 0, 1], [0, 0, 1])
    assert change([1, 0.5, 1], [0, 0.5, 0.7]) == of_reals([1, 0.5, 1], [0, 0.5, 0.7])


def test_a_pair_shows_what_two_scores_do_not():
    first, second = answers(120, 9, 0, 121)
    assert of_rights(first, second).p_value < 0.01
    assert unpaired(first) == pytest.approx(1.959964 * math.sqrt(2 * (130 / 252) * (122 / 252) / 252), rel=1e-5)
    assert unpaired(first) > 2 * 9 / 250 and unpaired([0] * 50) > 0.05
    assert unpaired([1, 5]) == pytest.approx(1.959964 * math.sqrt(8)) and math.isnan(unpaired([3]))
