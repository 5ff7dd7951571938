"""The tasks of `evaluate`: their options, and asking their questions under a progress bar."""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, LowBitError, ModelError
from ..evaluation import harness, local_tasks
from ..evaluation.cases import Case
from ..evaluation.task_file import TaskFile
from .calibrations import Calibrations
from .files import read_text
from .subject import Subject

if TYPE_CHECKING:
    from ..evaluation.harness import Found

BATCH = 8
OPTIONS = {"tasks_text": None, "task_limit": None, "batch_size": BATCH, "confirm_run_unsafe_code": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --tasks and what goes with it."""
    group = parser.add_argument_group("tasks")
    local = " and ".join(local_tasks.TASKS)
    group.add_argument(
        "--tasks",
        type=_names,
        metavar="NAME,…",
        help=f"tasks of lm-evaluation-harness; {local} are made of the text, and need no download",
    )
    group.add_argument(
        "--tasks-text", type=Path, metavar="FILE", help="text that these two are made of (default: --text's)"
    )
    group.add_argument("--task-limit", type=int, metavar="N", help="questions of each task (default: all)")
    group.add_argument("--batch-size", type=int, metavar="N", default=BATCH, help="questions at a time (default: 8)")
    group.add_argument(
        "--confirm-run-unsafe-code", action="store_true", help="let tasks run code that the model writes"
    )


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names no task: give some, such as local_cloze,local_choice")
    return names


@dataclass
class Answers:
    """found: task as named -> run, None for the exact one -> scores. failures: of what is missing there."""

    facts: dict[str, Any]
    found: dict[str, dict[Case | None, Found]] = field(default_factory=dict)
    failures: list[LowBitError] = field(default_factory=list)

    def check(self) -> None:
        """Raise all failures as one, of the first one's kind."""
        if self.failures:
            raise type(self.failures[0])("; and ".join(dict.fromkeys(map(str, self.failures))))


@dataclass(frozen=True)
class Tasks:
    """The checked arguments."""

    subject: Subject
    names: tuple[str, ...]
    path: Path | None
    limit: int | None
    batch: int
    unsafe: bool
    debug: bool

    @classmethod
    def check(cls, arguments: argparse.Namespace, subject: Subject) -> Tasks | None:
        """None without --tasks. Raises ConfigError or ModelError for what can be known before a model is loaded, but
        for the names, which take seconds: `ready`."""
        if not arguments.tasks:
            for name, default in OPTIONS.items():
                if getattr(arguments, name) != default:
                    raise ConfigError(f"--{name.replace('_', '-')} is for --tasks: give that too, such as local_choice")
            return None
        for name in ("task_limit", "batch_size"):
            value = getattr(arguments, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}: give 1 or more")
        names = tuple(dict.fromkeys(arguments.tasks))
        if arguments.tasks_text and not set(names) & set(local_tasks.TASKS):
            raise ConfigError(f"--tasks-text is for {' and '.join(local_tasks.TASKS)}: add one, or leave it out")
        if subject.folder.predicts != "next":
            raise ModelError(
                f"--tasks asks models that continue a text token by token, and {subject.folder.folder} holds none: "
                "leave it out"
            )
        harness.check_installed()
        return cls(
            subject,
            names,
            arguments.tasks_text,
            arguments.task_limit,
            arguments.batch_size,
            arguments.confirm_run_unsafe_code,
            arguments.debug,
        )

    @cached_property
    def text(self) -> str | None:
        """What local tasks are made of, if there are any."""
        if not set(self.names) & set(local_tasks.TASKS):
            return None
        return self.subject.text if self.path is None else read_text(self.path, "--tasks-text")

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the scores depend on beside model and case; no paths."""
        digest = None if self.text is None else hashlib.sha256(self.text.encode()).hexdigest()
        name = None if self.text is None else (self.path or self.subject.path).name
        return {
            "tasks_text": name,
            "tasks_text_sha256": digest,
            "task_limit": self.limit,
            "lm_eval": harness.installed(),
        }

    def ready(self, calibrations: Calibrations) -> None:
        """Make the local tasks, and look up the others. Raises ConfigError for unknown names, for a text without any
        questions and for one that a calibration is to be made of."""
        if self.text is not None:
            calibrations.check_text(self.text, "of the tasks")
        _ = self._manager

    @cached_property
    def _folder(self) -> TemporaryDirectory:
        return TemporaryDirectory(prefix="megatron-lowbit-tasks-")

    @cached_property
    def _manager(self) -> Any:
        folder = Path(self._folder.name)
        with self._hushed():
            if self.text is not None:
                local_tasks.write(self.text, [name for name in self.names if name in local_tasks.TASKS], folder)
            return harness.manager(self.names, folder)

    def answers(self, cases: Sequence[Case], progress: Path | None) -> Answers:
        """Ask everything, exactly and in each case. What fails is left out, and noted in `failures`.

        progress: evaluate's; scores are kept in a file beside it. Raises ConfigError for one of other tasks.
        """
        from rich.console import Console
        from rich.progress import MofNCompleteColumn
        from rich.progress import Progress as Bar

        found = Answers(self.facts)
        facts = {
            name: self.subject.facts[name] for name in ("fingerprint", "tokens_sha256", "dtype", "megatron_lowbit")
        } | self.facts
        file = TaskFile(progress and progress.with_name(progress.name + ".tasks.json"), facts)
        runs = [None, *cases]
        with (
            self._folder,
            Bar(*Bar.get_default_columns(), MofNCompleteColumn(), console=Console(file=sys.stderr)) as bar,
        ):
            step = bar.add_task("tasks", total=len(self.names) * len(runs))
            with self._hushed():
                for name, case, scores in self._asked(runs, file, found.failures):
                    found.found.setdefault(name, {})[case] = scores
                    bar.advance(step)
        return found

    def _asked(
        self, runs: Sequence[Case | None], file: TaskFile, failures: list[LowBitError]
    ) -> Iterator[tuple[str, Case | None, Found]]:
        for name in self.names:
            tasks = None
            for case in runs:
                if (scores := file.get(name, case)) is None:
                    try:
                        tasks = tasks or harness.load(self._manager, name, self.unsafe)
                        scores = self._harness.scores(tasks, self.limit, case)
                    except (ConfigError, ModelError) as error:
                        failures.append(error)
                        if tasks is None or case is None:
                            break  # there is nothing to ask, or to compare with
                        continue
                    file.add(name, case, scores)
                yield name, case, scores

    @cached_property
    def _harness(self) -> harness.Harness:
        positions = self.subject.folder.max_positions
        return harness.Harness(self.subject.model, self.subject.tokenizer, positions, self.batch, self.unsafe)

    @contextmanager
    def _hushed(self) -> Iterator[None]:
        """Without the warnings and bars of lm_eval and datasets, which say what they do, not what is wrong."""
        with nullcontext() if self.debug else redirect_stderr(io.StringIO()):
            yield
