"""The scores of tasks so far, in a JSON file, so that an evaluation that was interrupted does not ask again.

Of each task as it was named and each case, or the exact run, what harness.Scores holds of each of its metrics; and the
facts that must be the same for scores to be compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import whole_file
from ..errors import ConfigError
from .cases import Case
from .harness import Found, Scores

FORMAT, VERSION = "megatron_lowbit.tasks", 1
EXACT = "exact"


class TaskFile:
    """path: None keeps the scores in memory alone. facts: JSON values.

    Raises ConfigError for a file of other facts, or of none.
    """

    def __init__(self, path: Path | None, facts: Mapping[str, Any]) -> None:
        self._path, self._facts = path, dict(facts)
        self._found: dict[str, dict[str, dict]] = {}
        if path is not None and path.exists():
            self._load()

    def get(self, name: str, case: Case | None) -> Found | None:
        """The scores, if they are known."""
        found = self._found.get(name, {}).get(_key(case))
        return found and {
            task: {metric: Scores(**scores) for metric, scores in metrics.items()} for task, metrics in found.items()
        }

    def add(self, name: str, case: Case | None, found: Found) -> None:
        """Note them, and write the file, whole or not at all. Raises ConfigError if it cannot be written."""
        self._found.setdefault(name, {})[_key(case)] = {
            task: {metric: asdict(scores) for metric, scores in metrics.items()} for task, metrics in found.items()
        }
        if self._path is not None:
            content = {"format": FORMAT, "format_version": VERSION, "facts": self._facts, "found": self._found}
            whole_file.write(self._path, json.dumps(content).encode(), "progress")

    def _load(self) -> None:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            kind, facts, found = (content["format"], content["format_version"]), content["facts"], content["found"]
            self._found = {name: dict(runs) for name, runs in found.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{self._path} cannot be read ({error!r}): remove it to begin anew") from error
        if kind != (FORMAT, VERSION):
            raise ConfigError(f"{self._path} holds no scores of this version: give another --progress, or remove it")
        for name, value in self._facts.items():
            if facts.get(name) != value:
                raise ConfigError(
                    f"{self._path} is of another evaluation: its {name} is {facts.get(name)!r}, now {value!r}; give "
                    "another --progress, or remove it to begin anew"
                )


def _key(case: Case | None) -> str:
    return EXACT if case is None else case.key
