"""Sentences against rows whose outcome is known."""

import math

import pytest

from megatron_lowbit.evaluation import verdict
from tests.evaluations import row, rows


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((-0.001, 0.0099), "within 1%"),
        ((0.008, 0.0101), "undecided"),
        ((0.0101, 0.02), "above 1%"),
        ((math.nan, math.nan), "undecided"),
    ],
)
def test_the_interval_decides_and_not_the_mean(interval, expected):
    assert verdict.judged(row("int4:g32", loss=0.0, interval=interval)) == expected


def test_chooses_the_cheapest_that_was_shown():
    cheap = row("gauss4:g128", bits=4.125, loss=0.0098)  # its interval reaches 1.08 %
    good, better = row("int4:g32", bits=5.0, loss=0.006), row("int8:g128", bits=8.25, loss=0.0)
    assert verdict.choice([better, cheap, good], 4) is good
    assert verdict.choice([better, cheap, good], 8) is None
    assert verdict.choice([cheap], 4) is None
    assert verdict.choice([row("int8", bits=8, bytes_per_token=10**6)], 4) is None  # nothing is saved
    assert verdict.saving(good) == pytest.approx(3.2)


def test_says_what_is_good_bad_and_unknown():
    first, second, *rest = verdict.sentences(rows())
    assert first == (
        "TP 8: int4:g32, two-step, is the cheapest of 5 cases that keeps perplexity within 1%: +0.60% (95% interval "
        "+0.50% to +0.70%). A token costs 109 bytes per rank instead of 350 as bf16: 3.20 times fewer, 69% saved."
    )
    assert second.startswith("TP 2: int4:g32, one-shot, is the cheapest of 3 cases")
    bad, dear, undecided, zero = rest
    assert bad == "Bad: 2 of 8 cases lose more than 1%, worst int2:g32:sym at TP 8 (two-step) with +40.0%."
    assert dear.startswith(
        "No use: 1 of 8 cases sends as much as bf16 or more, int8:g128 at TP 8 (one-shot) 4.12 times"
    )
    assert undecided.startswith("Undecided: 1 of 8 intervals reaches across 1%")
    assert zero.startswith("Not shown: the loss of 3 of 8 cases, whose intervals hold zero")


def test_a_plan_has_its_file_s_name_and_nothing_good_is_said_so():
    only = row("plan", loss=0.3, plan="mine.json")
    assert verdict.sentences([only]) == [
        "TP 4: the one case was not shown to keep perplexity within 1% while saving bytes.",
        "Bad: 1 of 1 cases loses more than 1%, worst mine.json at TP 4 (two-step) with +30.0%.",
    ]


def test_few_windows_and_one():
    assert any("3 windows are few" in sentence for sentence in verdict.sentences([row("int4:g32", windows=3)]))
    unknown = row("int4:g32", windows=1, interval=(math.nan, math.nan))
    chosen, last = verdict.sentences([unknown])
    assert "was not shown" in chosen and "one window has no error" in last
