"""Calibrations for the specs that need one: read from files, or made at once from another text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..calibration_file import Calibration
from ..errors import ConfigError
from ..plan_file import Plan
from ..spec import parse
from .files import read_text
from .subject import Subject


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """Add --comm-calibration and --calibration-text."""
    parser.add_argument(
        "--comm-calibration",
        type=Path,
        action="append",
        metavar="FILE",
        help="for specs that need one; one for each TP",
    )
    parser.add_argument(
        "--calibration-text", type=Path, metavar="FILE", help="or another text, to calibrate with at once"
    )


@dataclass(frozen=True)
class Calibrations:
    """The checked arguments. loaded: TP size -> what was calibrated for it. needed: TP sizes, for the text."""

    loaded: dict[int, Calibration]
    text: Path | None
    needed: tuple[int, ...]

    @classmethod
    def check(
        cls, arguments: argparse.Namespace, specs: Sequence[str], tps: Sequence[int], plans: Sequence[Plan] = ()
    ) -> Calibrations:
        """For all specs at all TP sizes, and each plan at its own. Raises ConfigError for what is missing, twice there
        or of no use."""
        found: dict[int, Calibration] = {}
        for path in arguments.comm_calibration or ():
            calibration = Calibration.load(path)
            if calibration.tp in found:
                raise ConfigError(f"--comm-calibration has two files for TP {calibration.tp}: give one")
            found[calibration.tp] = calibration
        needing = [(spec, tp) for spec in specs if parse(spec).calibrated for tp in tps]
        needing += [(f"{plan.name}'s {spec}", plan.tp) for plan in plans for spec in plan.specs if spec.calibrated]
        text = arguments.calibration_text
        if found and text:
            raise ConfigError("--comm-calibration and --calibration-text exclude each other: give one of them")
        if (found or text) and not needing:
            raise ConfigError("no spec makes use of a calibration: leave it out, or add a spec such as selective4")
        for what, tp in needing:
            if tp not in found and not text:
                raise ConfigError(
                    f"{what} needs a calibration at TP {tp}: give --comm-calibration FILE, which calibrate writes, or "
                    "--calibration-text FILE to make all that are needed"
                )
        return cls(found, text, tuple(dict.fromkeys(tp for _, tp in needing)))

    def made(self, subject: Subject) -> dict[int, Calibration]:
        """TP size -> calibration; from the text, if one was given, which must not be the one that is predicted."""
        if self.text is None:
            return self.loaded
        from ..calibration.collect import RangeTracker, watch
        from ..calibration.windows import draw
        from .calibrate import SAMPLES, SEQUENCE_LENGTH

        other = read_text(self.text, "--calibration-text")
        if other == subject.text:
            raise ConfigError(
                "--calibration-text is the text that is predicted: give another, or results would flatter"
            )
        length, model, found = min(SEQUENCE_LENGTH, subject.length), subject.model, {}
        try:
            windows = draw(subject.tokens(other), SAMPLES, length, seed=0, prefix=subject.prefix).to(model.device)
        except ConfigError as error:
            raise ConfigError(f"--calibration-text {self.text}: {error}") from error
        for tp in self.needed:
            tracker = RangeTracker()
            watch(model, windows, tp, tracker)
            found[tp] = tracker.finish()
        return found
