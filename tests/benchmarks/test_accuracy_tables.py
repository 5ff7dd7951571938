"""The tables say what the rows say, and the default spec is what the published ones say."""

import json
import sys
from pathlib import Path

import pytest

from megatron_lowbit.config import DEFAULT_SPEC

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PUBLISHED = "959f79ce"  # how the SHA-256 of the published tables' text begins
sys.path.append(str(BENCHMARKS))

import accuracy_tables  # noqa: E402


def row(spec, bits, loss, reach=0.002, tp=8, algorithm="two-step", kl=0.01):
    return {
        "spec": spec, "family": "a family", "tp": tp, "algorithm": algorithm, "bits_per_value": bits, "loss": loss,
        "loss_interval": [loss - reach, loss + reach], "kl_mean": kl, "kl_p99": 5 * kl, "top1_agreement": 0.9,
    }  # fmt: skip


def test_the_default_is_what_the_published_table_says():
    found = json.loads((BENCHMARKS / "results" / "accuracy.json").read_text())
    if not found["text_sha256"].startswith(PUBLISHED):
        pytest.skip("the table is of another text")
    assert accuracy_tables.cheapest(found["rows"])[0] == DEFAULT_SPEC


def test_within_the_limit_everywhere_and_with_confidence():
    rows = [
        row("a", 5, 0.005),
        row("a", 5, 0.007, tp=2),
        row("b", 4, 0.009),
        row("c", 3, 0.005),
        row("c", 3, 0.02, tp=2),
    ]
    assert accuracy_tables.cheapest([*rows, row("d", 2, 0.0079)]) == ["d", "a"]


def test_of_equal_bits_the_one_of_less_divergence_is_first():
    assert accuracy_tables.cheapest([row("a", 4, 0.0, kl=0.02), row("b", 4, 0.0, kl=0.01)]) == ["b", "a"]


def test_losses_have_a_column_for_each_place():
    columns, lines = accuracy_tables.losses([row("a", 4, 0.01), row("a", 4.5, 0.02, tp=2, algorithm="one-shot")])
    assert columns == ["spec", "family", "bits", "one-shot, TP 2", "two-step, TP 8"]
    assert lines == [["`a`", "a family", "4 / 4.5", "+2.00% ± 0.20", "+1.00% ± 0.20"]]


def test_goals_take_the_least_divergence_that_the_bits_allow():
    rows = [row("many", 6, 0.001, kl=0.001), row("few", 3, 0.2, kl=0.1), row("less", 3.1, 0.3, kl=0.2)]
    _, lines = accuracy_tables.goals(rows)
    assert [(line[1], line[-1]) for line in lines] == [
        ("`many`", "yes"), ("`few`", "no"), ("`few`", "no"), ("`few`", "no")
    ]  # fmt: skip


def test_halves_compare_with_plain_integers_of_no_fewer_bits():
    plain = [
        row(spec, bits, 0.02, kl=0.02) for spec, bits in zip(accuracy_tables.PLAIN, (8, 7, 6, 5, 4, 3), strict=True)
    ]
    _, lines = accuracy_tables.halves([*plain, row("ours", 4.5, 0.001, kl=0.004)])
    assert [line[-1] for line in lines] == ["yes"] * 4 + ["no"] * 2
    assert lines[3][3:] == ["`ours`", "4.5", "+0.10% ± 0.20", "0.20", "yes"]
