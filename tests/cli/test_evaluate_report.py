"""The table of the terminal: what it holds, and what it leaves out where there is no room."""

import pytest

pytest.importorskip("rich")

from rich.console import Console

from megatron_lowbit.cli.evaluate_report import nats, table
from tests.evaluations import FACTS, row, rows

LONG = "gauss4:g128:trellis:outliers=1/64"


def lines(found: list[dict], width: int, **facts) -> list[str]:
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(table(FACTS | facts, found, console))
    return capture.get().splitlines()


def cells(found: list[str], start: str) -> list[str]:
    return next(line.split() for line in found if line.split()[:2] == start.split())


def test_a_wide_terminal_has_everything():
    found = lines(rows(), 140)
    assert cells(found, "TP spec") == (
        "TP spec algorithm bits saved perplexity loss ± 95 % KL mean KL p99 top-1".split()
    )
    assert cells(found, "8 gauss4:g128") == (
        "8 gauss4:g128 two-step 4.12 74% 50.49 +0.98% 0.10% 0.00491 0.0196 97.0%".split()
    )
    assert not any("left out" in line for line in found)


def test_the_algorithm_is_said_where_it_is_in_doubt():
    assert "algorithm" not in " ".join(lines([row("int4:g32", 2, algorithm="one-shot"), row("int4:g32", 8)], 140))
    assert "algorithm" in " ".join(lines([row("int4:g32", 8, algorithm="one-shot"), row("int4:g32", 8)], 140))


@pytest.mark.parametrize("width", [80, 90, 100])
def test_a_narrow_terminal_leaves_out_columns_and_never_cuts_a_spec(width):
    found = lines([row(LONG, 8), row("int4:g32", 8, algorithm="one-shot")], width)
    assert cells(found, f"8 {LONG}")[2] == "two-step" and max(map(len, found)) <= width
    assert not any("…" in line for line in found)
    text = " ".join(" ".join(found).split())
    assert "left out, as the terminal is narrow: saved, KL p99" in text and "saved: of" not in text and "+0.50%" in text


def test_too_narrow_for_the_spec_folds_it():
    found = lines([row(LONG, 8)], 50)
    start = next(index for index, line in enumerate(found) if line.split()[:1] == ["8"])
    spec = found[start].split()[1] + "".join(line.strip() for line in found[start + 1 : start + 3])
    assert spec.startswith(LONG) and max(map(len, found)) <= 50


def test_names_are_no_markup():
    assert any("[red]x[/] on" in line for line in lines(rows(), 140, model="[red]x[/]"))


def test_a_divergence_that_decimals_do_not_show_is_not_zero():
    shown = [nats(value, 5) for value in (0.0, 3e-7, 1e-5, 0.0123456, float("nan"))]
    assert shown == ["0.00000", "3e-07", "0.00001", "0.01235", "nan"]
