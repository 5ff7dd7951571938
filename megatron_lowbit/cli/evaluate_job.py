"""The arguments of `evaluate`, and everything about them that can be checked before a model is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ..calibration_file import Calibration
from ..config import ALGORITHMS, DEFAULT_SPEC, CommConfig
from ..errors import ConfigError
from ..evaluation.cases import Case
from ..plan_file import Plan
from ..spec import parse
from . import evaluate_page, launch
from .calibrations import Calibrations
from .files import check_outputs, check_picture
from .job import EXACT
from .subject import Subject
from .tasks import Tasks

TP = 2  # ranks, where none are asked for


@dataclass(frozen=True)
class Job:
    """The checked arguments."""

    subject: Subject
    tps: tuple[int, ...]
    specs: tuple[str, ...]
    plans: tuple[Plan, ...]
    algorithms: tuple[str, ...]
    sites: tuple[str, ...] | None
    calibrations: Calibrations
    tasks: Tasks | None
    json: Path | None
    plot: Path | None
    report: Path | None
    sensitivity: dict | None  # for the report
    command: str
    progress: Path | None
    baseline: Path | None
    fail_above: float | None

    def cases(self, calibrations: Mapping[int, Calibration]) -> list[Case]:
        """All of them, TP by TP, each once. Raises ConfigError for a spec whose calibration is missing."""
        found = []
        for tp, spec, algorithm in product(self.tps, self.specs, self.algorithms):
            calibration = calibrations.get(tp) if parse(spec).calibrated else None
            found.append(Case(CommConfig(spec, algorithm, 0, self.sites, calibration=calibration), tp))
        for plan, algorithm in product(self.plans, self.algorithms):
            calibration = calibrations.get(plan.tp) if _calibrated(plan) else None
            named = plan.algorithm if algorithm == "auto" else algorithm  # plans may differ in nothing else
            config = CommConfig(None, named, 0, self.sites, calibration=calibration, plan=plan)
            found.append(Case(config, plan.tp))
        return list({case.key: case for case in found}.values())  # "auto" may be what was also named


def check(arguments: argparse.Namespace) -> Job:
    """Arguments -> Job. Raises ConfigError or ModelError for anything that can be known before a model is loaded."""
    if (launch.world_size() or 1) > 1:
        raise ConfigError("evaluate simulates all ranks in one process: start it without torchrun")
    for algorithm in arguments.comm_algorithm:
        if algorithm not in ALGORITHMS or algorithm == EXACT:
            raise ConfigError(f"--comm-algorithm is {algorithm!r}: use one of {', '.join(ALGORITHMS[:3])}")
    plans = tuple(Plan.load(path) for path in arguments.comm_plan or ())
    specs = arguments.comm or ([] if plans else [DEFAULT_SPEC])
    if EXACT in specs:
        raise ConfigError(f"--comm {EXACT} is what all others are compared with anyway: leave it out")
    specs = tuple(dict.fromkeys(str(parse(spec)) for spec in specs))
    tps = arguments.tp or [TP]
    for tp in tps:
        if tp < 2:
            raise ConfigError(f"--tp has {tp}: give 2 or more ranks, as fewer have nothing to communicate")
    for plan in plans if arguments.tp else ():
        if plan.tp not in tps:
            raise ConfigError(f"{plan.name} was made for TP {plan.tp}: add that to --tp, or make one for TP {tps[0]}")
    check_outputs(json=arguments.json, plot=arguments.plot, progress=arguments.progress)
    if arguments.baseline and arguments.fail_above is None:
        raise ConfigError("--baseline compares for --fail-above: give that too, such as --fail-above 0.5%")
    check_picture(arguments.plot)
    evaluate_page.check(arguments)
    subject = Subject.check(arguments)
    needing = {plan.tp: plan.name for plan in plans if _calibrated(plan)}
    needing |= {tp: spec for tp in tps for spec in specs if parse(spec).calibrated}
    return Job(
        subject,
        tuple(tps),
        specs,
        plans,
        tuple(arguments.comm_algorithm),
        arguments.comm_sites and tuple(arguments.comm_sites),
        Calibrations.check(arguments, needing),
        Tasks.check(arguments, subject),
        arguments.json,
        arguments.plot,
        arguments.report,
        evaluate_page.sensitivity(arguments.report_sensitivity, subject.folder.folder),
        evaluate_page.command(arguments),
        arguments.progress,
        arguments.baseline,
        arguments.fail_above,
    )


def _calibrated(plan: Plan) -> bool:
    """Whether some site's spec needs a calibration."""
    return any(spec.calibrated for spec in plan.specs)
