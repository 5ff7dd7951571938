"""`evaluate`: what each spec costs in accuracy at each TP size, on one device and before any rank is started."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from ..config import COMPRESSING, DEFAULT_SPEC
from . import GATE_FAILED, calibrations, subject, tasks
from .evaluate_job import check

HELP = "what specs cost in accuracy at a TP size, on one device"
DESCRIPTION = """Compare a model's predictions with compressed partial sums to its own, token by
token, for every spec and TP size. One process simulates all ranks, bit for bit
what they would reduce; no rank is started."""
EXAMPLES = """examples:
  megatron-lowbit evaluate --tp 2,4,8 --comm int8:g128 int4:g32 gauss4:g128
  megatron-lowbit evaluate --model ~/models/Llama-3.2-1B --text held-out.txt \\
      --tp 4 --comm int4:g32 --json now.json
  megatron-lowbit evaluate --comm int4:g32 --baseline old.json --fail-above 0.5%
      exit code 3 if it got worse
  megatron-lowbit evaluate --tp 8 --comm selective4 \\
      --calibration-text other.txt --progress p.safetensors
  megatron-lowbit evaluate --tp 8 --comm int4:g32 --text held-out.txt \\
      --tasks local_cloze,local_choice --task-limit 500
  megatron-lowbit evaluate --tp 8 --nodes 2 --comm int4:g32 --comm-outer int3:g32
      2 nodes of 4 ranks, and fewer bits between the nodes
  megatron-lowbit evaluate --tp 2,8 --comm int8:g128 int4:g32 --report report
      then open report/index.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evaluate`."""
    subject.add_arguments(parser)
    comm = parser.add_argument_group("communication")
    comm.add_argument("--tp", type=_sizes, metavar="N,N", help="tensor-parallel ranks (default: 2, or a plan's)")
    comm.add_argument(
        "--comm", nargs="+", action="extend", metavar="SPEC", help=f"what travels (default: {DEFAULT_SPEC})"
    )
    comm.add_argument(
        "--comm-plan",
        "--lowbit-comm-plan",
        type=Path,
        action="append",
        metavar="FILE",
        help="a spec for each site; at its TP size",
    )
    comm.add_argument(
        "--comm-algorithm",
        "--algorithm",
        nargs="+",
        metavar="NAME",
        default=["auto"],
        help=f"one or more of {', '.join(COMPRESSING)} (default: auto)",
    )
    comm.add_argument("--nodes", type=int, metavar="K", default=1, help="that the ranks are on, for hierarchical")
    comm.add_argument("--comm-outer", metavar="SPEC", help="what travels between nodes (default: what --comm says)")
    comm.add_argument("--comm-sites", metavar="GLOB", action="append", help="compress these sites only")
    calibrations.add_arguments(comm)
    tasks.add_arguments(parser)
    out = parser.add_argument_group("results")
    out.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")
    out.add_argument("--plot", type=Path, metavar="PNG", help="draw loss against bits per value")
    out.add_argument("--report", type=Path, metavar="DIR", help="write a page with tables and plots: DIR/index.html")
    out.add_argument("--report-sensitivity", type=Path, metavar="FILE", help="sensitivity's --json, for the page")
    out.add_argument("--progress", type=Path, metavar="FILE", help="keep what was found here, and go on from there")
    out.add_argument("--baseline", type=Path, metavar="FILE", help="--json of an earlier run to compare with")
    out.add_argument(
        "--fail-above",
        type=percent,
        metavar="P%",
        help=f"end with {GATE_FAILED} if perplexity is higher by more: than the baseline's, or else than exact",
    )


def _sizes(text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(size) for size in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 2,4,8") from None


def percent(text: str) -> float:
    """1% -> 0.01, for argparse."""
    try:
        found = float(text.removesuffix("%")) / 100
    except ValueError:
        found = math.nan
    if not math.isfinite(found):  # a gate of infinite width would never fail
        raise argparse.ArgumentTypeError(f"{text!r} is no percentage such as 1%")
    return found


def run(arguments: argparse.Namespace) -> int:
    """Check everything, evaluate all cases, report. Returns the exit code: 3 if the gate fails."""
    from ..evaluation.gate import Gate
    from . import evaluate_page, evaluate_report, tasks_report
    from .evaluating import evaluated

    job = check(arguments)
    of = job.subject
    windows = of.windows  # first: a text that is too short is said before anything takes long
    gate = Gate.load(job.baseline, job.fail_above, of.facts, of.digests) if job.fail_above is not None else None
    if job.tasks:
        job.tasks.ready(job.calibrations)
    calibrations = job.calibrations.made(of)
    cases = job.cases(calibrations)
    rows = evaluate_report.rows(evaluated(of, cases, windows, job.progress), of.features)
    answers = job.tasks and job.tasks.answers(cases, job.progress)
    code = evaluate_report.show(job, rows, gate, answers)
    if job.report:  # last, as it runs the model again: what was found is written by then
        evaluate_page.write(job, rows, calibrations, tasks_report.rows(answers.found) if answers else ())
    if answers:
        answers.check()  # when everything else has been shown and written
    return code
