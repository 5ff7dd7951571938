"""`evaluate --report`: what the page of evaluation/report.py is made from."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration_file import Calibration
from ..errors import ConfigError
from .files import check_output

if TYPE_CHECKING:
    from .evaluate_job import Job

NUMBER = int | float
FACTS = {"fingerprint": str, "spec": str, "tp": int, "algorithm": str, "kl_all": NUMBER, "explanation": str}
ROW = {"site": str, "layer": int | None, "kind": str, "kl_mean": NUMBER, "kl_error": NUMBER | None, "share": NUMBER}
ROW |= {"sqnr_db": NUMBER | None}


def check(arguments: argparse.Namespace) -> None:
    """Raise ConfigError if a page could not be written."""
    folder = arguments.report
    if folder is None:
        if arguments.report_sensitivity:
            raise ConfigError("--report-sensitivity is shown on a page only: give --report DIR as well")
        return
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--report {folder} is a file: give a folder")
    check_output(folder / "index.html" if folder.exists() else folder, "--report")
    from ..evaluation.report import check_installed

    check_installed()


def sensitivity(path: Path | None, model: Path) -> dict[str, Any] | None:
    """What `sensitivity --json` wrote. Raises ConfigError for a file that is none, or of another model."""
    if path is None:
        return None
    from ..engines.fingerprint import fingerprint

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        _check_kinds(found, FACTS)
        for row in found["rows"]:
            _check_kinds(row, ROW)
        if not found["rows"]:
            raise ValueError("there are no rows")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(
            f"--report-sensitivity {path} is no --json of sensitivity ({error!r}): make it again"
        ) from error
    if found["fingerprint"] != fingerprint(model):
        raise ConfigError(f"--report-sensitivity {path} is of another model: make it again with this one")
    return found


def _check_kinds(found: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    for name, kind in kinds.items():
        if not isinstance(found[name], kind):
            raise ValueError(f"{name} is {found[name]!r}")


def command(arguments: argparse.Namespace) -> str:
    """What was typed, with names of files in place of paths: nothing of this machine goes into a page."""
    values = vars(arguments).values()
    paths = [item for value in values for item in (value if isinstance(value, list) else [value])]
    known = {path: path.resolve().name for path in paths if isinstance(path, Path)}
    words = []
    for word in arguments.argv:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        words.append(option + equals + known.get(Path(value), value) if value else word)
    return shlex.join(["megatron-lowbit", *words])


def write(
    job: Job, rows: Sequence[Mapping[str, Any]], calibrations: Mapping[int, Calibration], tasks: Sequence[dict] = ()
) -> None:
    """Write the page, and say where it is. Outliers are those of the text's first windows, at the largest TP size."""
    from rich.console import Console

    from ..evaluation.consistency import consistency
    from ..evaluation.report import Findings
    from ..evaluation.report import write as write_page
    from .evaluate_report import made

    subject, tp = job.subject, max(row["tp"] for row in rows)
    outliers = consistency(subject.model, subject.windows, tp, calibrations.get(tp))
    notes = subject.notes(row["tp"] for row in rows)
    findings = Findings(subject.facts | made(), rows, job.command, job.sensitivity, outliers, tasks, notes)
    path = write_page(findings, job.report)
    Console(highlight=False, emoji=False).print(f"report: {path}", soft_wrap=True, markup=False)
