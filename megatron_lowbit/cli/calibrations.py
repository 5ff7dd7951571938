"""Calibrations for the specs that need one: read from files, or made at once from another text."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..calibration_file import Calibration
from ..errors import ConfigError
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
    """The checked arguments. loaded: TP size -> what was calibrated for it. needed: TP sizes that need one."""

    loaded: dict[int, Calibration]
    text: Path | None
    needed: tuple[int, ...]

    @classmethod
    def check(cls, arguments: argparse.Namespace, needing: Mapping[int, str]) -> Calibrations:
        """Raises ConfigError for what is missing, twice there or of no use. needing: TP size -> what needs one."""
        found: dict[int, Calibration] = {}
        for path in arguments.comm_calibration or ():
            calibration = Calibration.load(path)
            if calibration.tp in found:
                raise ConfigError(f"--comm-calibration has two files for TP {calibration.tp}: give one")
            found[calibration.tp] = calibration
        text = arguments.calibration_text
        if found and text:
            raise ConfigError("--comm-calibration and --calibration-text exclude each other: give one of them")
        if (found or text) and not needing:
            raise ConfigError("no spec makes use of a calibration: leave it out, or add a spec such as selective4")
        if not text and (missing := [tp for tp in needing if tp not in found]):
            raise ConfigError(
                f"{needing[missing[0]]} needs a calibration at TP {missing[0]}: give --comm-calibration FILE, which "
                "calibrate writes, or --calibration-text FILE to make all that are needed"
            )
        return cls(found, text, tuple(needing))

    def check_text(self, text: str, what: str) -> None:
        """Raise ConfigError if a calibration was made of this text, or will be. what: the text is, for the message."""
        digest = hashlib.sha256(text.encode()).hexdigest()
        if self.text is not None and read_text(self.text, "--calibration-text") == text:
            raise ConfigError(f"--calibration-text is the text {what}: give another, or results would flatter")
        for calibration in self.loaded.values():
            if calibration.metadata.get("text_sha256") == digest:
                raise ConfigError(
                    f"{calibration.name} was made of the text {what}: make one of another, or results would flatter"
                )

    def made(self, subject: Subject) -> dict[int, Calibration]:
        """TP size -> calibration; from the text, if one was given. Raises ConfigError if that is the predicted one."""
        self.check_text(subject.text, "that is predicted")
        if self.text is None:
            return self.loaded
        from ..calibration.collect import RangeTracker, watch
        from ..calibration.windows import draw
        from .calibrate import SAMPLES, SEQUENCE_LENGTH

        other = read_text(self.text, "--calibration-text")
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
