"""What every benchmark shares: machine facts, timing, tables and the JSON they leave behind."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import megatron_lowbit as lowbit

RESULTS = Path(__file__).parent / "results"


def machine() -> dict:
    """What the figures were measured on, with which versions, when and by which command."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    return {
        "cpu": cpu or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": __import__("numba").__version__,
        "megatron_lowbit": lowbit.__version__,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *map(_without_folders, sys.argv[1:])]),
    }


def _without_folders(argument: str) -> str:
    """A path outside of the repository says nothing to a reader: its last part does."""
    return Path(argument).name if os.path.isabs(argument) else argument


def time_calls(function: Callable[[], object], repeats: int) -> dict[str, float]:
    """Seconds of `repeats` calls after one that warms up: median, p20 and p80."""
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    cuts = statistics.quantiles(seconds, n=5) if repeats > 1 else seconds * 4
    return {"median": statistics.median(seconds), "p20": cuts[0], "p80": cuts[3]}


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table: the first column to the left, the others to the right."""
    table = Table(title=title)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        table.add_row(*row)
    console = Console()
    (console if console.is_terminal else Console(width=130)).print(table)


def save(path: Path | None, rows: list[dict], **facts) -> None:
    """Write {"machine", …facts, "rows"} to `path`, if there is one."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine(), **facts, "rows": rows}, indent=1) + "\n")
