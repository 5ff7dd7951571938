"""A limit on how much worse predictions may have become, for the tests of those who change models or settings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import ConfigError
from ..plan_file import differing

SAME = ("spec", "tp", "algorithm", "sites", "plan_digest")  # what makes a row the same case
NESTED = ("nodes", "outer_spec")  # and these, which older files lack
TEXT = ("text_sha256", "tokens_sha256", "window_length", "stride")  # of another text, perplexities cannot be compared


@dataclass(frozen=True)
class Gate:
    """limit: of perplexity's relative rise, above the baseline's row, or above exact where there is no baseline."""

    limit: float
    baseline: tuple[Mapping[str, Any], ...] | None = None

    @classmethod
    def load(
        cls,
        path: Path | None,
        limit: float,
        facts: Mapping[str, str] = MappingProxyType({}),
        digests: Mapping[str, str] = MappingProxyType({}),
    ) -> Gate:
        """Read what evaluate --json wrote; None: compare with exact. facts: as in its JSON; digests: of this
        model's tensors.

        Raises ConfigError for a file that is none, and for one of another model or of other windows.
        """
        if path is None:
            return cls(limit)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            rows, tensors = found["rows"], dict(found["tensors"])
            baseline = tuple(
                {name: row[name] for name in (*SAME, "tokens")}
                | {name: row.get(name) for name in NESTED}
                | {"perplexity": float(row["perplexity"])}
                for row in rows
            )
            text = {name: found[name] for name in TEXT}
        except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
            raise ConfigError(f"--baseline {path} is no --json of evaluate ({error!r}): make it again") from error
        if names := differing(tensors, digests):
            raise ConfigError(
                f"--baseline {path} is of another model: {names} differ; evaluate that model, or make a baseline of "
                "this one"
            )
        for name, value in text.items():
            if value != facts[name]:
                raise ConfigError(
                    f"--baseline {path} is of other windows: its {name} is {value!r}, now {facts[name]!r}; make one "
                    "with the same text and windows"
                )
        return cls(limit, baseline)

    def failures(self, rows: Iterable[Mapping[str, Any]]) -> list[str]:
        """What to say of each row that is too much worse. Raises ConfigError for a row that the baseline lacks."""
        found = []
        for row in rows:
            before, what = row["perplexity_exact"], "exact"
            if self.baseline is not None:
                same = [old for old in self.baseline if _case(old) == _case(row)]
                if not same:
                    raise ConfigError(
                        f"the baseline lacks {row['spec']} at TP {row['tp']}: make it with the same cases"
                    )
                if same[0]["tokens"] != row["tokens"]:
                    raise ConfigError(
                        f"the baseline has {same[0]['tokens']} tokens of the text, now there are {row['tokens']}: make "
                        "it with as many --windows"
                    )
                before, what = same[0]["perplexity"], "the baseline"
            rise = row["perplexity"] / before - 1
            if not rise <= self.limit:
                case = f"{row['spec']}, TP {row['tp']}"
                found.append(f"{case}: perplexity {rise:+.2%} against {what}, above {self.limit:.2%}")
        return found


def _case(row: Mapping[str, Any]) -> list[Any]:
    values = [row.get(name) for name in (*SAME, *NESTED)]
    return [list(value) if isinstance(value, tuple) else value for value in values]  # as JSON has it
