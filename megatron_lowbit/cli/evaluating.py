"""Evaluating cases under a progress bar, into a file that keeps what was found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError
from ..evaluation.cases import Case
from ..evaluation.metrics import Tokens
from ..evaluation.windows import Window
from .subject import Subject


def check_cases(subject: Subject, cases: Sequence[Case]) -> None:
    """Raise ConfigError for a case that compresses nothing, or whose plan or calibration is of another model."""
    sites = subject.features
    for case in cases:
        if not any(map(case.config.selects, sites)):
            named = " ".join(case.config.sites)
            raise ConfigError(f"--comm-sites {named} selects none of {', '.join(list(sites)[:3])} …")
        case.config.check(sites, case.tp, subject.facts["fingerprint"])


def evaluated(
    subject: Subject, cases: Sequence[Case], windows: Sequence[Window], path: Path | None
) -> dict[Case, list[Tokens]]:
    """What the tokens of each window tell in each case. path: None keeps nothing.

    Raises as `check_cases` and `evaluation.run.evaluate` do.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn
    from rich.progress import Progress as Bar

    from ..evaluation.progress_file import Progress
    from ..evaluation.run import evaluate

    check_cases(subject, cases)
    with Bar(*Bar.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("windows", total=len(windows) * len(cases))
        with Progress(path, subject.facts) as progress:
            bar.advance(task, sum(progress.done(case, n) for case in cases for n in range(len(windows))))
            for number, case, tokens in evaluate(subject.model, windows, cases, progress.done):
                progress.add(case, number, tokens)
                bar.advance(task)
    return {case: progress.tokens(case)[: len(windows)] for case in cases}
