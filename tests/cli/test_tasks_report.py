import math

import pytest
from rich.console import Console

from megatron_lowbit.cli import tasks_report
from megatron_lowbit.config import CommConfig
from megatron_lowbit.evaluation.cases import Case
from megatron_lowbit.evaluation.harness import Scores

RIGHTS = Scores(0.5, [1.0, 0.0] * 100, False)


def test_answers_are_paired():
    own = Scores(0.45, [0.0] * 10 + [1.0, 0.0] * 95, False)
    row = tasks_report.compared(RIGHTS, own)
    assert row["kind"] == "proportion" and row["samples"] == 200 and row["change"] == pytest.approx(-0.05)
    assert row["p_value"] == pytest.approx(2 * 0.5**5) and row["unpaired"] > row["change_interval"][1]


def test_a_perplexitys_change_is_that_of_its_mean():
    exact, own = Scores(math.exp(2), [-1.0, -3.0], True), Scores(math.exp(2.5), [-1.25, -3.75], True)
    row = tasks_report.compared(exact, own)
    assert row["kind"] == "perplexity" and row["change"] == pytest.approx(math.exp(2.5) - math.exp(2))
    reach = 12.7062 * 0.25  # differences of 0.25 and 0.75, one degree of freedom
    assert row["change_interval"] == pytest.approx(
        [math.exp(2) * math.expm1(0.5 - reach), math.exp(2) * math.expm1(0.5 + reach)], rel=1e-3
    )


def test_of_other_metrics_nothing_is_claimed():
    row = tasks_report.compared(Scores(3, None, False), Scores(4, None, False))
    assert row["change"] == 1 and row["p_value"] is row["change_interval"] is row["samples"] is None
    row = tasks_report.compared(Scores(0.2, [0.1, 0.3], False), Scores(0.4, [0.2, 0.6], False))
    assert row["kind"] == "mean" and row["samples"] == 2


def test_what_people_see():
    cases = [Case(CommConfig(spec, min_bytes=0), 8) for spec in ("int8:g128", "int4:g32")]
    worse = Scores(0.48, [0.0] * 4 + [1.0, 0.0] * 98, False)
    odd = {"pairs": Scores(2.0, None, False)}
    found = {"named": {None: {"one": {"acc": RIGHTS, **odd}}}}
    found["named"] |= {
        case: {"one": {"acc": scores, **odd}} for case, scores in zip(cases, (RIGHTS, worse), strict=True)
    }
    rows = tasks_report.rows(found)
    assert [(row["metric"], row["spec"]) for row in rows] == [
        ("acc", "int8:g128"), ("acc", "int4:g32"), ("pairs", "int8:g128"), ("pairs", "int4:g32")
    ]  # fmt: skip
    console = Console(record=True, width=80, highlight=False)
    tasks_report.show(console, rows)
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "exact one acc 50.0%" in lines and "8 int8:g128 50.0% 100.0% +0.0 -1.4 … +1.4 1.000" in lines
    assert any(line.startswith("8 int4:g32 48.0% 96.0% -2.0 ") for line in lines)
    assert any(line.startswith("one acc: 200 questions leave changes of ± 1.4 to ") for line in lines)


def test_without_any():
    assert tasks_report.rows({}) == []
    tasks_report.show(Console(), [])
