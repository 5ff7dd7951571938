"""The arguments of `evaluate`, and everything about them that can be checked before a model is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import ALGORITHMS, DEFAULT_SPEC, CommConfig
from ..engines.registry import check_framework
from ..errors import ConfigError
from ..evaluation.cases import Case
from ..spec import parse
from . import launch
from .files import bundled, check_output
from .job import DTYPES, EXACT, trust_of

if TYPE_CHECKING:
    import torch

    from ..calibration_file import Calibration
    from ..engines.model_facts import ModelFacts, Trust

LENGTH = 512  # of a window, at most


@dataclass(frozen=True)
class Job:
    """The checked arguments."""

    model: Path
    facts: ModelFacts
    trust: Trust
    dtype: torch.dtype | None
    text: Path
    windows: int | None
    length: int
    stride: int | None
    tps: tuple[int, ...]
    specs: tuple[str, ...]
    plans: tuple[Path, ...]
    algorithms: tuple[str, ...]
    sites: tuple[str, ...] | None
    calibrations: Mapping[int, Calibration]
    calibration_text: Path | None
    json: Path | None
    plot: Path | None
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
            config = CommConfig(None, algorithm, 0, self.sites, plan=plan)
            found.append(Case(config, config.planned.tp))
        return list({case.key: case for case in found}.values())  # "auto" may be what was also named


def check(arguments: argparse.Namespace) -> Job:
    """Arguments -> Job. Raises ConfigError or ModelError for anything that can be known before a model is loaded."""
    if (launch.world_size() or 1) > 1:
        raise ConfigError("evaluate simulates all ranks in one process: start it without torchrun")
    for algorithm in arguments.comm_algorithm:
        if algorithm not in ALGORITHMS or algorithm == EXACT:
            raise ConfigError(f"--comm-algorithm is {algorithm!r}: use one of {', '.join(ALGORITHMS[:3])}")
    plans = tuple(arguments.comm_plan or ())
    specs = arguments.comm or ([] if plans else [DEFAULT_SPEC])
    if EXACT in specs:
        raise ConfigError(f"--comm {EXACT} is what all others are compared with anyway: leave it out")
    specs = tuple(dict.fromkeys(str(parse(spec)) for spec in specs))
    for tp in arguments.tp:
        if tp < 2:
            raise ConfigError(f"--tp has {tp}: give 2 or more ranks, as fewer have nothing to communicate")
    for name in ("json", "plot", "progress"):
        check_output(getattr(arguments, name), f"--{name}")
    if arguments.windows is not None and arguments.windows < 1:
        raise ConfigError(f"--windows is {arguments.windows}: give 1 or more")
    if arguments.baseline and arguments.fail_above is None:
        raise ConfigError("--baseline compares for --fail-above: give that too, such as --fail-above 0.5%")
    if arguments.plot:
        from ..calibration.plot import check_installed

        check_installed()
    check_framework("transformers")
    from ..engines.hf_folder import read_folder

    model = bundled(arguments.model, "model", "--model DIR")
    trust = trust_of(arguments)
    facts = read_folder(model, trust)
    if not facts.scores:
        raise ConfigError(f"{model} is an encoder-decoder, and a text alone has no perplexity: use a causal model")
    import torch

    positions, length = facts.max_positions, arguments.window_length
    length = min(LENGTH, positions or LENGTH) if length is None else length
    if positions is not None and length > positions:
        raise ConfigError(f"--window-length is {length}: give at most {positions} tokens, the model's positions")
    return Job(
        model,
        facts,
        trust,
        DTYPES[arguments.dtype] and getattr(torch, DTYPES[arguments.dtype]),
        arguments.text or bundled(None, "sample_text.txt", "--text FILE"),
        arguments.windows,
        length,
        arguments.stride,
        tuple(arguments.tp),
        specs,
        plans,
        tuple(arguments.comm_algorithm),
        arguments.comm_sites and tuple(arguments.comm_sites),
        _calibrations(arguments),
        arguments.calibration_text,
        arguments.json,
        arguments.plot,
        arguments.progress,
        arguments.baseline,
        arguments.fail_above,
    )


def _calibrations(arguments: argparse.Namespace) -> dict[int, Calibration]:
    """TP size -> what was calibrated for it. Raises ConfigError for what is missing, twice there or of no use."""
    from ..calibration_file import Calibration

    found: dict[int, Calibration] = {}
    for path in arguments.comm_calibration or ():
        calibration = Calibration.load(path)
        if calibration.tp in found:
            raise ConfigError(f"--comm-calibration has two files for TP {calibration.tp}: give one")
        found[calibration.tp] = calibration
    needing = [spec for spec in arguments.comm or () if parse(spec).calibrated]
    text = arguments.calibration_text
    if found and text:
        raise ConfigError("--comm-calibration and --calibration-text exclude each other: give one of them")
    if (found or text) and not (needing or arguments.comm_plan):
        raise ConfigError("no --comm makes use of a calibration: leave it out, or add a spec such as selective4")
    if needing and not text and (missing := [tp for tp in arguments.tp if tp not in found]):
        raise ConfigError(
            f"{needing[0]} needs a calibration at TP {missing[0]}: give --comm-calibration FILE, which calibrate "
            "writes, or --calibration-text FILE to make all that are needed"
        )
    return found
