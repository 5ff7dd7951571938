"""Evaluating cases under a progress bar, into a file that keeps what was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import CommConfig
from ..errors import ConfigError
from ..evaluation.cases import Case
from ..evaluation.metrics import Tokens
from ..evaluation.windows import Window
from .subject import Subject

if TYPE_CHECKING:
    from ..evaluation.noise import Noise


def check_patterns(patterns: Sequence[str], sites: Iterable[str]) -> None:
    """Raise ConfigError for one of --comm-sites that selects nothing: a slip of the pen, that would go unnoticed."""
    sites = list(sites)
    for pattern in patterns:
        if not any(fnmatchcase(site, pattern) for site in sites):
            raise ConfigError(f"--comm-sites {pattern} selects none of {', '.join(sites[:3])} …")


def check_cases(subject: Subject, cases: Sequence[Case]) -> None:
    """Raise ConfigError for a pattern of sites that selects none and a plan or calibration of another model, and
    ModelError for a case whose TP size does not divide the features of a layer."""
    from ..engines.simulated_tp import check_tp

    sites = subject.features
    for tp in sorted({case.tp for case in cases}):
        check_tp(subject.model, tp)
    for case in cases:
        check_patterns(case.config.sites or (), sites)
        tensors = subject.digests if case.config.planned else {}
        case.config.check(sites, case.tp, subject.facts["fingerprint"], tensors)


def evaluated(
    subject: Subject, cases: Sequence[Case], windows: Sequence[Window], path: Path | None, first: int = 0
) -> dict[Case, list[Tokens]]:
    """What the tokens of each window tell in each case. path: None keeps nothing. first: the first window's number.

    Raises as `check_cases` and `evaluation.run.evaluate` do.
    """
    from ..evaluation.progress_file import Progress
    from ..evaluation.run import evaluate

    check_cases(subject, cases)
    numbers = range(first, first + len(windows))
    with _bar("windows", len(windows) * len(cases)) as advance, Progress(path, subject.facts) as progress:
        advance(sum(progress.done(case, n) for case in cases for n in numbers))
        done = lambda case, n: progress.done(case, numbers[n])  # noqa: E731
        for number, case, tokens in evaluate(subject.model, windows, cases, done):
            progress.add(case, numbers[number], tokens)
            advance()
    return {case: progress.tokens(case, numbers) for case in cases}


def measured_noise(
    subject: Subject, windows: Sequence[Window], configs: Sequence[CommConfig], tp: int
) -> list[dict[str, Noise]]:
    """`evaluation.noise.measure` under a progress bar."""
    from ..evaluation.noise import measure

    with _bar("noise", len(windows)) as advance:
        return measure(subject.model, windows, configs, tp, advance)


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[..., None]]:
    """On stderr; gives what advances it."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda steps=1: bar.advance(task, steps)
