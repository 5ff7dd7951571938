"""What a person sees of an evaluation, and what is written for machines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import whole_file
from ..evaluation.cases import Case
from ..evaluation.gate import Gate
from ..evaluation.metrics import Tokens, summary
from ..evaluation.verdict import name, saving
from . import GATE_FAILED, tasks_report
from .files import write

if TYPE_CHECKING:
    from .evaluate_job import Job
    from .tasks import Answers


def nats(value: float, digits: int) -> str:
    """A KL divergence with so many decimals, or as 1e-07 where these would not show it."""
    return f"{value:.0e}" if 0 < abs(value) < 10**-digits else f"{value:.{digits}f}"


COLUMNS: dict[str, Callable[[dict], str]] = {
    "TP": lambda row: str(row["tp"]),
    "spec": name,
    "algorithm": lambda row: row["algorithm"] + (f", {row['nodes']} nodes" if row.get("nodes") else ""),
    "bits": lambda row: f"{row['bits_per_value']:.2f}",
    "saved": lambda row: f"{1 - 1 / saving(row):.0%}",
    "perplexity": lambda row: f"{row['perplexity']:.2f}",
    "loss": lambda row: f"{row['loss']:+.2%}",
    "± 95 %": lambda row: f"{(row['loss_interval'][1] - row['loss_interval'][0]) / 2:.2%}",
    "KL mean": lambda row: nats(row["kl_mean"], 5),
    "KL p99": lambda row: nats(row["kl_p99"], 4),
    "top-1": lambda row: f"{row['top1_agreement']:.1%}",
}
MEANINGS = {
    "loss": "of perplexity, paired on the same windows",
    "bits": "per value, over all hops",
    "saved": "of the bytes of bf16",
    "KL mean": "divergence from the exact distribution of a scored token, nats",
    "KL p99": "what 1 % of the tokens exceed",
    "top-1": "how often both choose alike",
}
DISPENSABLE = ("saved", "KL p99", "perplexity", "top-1", "KL mean")  # the first goes first


def rows(found: Mapping[Case, Sequence[Tokens]], features: Mapping[str, int]) -> list[dict]:
    """The documented rows of the JSON, a case each: docs/evaluate.md."""
    return [
        {
            "spec": case.config.spec,
            "tp": case.tp,
            "algorithm": case.algorithm,
            "sites": case.config.sites,
            "plan": case.config.planned and case.config.planned.name,
            "plan_digest": case.config.plan_digest,
            **case.hierarchy,
            "bits_per_value": case.bits_per_value(features),
            "bytes_per_token": case.bytes_per_token(features),
            "bytes_per_token_bf16": sum(features.values()) * 2 * 2 * (case.tp - 1) / case.tp,
            **asdict(summary(tokens)),
        }
        for case, tokens in found.items()
    ]


def show(job: Job, rows: Sequence[dict], gate: Gate | None, answers: Answers | None = None) -> int:
    """Print the tables, write what was asked for -> the exit code."""
    facts = job.subject.facts
    console = Console(highlight=False, emoji=False)
    console.print(table(facts, rows, console))
    notes = job.subject.notes(row["tp"] for row in rows)
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True)
    found = {"rows": list(rows), "notes": notes}
    if answers:
        found |= {"tasks": tasks_report.rows(answers.found)} | answers.facts
        tasks_report.show(console, found["tasks"])
    if job.json:
        text = whole_file.as_json(facts | made() | found | {"tensors": job.subject.digests})
        write(job.json, text.encode(), "--json")
    if job.plot:
        from ..evaluation.plot import plot

        plot(rows, f"{facts['model']} on {facts['text']}", job.plot)
    failures = gate.failures(rows) if gate else []
    for failure in failures:
        console.print(f"[red]too much worse:[/] {failure}", soft_wrap=True)
    return GATE_FAILED if failures else 0


def made() -> dict[str, str]:
    """By which versions, and when."""
    import torch

    from .. import __version__

    return {"megatron_lowbit": __version__, "torch": torch.__version__, "date": date.today().isoformat()}


def table(facts: Mapping[str, str], rows: Sequence[dict], console: Console) -> Table:
    """All rows; of the columns, as many as the console has room for. A spec is never cut."""
    columns = dict(COLUMNS)
    if len({row["tp"] for row in rows}) == len({(row["tp"], row["algorithm"]) for row in rows}):
        del columns["algorithm"]  # the TP size says it
    found, left_out = _filled(columns, rows), []
    unbounded = console.options.update(max_width=10 * console.width)
    for column in DISPENSABLE:
        if console.measure(found, options=unbounded).maximum <= console.width:
            break
        del columns[column]
        left_out.append(column)
        found = _filled(columns, rows)
    text = f"{rows[0]['tokens']:,} tokens of {rows[0]['windows']} windows"
    found.title = escape(f"{facts['model']} on {facts['text']}, {text}, {facts['dtype']}")
    meanings = [f"exact: {rows[0]['perplexity_exact']:.3f}"]
    meanings += [f"{column}: {meaning}" for column, meaning in MEANINGS.items() if column not in left_out]
    if left_out:
        meanings.append(f"left out, as the terminal is narrow: {', '.join(left_out)}")
    found.caption = "; ".join(meanings)
    return found


def _filled(columns: Mapping[str, Callable[[dict], str]], rows: Sequence[dict]) -> Table:
    found = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
    for column in columns:
        left = column in ("spec", "algorithm")
        found.add_column(column, justify="left" if left else "right", no_wrap=column != "spec", overflow="fold")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        last = following is not None and following["tp"] != row["tp"]
        found.add_row(*(escape(cell(row)) for cell in columns.values()), end_section=last)
    return found
