"""`tune`: which algorithm is fastest on these ranks for messages of each size, measured, and written for later runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .. import tuned_lookup
from ..config import DEFAULT_SPEC
from ..errors import ConfigError
from ..tuned_table import DTYPES, TunedTable
from . import launch
from .files import check_output

if TYPE_CHECKING:
    from ..tuning.tuner import Job

HELP = "measure which algorithm is fastest here, by message size"
DESCRIPTION = """Measure, on the ranks that your launcher started, which algorithm is fastest for
messages of each size, and whether any is faster than exact. Each is verified
before it is timed. Later runs on such ranks use the result by themselves."""
EXAMPLES = """examples:
  megatron-lowbit tune --tp 4                             4 ranks on this machine
  torchrun --nnodes 2 --nproc-per-node 8 … -m megatron_lowbit tune --comm int4:g32 int8:g128
  deepspeed --hostfile hosts --module megatron_lowbit tune --budget-seconds 300
  megatron-lowbit tune --tp 2 --bytes 65536 1048576 --dtype bf16 fp16 --out tuned.json
  LOWBIT_TUNED=tuned.json torchrun …                      use that file; LOWBIT_TUNED=none: use no table
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `tune`."""
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--comm", nargs="+", action="extend", metavar="SPEC", help=f"specs to measure (default: {DEFAULT_SPEC})"
    )
    what.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"], help="of messages (default: bf16)")
    what.add_argument("--bytes", nargs="+", type=int, metavar="N", help="sizes (default: 16 KiB to 64 MiB)")
    what.add_argument(
        "--budget-seconds", type=float, metavar="S", default=120.0, help="stop after this time (default: %(default)g)"
    )
    ranks = parser.add_argument_group("ranks")
    ranks.add_argument("--tp", type=int, metavar="N", help="ranks (default: as many as a launcher started, or 2)")
    ranks.add_argument(
        "--timeout", type=float, metavar="SECONDS", default=300, help="give up on a silent rank (default: 300)"
    )
    out = parser.add_argument_group("results")
    out.add_argument("--out", type=Path, metavar="FILE", help="table to write (default: where later runs look for it)")
    out.add_argument("--json", action="store_true", help="print the table as JSON instead")


def run(arguments: argparse.Namespace) -> int:
    """Check everything once, then start ranks or, inside one, measure. Returns the exit code."""
    job = _check(arguments)
    ranks = arguments.tp if arguments.tp is not None else launch.world_size() or 2
    if ranks < 2:
        raise ConfigError(f"{ranks} rank has nothing to communicate: start 2 or more, with --tp N or a launcher")
    if os.environ.get("RANK", "0") == "0":  # it writes; elsewhere there may be no such folder
        check_output(arguments.out, "--out")
    if launch.world_size() is None:
        return launch.start_ranks(ranks, arguments.argv, arguments.debug)
    with launch.process_group(ranks, arguments.timeout):
        _work(job, arguments)
    return 0


def _check(arguments: argparse.Namespace) -> Job:
    if find_spec("rich") is None:
        raise ConfigError("tune needs rich: pip install 'megatron-lowbit[hf]'")
    from ..tuning.tuner import SIZES, Job

    if not 0 < arguments.timeout <= 1e6:
        raise ConfigError(f"--timeout is {arguments.timeout}: give seconds above 0, at most a million")
    specs = tuple(arguments.comm or [DEFAULT_SPEC])
    return Job(specs, tuple(arguments.dtype), tuple(arguments.bytes or SIZES), arguments.budget_seconds)


def _work(job: Job, arguments: argparse.Namespace) -> None:
    """Inside a rank: measure; then, on rank 0, write and report."""
    import torch
    import torch.distributed as dist

    from ..collectives import probe
    from ..tuning import expectation
    from ..tuning.tuner import Tuner
    from . import tune_report

    group, first = dist.group.WORLD, dist.get_rank() == 0
    with _bar(job, shown=first) as advance:
        tuner = Tuner(group, job, advance)
        table = tuner.table()
    cuda = torch.cuda.is_available()
    gbit = None if cuda else probe.gbit_per_second(group)
    if not first:
        return
    path = arguments.out or tuned_lookup.place(table.key)
    if path is None:
        raise ConfigError("this user has no home folder to keep a table in: give --out FILE")
    whole, said = with_others(table, path)
    if arguments.out is None:
        _make(path.parent)
    whole.save(path)
    lines = expectation.lines(table.key.device if cuda else "cpu", gbit, table.key.world, len(table.key.nodes))
    tune_report.show(job, table, path, said, lines, arguments.json, automatic=arguments.out is None)


def with_others(table: TunedTable, path: Path) -> tuple[TunedTable, str | None]:
    """With what an earlier run found there for other specs, if that still holds; and what is to be said about that."""
    if not path.exists():
        return table, None
    try:
        earlier = TunedTable.load(path)
        earlier.check(table.key)
    except ConfigError as error:
        return table, f"replaced what was there: {error}"
    kept = {part: rows for part, rows in earlier.rows.items() if part not in table.rows}
    if not kept or earlier.margin != table.margin:
        return table, None
    return replace(table, rows=kept | dict(table.rows)), f"kept there: {', '.join(' '.join(part) for part in kept)}"


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"folder {folder} cannot be made ({error}): give --out FILE") from error


@contextmanager
def _bar(job: Job, shown: bool) -> Iterator:
    """Progress over specs, dtypes and sizes, on stderr."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), *Progress.get_default_columns()[3:])
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task("tune", total=len(job.parts) * len(job.sizes))
        begun = 0

        def advance(what: str) -> None:
            nonlocal begun
            progress.update(task, description=what, completed=begun)
            begun += 1

        yield advance
        progress.update(task, description="tuned", completed=begun)
