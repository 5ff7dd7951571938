"""Ranges of one site: which features are outliers, and what is no range."""

from fractions import Fraction

import pytest
import torch

from megatron_lowbit.errors import ConfigError
from megatron_lowbit.ranges import Ranges, check_fraction, outlier_count


@pytest.mark.parametrize(
    "features, fraction, count",
    [(256, "1/64", 4), (255, "1/64", 3), (63, "1/64", 1), (2, "1/64", 1), (100, "1", 100), (10, "0.29", 2)],
)
def test_how_many_features_are_outliers(features, fraction, count):
    assert outlier_count(features, Fraction(fraction)) == count


def test_a_hull_reaches_over_all_ranks():
    ranges = Ranges(
        torch.tensor([[-1.0, 5.0, 0.0], [-2.0, -6.0, 0.0]]), torch.tensor([[4.0, 6.0, 0.0], [1.0, -5.0, 9.0]])
    )
    assert ranges.hull.tolist() == [6.0, 12.0, 9.0]  # 1: at another height on each rank; 2: wide on one rank only
    assert ranges.outliers(Fraction(2, 3)) == (1, 2)
    assert (ranges.tp, ranges.features, ranges.has_sum) == (2, 3, False)


def test_of_equal_ranges_the_first_are_taken():
    zeros = torch.zeros(2, 8)
    assert Ranges(zeros, zeros).outliers(Fraction(3, 8)) == (0, 1, 2)


def test_planted_outliers_are_found():
    torch.manual_seed(0)
    high = torch.rand(4, 512) + 1
    planted = sorted(torch.randperm(512)[:8].tolist())
    for index, feature in enumerate(planted):
        high[index % 4, feature] += 5  # on a single rank each
    assert Ranges(-high, high).outliers(Fraction(1, 64)) == tuple(planted)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"low": None}, "low is NoneType: give fp32"),
        ({"low": torch.zeros(3)}, "low is float32 [3]: give fp32 [tp, features]"),
        ({"low": torch.zeros(2, 0)}, "low is float32 [2, 0]: give fp32 [tp, features]"),
        ({"low": torch.zeros(2, 3).double()}, "low is float64 [2, 3]: give fp32 [2, 3]"),
        ({"high": torch.ones(2, 4)}, "high is float32 [2, 4]: give fp32 [2, 3]"),
        ({"high": torch.full((2, 3), torch.inf)}, "high holds a value that is not finite"),
        ({"low": torch.full((2, 3), torch.nan)}, "low holds a value that is not finite"),
        ({"low": torch.full((2, 3), 2.0)}, "a value of low is above that of high: swap them"),
        ({"sum_high": None}, "sum_high is NoneType: give fp32 [3]"),
        ({"sum_low": torch.zeros(1, 3)}, "sum_low is float32 [1, 3]: give fp32 [3]"),
        ({"sum_high": torch.full((3,), -1.0)}, "a value of sum_low is above that of sum_high"),
    ],
)
def test_what_is_no_range(change, message):
    parts = {"low": torch.zeros(2, 3), "high": torch.ones(2, 3), "sum_low": torch.zeros(3), "sum_high": torch.ones(3)}
    Ranges(**parts)
    with pytest.raises(ConfigError) as error:
        Ranges(**(parts | change))
    assert message in str(error.value)


@pytest.mark.parametrize("fraction", [Fraction(0), Fraction(-1, 2), Fraction(3, 2), 0.5, "1/64", None])
def test_what_is_no_fraction(fraction):
    with pytest.raises(ConfigError, match="the fraction of outliers is .*: give a Fraction above 0 and up to 1"):
        check_fraction(fraction)
