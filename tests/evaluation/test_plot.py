"""The picture holds what it was given; how it looks was looked at."""

import math

import pytest

pytest.importorskip("matplotlib")

from megatron_lowbit.evaluation.plot import frontier, plot
from tests.evaluations import row


@pytest.fixture
def drawn(monkeypatch):
    """The names that are written beside points."""
    from megatron_lowbit.evaluation import plot as module

    found = []
    label = module.label
    monkeypatch.setattr(module, "label", lambda axis, names, *rest: (found.append(names), label(axis, names, *rest)))
    return found


def test_names_every_case_and_where_it_is(tmp_path, drawn):
    rows = [row("int4:g32", 2, 5.0, 0.01), row("int8:g128", 2, 8.25, 0.0), row("int4:g32", 8, 5.0, 0.02, plan="p.json")]
    plot(rows, "model", tmp_path / "a.png")
    assert drawn[0] == [(5.0, 1.0, "int4:g32"), (8.25, 0.0, "int8:g128"), (5.0, 2.0, "p.json")]
    assert [name[:2] for name in drawn[1]] == [(5.0, 0.00501), (8.25, 1e-5), (5.0, 0.01001)]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_of_many_cases_the_frontier_of_the_largest_tp_is_named(tmp_path, drawn):
    rows = [row(f"good{bits}", tp, bits, 2.0**-bits) for tp in (2, 4) for bits in range(2, 7)]
    rows += [row(f"bad{bits}", tp, bits + 0.5, 1.0) for tp in (2, 4) for bits in range(2, 7)]
    plot(rows, "model", tmp_path / "a.png")
    assert [[name for _, _, name in names] for names in drawn] == [[f"good{bits}" for bits in range(2, 7)]] * 2


def test_the_frontier_is_of_those_that_nothing_beats():
    a, b, c = row("a", bits=3, loss=0.1), row("b", bits=4, loss=0.2), row("c", bits=5, loss=0.05)
    broken = row("d", bits=2, loss=math.nan, interval=(math.nan, math.nan))
    assert frontier([c, b, broken, a, row("e", bits=5, loss=0.06)], "loss") == [a, c]
    assert frontier([c, a], "loss", "bytes_per_token") == [a, c]


def test_a_single_window_has_no_interval(tmp_path):
    plot([row("int4:g32", 2, interval=(math.nan, math.nan))], "model", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_what_rounds_to_nothing_has_a_place(tmp_path, drawn):
    plot([row("int8:g128", kl_mean=0.0), row("int4:g32")], "model", tmp_path / "a.png")
    assert drawn[1][0][1] == 1e-6
