"""What a person sees of tasks, and what is written for machines: each score beside the exact run's, paired."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..evaluation.cases import Case
from ..evaluation.harness import Found, Scores
from ..evaluation.significance import change, of_reals, unpaired

PROPORTION, PERPLEXITY, MEAN, OTHER = "proportion", "perplexity", "mean", "other"  # kinds of metrics


def rows(found: Mapping[str, Mapping[Case | None, Found]]) -> list[dict]:
    """The documented rows of the JSON, of each task, metric and case: docs/tasks.md. found: of cli.tasks.Answers."""
    return [
        {
            "task": task,
            "metric": metric,
            "spec": case.config.spec,
            "tp": case.tp,
            "algorithm": case.algorithm,
            "sites": case.config.sites,
            "plan": case.config.planned and case.config.planned.name,
            "plan_digest": case.config.plan_digest,
            **case.hierarchy,
            **compared(exact, runs[case][task][metric]),
        }
        for runs in found.values()
        for task, metric, exact in _exact(runs)
        for case in runs
        if case is not None and metric in runs[case].get(task, {})
    ]


def _exact(runs: Mapping[Case | None, Found]) -> Iterator[tuple[str, str, Scores]]:
    for task, metrics in runs[None].items():
        for metric, scores in metrics.items():
            yield task, metric, scores


def compared(exact: Scores, own: Scores) -> dict:
    """The part of a row that both runs make together, in the metric's own unit; None where nothing can be said, as of
    metrics that are no mean over questions."""
    row = {"exact": exact.value, "value": own.value, "change": own.value - exact.value}
    if exact.each is None or own.each is None or len(exact.each) != len(own.each):
        nothing = dict.fromkeys(("change_interval", "p_value", "samples", "unpaired"))
        return row | nothing | {"kind": OTHER}
    apart = unpaired(exact.each)
    if exact.log:  # log likelihoods: a perplexity is exp of minus their mean
        kind, found = PERPLEXITY, of_reals(exact.each, own.each)
        interval = tuple(exact.value * _expm1(-bound) for bound in reversed(found.interval))
        apart = exact.value * _expm1(apart)
    else:
        kind = PROPORTION if {*exact.each, *own.each} <= {0, 1} else MEAN
        found = change(exact.each, own.each)
        interval = found.interval
    return row | {
        "change_interval": interval,
        "p_value": found.p_value,
        "samples": len(exact.each),
        "unpaired": apart,
        "kind": kind,
    }


def _expm1(x: float) -> float:
    return math.expm1(x) if not x > 700 else math.inf


def show(console: Console, rows: Sequence[dict]) -> None:
    """Print a table, the exact run first of each metric, and how much its questions could have shown."""
    if rows:
        console.print(_table(rows))
    for line in resolution(rows):
        console.print(line, soft_wrap=True, markup=False)


def _table(rows: Sequence[dict]) -> Table:
    made = Table(title="tasks", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("TP", "spec", "score", "kept", "change", "95 % interval", "p"):
        made.add_column(column, justify="left" if column == "spec" else "right", no_wrap=column != "spec")
    for before, row, after in zip([None, *rows], rows, [*rows[1:], None], strict=False):
        if before is None or _of(before) != _of(row):
            heading = escape(f"{row['task']} {row['metric']}")
            made.add_row("exact", f"[bold]{heading}[/]", score(row["exact"], row))
        interval, p = row["change_interval"], row["p_value"]
        made.add_row(
            str(row["tp"]),
            escape(row["plan"] or row["spec"]),
            score(row["value"], row),
            f"{row['value'] / row['exact']:.1%}" if row["exact"] else "",
            difference(row["change"], row),
            f"{difference(interval[0], row)} … {difference(interval[1], row)}" if interval else "",
            "" if p is None else f"{p:.3f}" if p >= 0.0005 else "<0.001",
            end_section=after is not None and _of(after) != _of(row),
        )
    made.caption = (
        "kept: of the exact run's score; change: above it, in points of percent, or relative if the score is a "
        "perplexity; p: how probable so large a change were by chance. Of twenty rows without any change, one has a p "
        "below 0.05"
    )
    return made


def resolution(rows: Sequence[dict]) -> list[str]:
    """How small a change the questions of each task could have shown, a line each."""
    found = []
    for task, metric in dict.fromkeys(_of(row) for row in rows if row["change_interval"]):
        own = [row for row in rows if _of(row) == (task, metric)]
        halves = [(row["change_interval"][1] - row["change_interval"][0]) / 2 for row in own]
        low, high = (difference(half, own[0], "") for half in (min(halves), max(halves)))
        unit = " points" if own[0]["kind"] == PROPORTION else ""
        reach = (low if low == high else f"{low} to {high}") + unit
        found.append(
            f"{task} {metric}: {own[0]['samples']} questions leave changes of ± {reach} open "
            f"(± {difference(own[0]['unpaired'], own[0], '')} if runs were not compared question by question)"
        )
    return found


def score(value: float, row: dict) -> str:
    """As people write it: in percent if questions are right or wrong."""
    return f"{value:.1%}" if row["kind"] == PROPORTION else f"{value:.4g}"


def difference(value: float, row: dict, sign: str = "+") -> str:
    """In points of percent, or relative for perplexities."""
    if row["kind"] == PERPLEXITY:
        return f"{value / row['exact']:{sign}.1%}"
    return f"{100 * value:{sign}.1f}" if row["kind"] == PROPORTION else f"{value:{sign}.3g}"


def _of(row: dict) -> tuple[str, str]:
    return row["task"], row["metric"]
