"""The arguments of `evaluate`, and everything about them that can be checked before a model is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ..calibration_file import Calibration
from ..collectives.topology import Nodes
from ..config import COMPRESSING, DEFAULT_SPEC, CommConfig
from ..errors import ConfigError
from ..evaluation.cases import Case
from ..plan_file import Plan
from ..spec import Spec, parse
from . import evaluate_page, launch
from .calibrations import Calibrations
from .files import check_outputs, check_picture
from .job import EXACT
from .subject import Subject
from .tasks import Tasks

TP = 2  # ranks, where none are asked for
NESTING = ("auto", "hierarchical")  # algorithms that make something of nodes


@dataclass(frozen=True)
class Job:
    """The checked arguments."""

    subject: Subject
    tps: tuple[int, ...]
    specs: tuple[str, ...]
    plans: tuple[Plan, ...]
    algorithms: tuple[str, ...]
    nodes: int
    outer: str | None
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
            outer = self._outer(algorithm)
            calibration = calibrations.get(tp) if _calibrated(spec, outer) else None
            config = CommConfig(spec, algorithm, 0, self.sites, calibration=calibration, outer_spec=outer)
            found.append(Case(config, tp, self.nodes))
        for plan, algorithm in product(self.plans, self.algorithms):
            named = plan.algorithm if algorithm == "auto" else algorithm  # plans may differ in nothing else
            outer = self._outer(named)
            calibration = calibrations.get(plan.tp) if _calibrated(*plan.specs, outer) else None
            config = CommConfig(None, named, 0, self.sites, calibration=calibration, plan=plan, outer_spec=outer)
            found.append(Case(config, plan.tp, self.nodes))
        return list({case.key: case for case in found}.values())  # "auto" may be what was also named

    def _outer(self, algorithm: str) -> str | None:
        return self.outer if algorithm in NESTING else None


def check(arguments: argparse.Namespace) -> Job:
    """Arguments -> Job. Raises ConfigError or ModelError for anything that can be known before a model is loaded."""
    if (launch.world_size() or 1) > 1:
        raise ConfigError("evaluate simulates all ranks in one process: start it without torchrun")
    for algorithm in arguments.comm_algorithm:
        if algorithm not in COMPRESSING:
            raise ConfigError(f"--comm-algorithm is {algorithm!r}: use one of {', '.join(COMPRESSING)}")
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
    _check_nodes(arguments, [plan.tp for plan in plans] if plans and not arguments.tp else tps)
    check_outputs(json=arguments.json, plot=arguments.plot, progress=arguments.progress)
    if arguments.baseline and arguments.fail_above is None:
        raise ConfigError("--baseline compares for --fail-above: give that too, such as --fail-above 0.5%")
    check_picture(arguments.plot)
    evaluate_page.check(arguments)
    subject = Subject.check(arguments)
    outer = arguments.comm_outer
    needing = {plan.tp: plan.name for plan in plans if _calibrated(*plan.specs, outer)}
    needing |= {tp: spec for tp in tps for spec in specs if _calibrated(spec, outer)}
    return Job(
        subject,
        tuple(tps),
        specs,
        plans,
        tuple(arguments.comm_algorithm),
        arguments.nodes,
        outer,
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


def _check_nodes(arguments: argparse.Namespace, tps: list[int]) -> None:
    """Raise ConfigError for nodes that the ranks cannot be on, or that nothing is made of."""
    asked = [name for name in arguments.comm_algorithm if name in NESTING]
    if arguments.comm_outer is not None and not (asked and arguments.nodes > 1):
        raise ConfigError(
            f"--comm-outer {arguments.comm_outer} is what travels between nodes: give --nodes 2 or more too, and "
            f"--comm-algorithm {' or '.join(NESTING)}"
        )
    for tp in tps:
        if not Nodes.among(tp, arguments.nodes).nested and "hierarchical" in arguments.comm_algorithm:
            raise ConfigError(
                f"--comm-algorithm hierarchical with --tp {tp} and --nodes {arguments.nodes}: give 2 nodes or more, of "
                "2 ranks or more each"
            )


def _calibrated(*specs: str | Spec | None) -> bool:
    """Whether one of them needs a calibration."""
    return any(parse(str(spec)).calibrated for spec in specs if spec is not None)
