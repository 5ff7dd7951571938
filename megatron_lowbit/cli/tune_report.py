"""What `tune` shows: a table for each spec, what failed, what was not measured and what a model would expect."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..tuned_table import EXACT, Row, TunedTable

if TYPE_CHECKING:
    from ..tuning.tuner import Job


def show(
    job: Job, table: TunedTable, path: Path, said: str | None, expected: Iterable[str], as_json: bool, automatic: bool
) -> None:
    """Print it; with `as_json`, the table's JSON and what was not measured, and nothing else."""
    missing = unmeasured(job, table)
    if as_json:
        print(json.dumps(table.as_json() | {"file": str(path), "not_measured": missing}, indent=1, allow_nan=False))
        return
    console = Console(highlight=False, emoji=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
    key = table.key
    console.print(
        f"{escape(key.device)} · {key.world} ranks (by node: {' + '.join(map(str, key.nodes))}) · {key.backend} · "
        f"{table.seconds:.1f} s of {table.budget_seconds:g} s"
    )
    for (spec, dtype), rows in table.rows.items():
        console.print(_table(f"{spec}, {dtype}", rows))
    for part, rows in table.rows.items():
        for line in (line for row in rows for line in _notes(f"{' '.join(part)}, {row.bytes:,} bytes", row)):
            console.print(escape(line))
    for line in (*missing, *expected, *([said] if said else [])):
        console.print(escape(line))
    after = "used from now on by such ranks" if automatic else f"use it with LOWBIT_TUNED={path} or CommConfig(tuned=…)"
    console.print(escape(f"written to {path}: {after}"))


def unmeasured(job: Job, table: TunedTable) -> list[str]:
    """What there was no time for."""
    found = []
    for part in job.parts:
        measured = {row.bytes for row in table.rows.get(part, ())}
        if left := [f"{size:,}" for size in job.sizes if size not in measured]:
            found.append(f"not measured, as the time was over: {' '.join(part)}, {', '.join(left)} bytes")
    return found


def _table(title: str, rows: Iterable[Row]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in ("bytes", "exact, ms", "fastest", "ms", "exact / fastest", "compressed at best"):
        table.add_column(name, justify="left" if name in ("fastest", "compressed at best") else "right")
    for row in rows:
        exact, best = row.ms[EXACT], row.ms[str(row.best)]
        others = {name: taken for name, taken in row.ms.items() if name != EXACT}
        other = min(others, key=others.get, default=None)
        beside = "-" if other is None else f"{other}  {others[other]:.3f} ms"
        table.add_row(f"{row.bytes:,}", f"{exact:.3f}", str(row.best), f"{best:.3f}", f"{exact / best:.2f}", beside)
    return table


def _notes(where: str, row: Row) -> Iterable[str]:
    for name, why in row.failed.items():
        yield f"FAILED {name} at {where}: {why}"
    for name, why in row.skipped.items():
        yield f"not timed further: {name} at {where}: {why}"
