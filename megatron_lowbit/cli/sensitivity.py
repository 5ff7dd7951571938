"""`sensitivity`: which sites the loss of a spec comes from, and why there."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .. import whole_file
from ..config import ALGORITHMS, DEFAULT_SPEC, CommConfig
from ..errors import ConfigError
from ..spec import parse
from . import calibrations, launch, subject
from .calibrations import Calibrations
from .files import check_outputs, check_picture, write
from .job import EXACT
from .subject import Subject

HELP = "which sites the loss of a spec comes from"
DESCRIPTION = """Compress one site at a time, or one group of sites, all others exact: the KL
divergence that each causes alone, how much noise there is in its sum, and in
words what that means. One process simulates all ranks."""
EXAMPLES = """examples:
  megatron-lowbit sensitivity --tp 8 --comm int2:g32
  megatron-lowbit sensitivity --model DIR --text held-out.txt --tp 4 \\
      --comm int4:g32 --windows 8 --plot where.png
  megatron-lowbit sensitivity --model DIR --tp 8 --comm int4:g32 --by layer \\
      --progress p.safetensors --json now.json
"""
BY = ("site", "layer", "kind")
WINDOWS = 16  # KL divergence has no noise from the text: few windows tell, and there is a run for every site


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sensitivity`."""
    subject.add_arguments(parser, WINDOWS)
    comm = parser.add_argument_group("communication")
    comm.add_argument("--tp", type=int, metavar="N", default=2, help="tensor-parallel ranks (default: 2)")
    comm.add_argument("--comm", metavar="SPEC", default=DEFAULT_SPEC, help="what travels (default: %(default)s)")
    comm.add_argument(
        "--comm-algorithm",
        "--algorithm",
        metavar="NAME",
        default="auto",
        help=f"one of {', '.join(ALGORITHMS[:3])} (default: auto)",
    )
    comm.add_argument("--comm-sites", metavar="GLOB", action="append", help="look at these sites only")
    comm.add_argument("--by", choices=BY, default="site", help="what is compressed at a time (default: %(default)s)")
    calibrations.add_arguments(comm)
    out = parser.add_argument_group("results")
    out.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")
    out.add_argument("--plot", type=Path, metavar="PNG", help="draw a heat map, layer by kind of site")
    out.add_argument("--progress", type=Path, metavar="FILE", help="keep what was found here, and go on from there")


def run(arguments: argparse.Namespace) -> int:
    """Check everything, compress site by site, report. Returns the exit code."""
    subject, found_calibrations = check(arguments)
    from ..evaluation import sensitivity
    from ..evaluation.cases import Case
    from .evaluating import check_patterns, evaluated, measured_noise

    windows = subject.windows  # first: a text that is too short is said before anything takes long
    calibration = found_calibrations.made(subject).get(arguments.tp)
    sites = arguments.comm_sites and tuple(arguments.comm_sites)
    config = CommConfig(arguments.comm, arguments.comm_algorithm, 0, sites, calibration=calibration)
    case = Case(config, arguments.tp)
    check_patterns(sites or (), subject.features)
    chosen = [site for site in subject.features if config.selects(site)]
    groups = sensitivity.grouped(chosen, arguments.by)
    found = evaluated(subject, sensitivity.cases(case, groups), windows, arguments.progress)
    [noise] = measured_noise(subject, windows, [config], arguments.tp)
    result = sensitivity.sensitivity(case, groups, found, noise, subject.features)
    _show(subject, result, arguments, len(windows))
    return 0


def check(arguments: argparse.Namespace) -> tuple[Subject, Calibrations]:
    """Raises ConfigError or ModelError for anything that can be known before a model is loaded."""
    if (launch.world_size() or 1) > 1:
        raise ConfigError("sensitivity simulates all ranks in one process: start it without torchrun")
    check_comm(arguments)
    if arguments.comm == EXACT:
        raise ConfigError(f"--comm {EXACT} compresses nothing: give a spec such as {DEFAULT_SPEC}")
    calibrated = parse(arguments.comm).calibrated
    check_outputs(json=arguments.json, plot=arguments.plot, progress=arguments.progress)
    check_picture(arguments.plot)
    subject = Subject.check(arguments)
    return subject, Calibrations.check(arguments, {arguments.tp: arguments.comm} if calibrated else {})


def check_comm(arguments: argparse.Namespace) -> None:
    """--tp and --comm-algorithm. Raises ConfigError."""
    if arguments.comm_algorithm not in ALGORITHMS[:3]:
        raise ConfigError(f"--comm-algorithm is {arguments.comm_algorithm!r}: use one of {', '.join(ALGORITHMS[:3])}")
    if arguments.tp < 2:
        raise ConfigError(f"--tp is {arguments.tp}: give 2 or more ranks, as fewer have nothing to communicate")


def _show(subject: Subject, result, arguments: argparse.Namespace, windows: int) -> None:
    """Print the table and the paragraph, write what was asked for."""
    from rich.console import Console

    from .evaluate_report import made

    facts, case = subject.facts, result.case
    title = (
        f"{facts['model']} on {facts['text']}, {windows} windows, {case.config.spec}, TP {case.tp}, {case.algorithm}"
    )
    console = Console(highlight=False, emoji=False)
    console.print(_table(title, result.rows))
    console.print(result.explanation, markup=False)
    notes = subject.notes([case.tp])
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True)
    if arguments.json:
        found = facts | made() | {"windows": windows, "notes": notes} | result.facts
        write(arguments.json, whole_file.as_json(found).encode(), "--json")
    if arguments.plot:
        from ..evaluation.heat_map import heat_map

        write(arguments.plot, heat_map(result.rows, title), "--plot")


def _table(title: str, rows: Sequence[dict]):
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from .evaluate_report import nats

    table = Table(title=escape(title), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("compressed", "KL alone", "± error", "share", "SQNR, dB", "KL / noise"):
        table.add_column(column, justify="left" if column == "compressed" else "right")
    for row in rows:
        sqnr = row["sqnr_db"]
        table.add_row(
            escape(row["site"]),
            nats(row["kl_mean"], 6),
            nats(row["kl_error"], 6),
            f"{row['share']:.1%}",
            "-" if sqnr is None else f"{sqnr:.2f}",
            "-" if sqnr is None else f"{row['kl_mean'] * 10 ** (sqnr / 10):.4f}",
        )
    table.caption = (
        "KL: from the exact distribution of a scored token, nats, rounding of exact sums taken off; SQNR: of the "
        "reduced sum against the exact one; noise: as a part of the sum's energy"
    )
    return table
