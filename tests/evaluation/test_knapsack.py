"""The best choice, against all choices."""

from itertools import product

import pytest

pytest.importorskip("scipy")

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lowbit.errors import ConfigError
from megatron_lowbit.evaluation import knapsack
from megatron_lowbit.evaluation.knapsack import choose

AMOUNT = st.one_of(st.just(0.0), st.integers(1, 6).map(float), st.floats(1e-9, 100, allow_subnormal=False))
GROUPS = st.lists(st.lists(st.tuples(AMOUNT, AMOUNT), min_size=1, max_size=5), min_size=1, max_size=4)


def totals(groups, picked):
    return tuple(sum(group[i][part] for group, i in zip(groups, picked, strict=True)) for part in (0, 1))


@settings(max_examples=150, deadline=None)
@given(GROUPS, st.floats(0, 1), st.sampled_from([1e-6, 1.0, 1e7]))
def test_nothing_is_better(groups, part, scale):
    groups = [[(cost, weight * scale) for cost, weight in group] for group in groups]
    least = sum(min(weight for _, weight in group) for group in groups)
    limit = least + part * sum(max(weight for _, weight in group) for group in groups)
    picked = choose([[c for c, _ in group] for group in groups], [[w for _, w in group] for group in groups], limit)
    cost, weight = totals(groups, picked)
    every = [totals(groups, each) for each in product(*(range(len(group)) for group in groups))]
    assert weight <= limit * (1 + 2e-9) + 1e-30
    assert cost <= min(c for c, w in every if w <= limit) * (1 + 1e-5) + 1e-7


def test_takes_all_of_a_limit_that_fits_exactly():
    weights = [[2.0625, 4.0625, 16.0]] * 12
    picked = choose([[1.0, 0.1, 0.0]] * 12, weights, 12 * (2.0625 + 4.0625) / 2)
    assert sorted(picked) == [0] * 6 + [1] * 6


def test_what_is_beaten_is_dropped():
    assert knapsack._undominated([3.0, 1.0, 1.0, 5.0, 0.0], [1.0, 2.0, 2.0, 9.0, 4.0]) == [0, 1, 4]


def test_refuses():
    with pytest.raises(ConfigError, match="least possible weight is 3, above the limit of 2.5"):
        choose([[1.0, 2.0], [1.0]], [[2.0, 5.0], [1.0]], 2.5)


def test_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(ConfigError, match="needs scipy: pip install"):
        choose([[1.0]], [[1.0]], 2.0)
