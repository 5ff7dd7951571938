"""What a person sees of an evaluation, and what is written for machines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..evaluation.cases import Case
from ..evaluation.gate import Gate
from ..evaluation.metrics import Tokens, summary
from . import tasks_report

if TYPE_CHECKING:
    from .evaluate_job import Job
    from .tasks import Answers

GATE_FAILED = 3  # exit code


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
    console.print(_table(facts, rows))
    notes = job.subject.notes(row["tp"] for row in rows)
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True)
    found = {"rows": list(rows), "notes": notes}
    if answers:
        found |= {"tasks": tasks_report.rows(answers.found)} | answers.facts
        tasks_report.show(console, found["tasks"])
    if job.json:
        text = json.dumps(facts | made() | found | {"tensors": job.subject.digests}, indent=1)
        job.json.write_text(text + "\n", encoding="utf-8")
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


def _table(facts: Mapping[str, str], rows: Sequence[dict]) -> Table:
    text = f"{rows[0]['tokens']:,} tokens of {rows[0]['windows']} windows"
    title = f"{facts['model']} on {facts['text']}, {text}, {facts['dtype']}"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("TP", "spec", "bits", "perplexity", "loss", "± 95 %", "KL mean", "KL p99", "top-1"):
        table.add_column(column, justify="left" if column == "spec" else "right", no_wrap=column != "spec")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        low, high = row["loss_interval"]
        table.add_row(
            str(row["tp"]),
            row["plan"] or row["spec"],
            f"{row['bits_per_value']:.2f}",
            f"{row['perplexity']:.2f}",
            f"{row['loss']:+.2%}",
            f"{(high - low) / 2:.2%}",
            f"{row['kl_mean']:.5f}",
            f"{row['kl_p99']:.4f}",
            f"{row['top1_agreement']:.1%}",
            end_section=following is not None and following["tp"] != row["tp"],
        )
    table.caption = (
        f"exact: {rows[0]['perplexity_exact']:.3f}. loss: of perplexity, paired on the same windows; bits: per value, "
        "over all hops; KL: from the exact distribution of the next token, nats; top-1: how often both choose alike"
    )
    return table
