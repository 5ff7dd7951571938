"""The arguments of `plan`, and everything about them that can be checked before a model is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..evaluation.budget import Budget
from ..evaluation.knapsack import check_installed
from ..policy import resolved
from ..spec import parse_leg
from . import launch
from .calibrations import Calibrations
from .files import check_outputs, read_text
from .job import EXACT
from .sensitivity import check_comm
from .subject import Subject

if TYPE_CHECKING:
    from ..evaluation.windows import Window

CANDIDATES = (  # the least error for their bits in docs/codecs.md, from 2 bits to hardly any loss
    "gauss2:g256:trellis",
    "gauss3:g256:trellis",
    "gauss4:g256:trellis",
    "gauss5:g256:trellis",
    "gauss6:g256",
    "gauss7:g256",
    "int8:g128",
)
PROBE = "gauss3:g256:trellis"  # loud enough to be heard above rounding in bf16, quiet enough that effects add
DIRECT = "none"
PLANNING, HELD_OUT = 16, 32  # windows, at most


@dataclass(frozen=True)
class Job:
    """The checked arguments. probe: None to measure every candidate."""

    subject: Subject
    tp: int
    algorithm: str
    candidates: tuple[str, ...]
    probe: str | None
    budget: Budget
    calibrations: Calibrations
    held_out: Path | None
    held_out_count: int | None
    out: Path
    json: Path | None
    progress: Path | None

    @property
    def measured(self) -> tuple[str, ...]:
        """The specs whose effects are measured."""
        return (self.probe,) if self.probe else self.candidates

    def windows(self) -> tuple[list[Window], Subject, list[Window], int]:
        """(windows to plan on, whose text the others are of, held-out windows, the number of their first).

        From one text: the first windows are planned on, those behind them held out, none of which overlaps with them.
        Raises ConfigError if the text is too short.
        """
        subject = self.subject
        if self.held_out is not None:
            other = subject.reading(self.held_out, self.held_out_count, HELD_OUT)
            return subject.windows, other, other.windows, 0
        body = subject.length - len(subject.prefix)
        gap = max(0, ceil(body / (subject.stride or body)) - 1)
        planning, held_out = subject.count, self.held_out_count
        most = (planning or PLANNING) + gap + (held_out or HELD_OUT)
        whole = subject.reading(subject.path, None, most).windows
        there = len(whole) - gap
        if planning is None:
            planning = min(PLANNING, max(1, there // 3 if held_out is None else there - held_out))
        if held_out is None:
            held_out = min(HELD_OUT, max(1, there - planning))
        if planning + held_out > there:
            raise ConfigError(
                f"the text has {len(whole)} windows of {subject.length} tokens, and {planning} to plan on and "
                f"{held_out} to hold out need {planning + gap + held_out}: give a longer text, fewer or shorter "
                "windows, or --held-out FILE"
            )
        first = planning + gap
        return whole[:planning], subject, whole[first : first + held_out], first


def check(arguments: argparse.Namespace) -> Job:
    """Arguments -> Job. Raises ConfigError or ModelError for anything that can be known before a model is loaded."""
    if (launch.world_size() or 1) > 1:
        raise ConfigError("plan simulates all ranks in one process: start it without torchrun")
    check_comm(arguments)
    check_installed()
    budget = _budget(arguments)
    candidates = _candidates(arguments.candidates)
    probe = None if arguments.probe == DIRECT else str(parse_leg(arguments.probe))
    if arguments.held_out_windows is not None and arguments.held_out_windows < 1:
        raise ConfigError(f"--held-out-windows is {arguments.held_out_windows}: give 1 or more")
    check_outputs(out=arguments.out, json=arguments.json, progress=arguments.progress)
    subject = Subject.check(arguments)
    if arguments.held_out is not None and read_text(arguments.held_out, "--held-out") == subject.text:
        raise ConfigError("--held-out is the text that is planned on: give another, or leave it out")
    needing = [spec for spec in (*candidates, *([probe] if probe else ())) if parse_leg(spec).calibrated]
    calibrations = Calibrations.check(arguments, {arguments.tp: needing[0]} if needing else {})
    if arguments.held_out is not None:
        calibrations.check_text(read_text(arguments.held_out, "--held-out"), "that is held out")
    return Job(
        subject,
        arguments.tp,
        resolved(arguments.comm_algorithm, arguments.tp),
        candidates,
        probe,
        budget,
        calibrations,
        arguments.held_out,
        arguments.held_out_windows,
        arguments.out,
        arguments.json,
        arguments.progress,
    )


def _budget(arguments: argparse.Namespace) -> Budget:
    given = {kind: getattr(arguments, f"budget_{kind}") for kind in ("kl", "perplexity", "bits")}
    given = {kind: value for kind, value in given.items() if value is not None}
    if len(given) != 1:
        what = "two budgets exclude each other" if given else "a plan needs a budget"
        raise ConfigError(f"{what}: give one of --budget-kl, --budget-perplexity and --budget-bits")
    return Budget(*next(iter(given.items())))


def _candidates(given: Sequence[str] | None) -> tuple[str, ...]:
    names = [name for part in given or CANDIDATES for name in part.split(",") if name.strip()]
    if not names:
        raise ConfigError("--candidates is empty: give specs of one leg, such as gauss4:g256:trellis,int8:g128")
    chosen = tuple(dict.fromkeys(str(parse_leg(name)) for name in names if name.strip() != EXACT))
    if not chosen:
        raise ConfigError(f"--candidates has only {EXACT!r}, which is always one: add specs")
    return chosen
