"""A limit on how much worse predictions may have become, for the tests of those who change models or settings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..plan_file import differing

SAME = ("spec", "tp", "algorithm", "plan_digest")  # what makes a row the same case
TEXT = ("text_sha256", "window_length", "stride")  # perplexities of other tokens cannot be compared


@dataclass(frozen=True)
class Gate:
    """limit: of perplexity's relative rise, above the baseline's row, or above exact where there is no baseline."""

    limit: float
    baseline: tuple[Mapping[str, Any], ...] | None = None

    @classmethod
    def load(
        cls, path: Path | None, limit: float, digests: Mapping[str, str], facts: Mapping[str, str], windows: int
    ) -> Gate:
        """Read what evaluate --json wrote; None: compare with exact. digests: of this model's tensors. facts, windows:
        what is evaluated, and on how many windows.

        Raises ConfigError for a file that is none, or of another model, text or other windows.
        """
        if path is None:
            return cls(limit)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            rows, tensors = found["rows"], dict(found["tensors"])
            baseline = tuple({name: row[name] for name in (*SAME, "perplexity")} for row in rows)
            theirs = {name: found[name] for name in TEXT} | {"windows": rows[0]["windows"]}
        except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
            raise ConfigError(f"--baseline {path} is no --json of evaluate ({error!r}): make it again") from error
        if names := differing(tensors, digests):
            raise ConfigError(
                f"--baseline {path} is of another model: {names} differ; evaluate that model, or make a baseline of "
                "this one"
            )
        for name, now in ({name: facts[name] for name in TEXT} | {"windows": windows}).items():
            if theirs[name] != now:
                raise ConfigError(
                    f"--baseline {path} is of other tokens: its {name} is {theirs[name]}, now {now}; evaluate the same "
                    "windows of the same text, or make the baseline again"
                )
        return cls(limit, baseline)

    def failures(self, rows: Iterable[Mapping[str, Any]]) -> list[str]:
        """What to say of each row that is too much worse. Raises ConfigError for a row that the baseline lacks."""
        found = []
        for row in rows:
            before, what = row["perplexity_exact"], "exact"
            if self.baseline is not None:
                same = [old for old in self.baseline if all(old[name] == row[name] for name in SAME)]
                if not same:
                    raise ConfigError(
                        f"the baseline lacks {row['spec']} at TP {row['tp']}: make it with the same cases"
                    )
                before, what = same[0]["perplexity"], "the baseline"
            rise = row["perplexity"] / before - 1
            if not rise <= self.limit:
                case = f"{row['spec']}, TP {row['tp']}"
                found.append(f"{case}: perplexity {rise:+.2%} against {what}, above {self.limit:.2%}")
        return found
