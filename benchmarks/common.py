"""What every benchmark shares: machine facts, timing, tables and the JSON they leave behind."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
if find_spec("megatron_lowbit") is None:  # a bare checkout: nothing is installed, nor can be on some machines
    sys.path.append(str(RESULTS.parents[1]))

import megatron_lowbit as lowbit  # noqa: E402


@cache
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
        "driver": _driver(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numba": _version("numba"),
        "megatron_lowbit": lowbit.__version__,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *map(_without_folders, sys.argv[1:])]),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """NVIDIA's, if it can be read."""
    if not torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


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
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("\n".join([title, *("  ".join(row) for row in [columns, *rows])]))
        return
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
