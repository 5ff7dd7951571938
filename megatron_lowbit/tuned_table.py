"""What `tune` measured: which way is fastest for a message of how many bytes; and the file that says so.

A table holds for the machine, group and versions that it was made with, its key, and for nothing else: `check` says
what differs. The file is JSON; docs/tune.md has the layout. All ranks of a group must use one table, or they would
choose different algorithms and hang: rank 0 reads it and tells the others (tuned_lookup.py).
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

from . import spec as _spec
from . import whole_file
from .errors import ConfigError

FORMAT, VERSION = "megatron_lowbit.tuned", 1
EXACT = "exact"
ALGORITHMS = (EXACT, "one-shot", "two-step", "hierarchical")
DTYPES = ("bf16", "fp16", "fp32")
MARGIN = 0.03  # by which a compressed way must be faster: less is within what medians of such times scatter by
AGAIN = "run 'megatron-lowbit tune' again"


@dataclass(frozen=True, order=True)
class Candidate:
    """A way to reduce a message. chunks: how many parts overlap; 0: the backend's own collectives.

    `str()` is its name in a table: "exact", "one-shot/4".
    """

    algorithm: str
    chunks: int = 0

    def __str__(self) -> str:
        return EXACT if self.algorithm == EXACT else f"{self.algorithm}/{self.chunks}"

    @classmethod
    def parse(cls, name: str) -> Candidate:
        """Raises ConfigError for what is no candidate's name."""
        algorithm, _, chunks = name.partition("/")
        found = cls(algorithm, int(chunks) if chunks.isascii() and chunks.isdecimal() and len(chunks) < 5 else 0)
        if algorithm not in ALGORITHMS or str(found) != name:
            raise ConfigError(
                f"candidate {name[:40]!r} is unknown: write exact, or an algorithm and chunks: one-shot/4"
            )
        return found


@dataclass(frozen=True)
class Key:
    """What a table was made on. nodes: ranks on each. codecs: their backend. versions: of packages, by name."""

    device: str
    world: int
    nodes: tuple[int, ...]
    backend: str
    codecs: str
    protocol: int
    versions: Mapping[str, str]

    def differences(self, here: Key) -> list[str]:
        """What this has, and what `here` has instead."""
        found = []
        for name in (field.name for field in fields(self) if field.name != "versions"):
            mine, its = getattr(self, name), getattr(here, name)
            if mine != its:
                found.append(f"made for {name} {_plain(mine)}, this is {_plain(its)}")
        for package in sorted({*self.versions, *here.versions}):
            mine, its = self.versions.get(package, "none"), here.versions.get(package, "none")
            if mine != its:
                found.append(f"made with {package} {mine}, this is {its}")
        return found


@dataclass(frozen=True)
class Row:
    """What was found for messages of `bytes`.

    algorithm, chunks: the fastest. ms: candidate -> median of the slowest rank's milliseconds. failed: candidate -> why
    it may not be used. skipped: candidate -> why it was not timed.
    """

    bytes: int
    algorithm: str
    chunks: int
    ms: Mapping[str, float]
    failed: Mapping[str, str]
    skipped: Mapping[str, str]

    @property
    def best(self) -> Candidate:
        return Candidate(self.algorithm, self.chunks)


@dataclass(frozen=True, eq=False)
class TunedTable:
    """Rows by (spec, dtype), ascending in bytes. Raises ConfigError for what cannot be one.

    made: date and time. budget_seconds: what was allowed, seconds: what it took. name: what messages call it.
    """

    key: Key
    rows: Mapping[tuple[str, str], Sequence[Row]]
    made: str
    budget_seconds: float
    seconds: float
    margin: float = MARGIN
    name: str = "tuned table in memory"

    def __post_init__(self) -> None:
        try:
            problem = self._problem()
        except ConfigError as error:  # of a spec's or a candidate's name
            problem = f"cannot be understood ({error})"
        if problem:
            raise ConfigError(f"{self.name} {problem}: {AGAIN}")
        object.__setattr__(self, "rows", MappingProxyType({which: tuple(rows) for which, rows in self.rows.items()}))

    def __repr__(self) -> str:
        return f"TunedTable({self.name!r}, {len(self.rows)} specs and dtypes, digest {self.digest[:12]})"

    def __reduce__(self) -> tuple:  # for copies of a model that holds one: a mapping proxy cannot be copied
        return TunedTable.from_json, (self.as_json(), self.name)

    def choose(self, spec: str, dtype: str, nbytes: int, only: str | None = None) -> Candidate | None:
        """The fastest way for a message of `nbytes`: the one of the largest row that is not larger. Below the first
        row: exact. None if the table lacks the spec or the dtype.

        only: an algorithm that alone may be chosen, beside exact. Chunks keep their size in larger messages.
        """
        if (rows := self.rows.get((spec, dtype))) is None:
            return None
        index = bisect_right(self._sizes[spec, dtype], nbytes)
        if not index:
            return Candidate(EXACT)
        row = rows[index - 1]
        best = row.best if only is None else fastest(row.ms, self.margin, only)
        return replace(best, chunks=round(best.chunks * nbytes / row.bytes)) if best.chunks else best

    @cached_property
    def _sizes(self) -> dict[tuple[str, str], list[int]]:
        return {which: [row.bytes for row in rows] for which, rows in self.rows.items()}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides what is chosen, and where."""
        found = self.as_json()
        decides = {name: found[name] for name in ("format", "format_version", "key", "margin", "tables")}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def check(self, here: Key) -> None:
        """Raise ConfigError naming all that differs between what this was made on and `here`."""
        if found := self.key.differences(here):
            raise ConfigError(f"{self.name} does not fit: {'; '.join(found)}: {AGAIN}")

    def as_json(self) -> dict:
        """As the file has it."""
        tables = [
            {"spec": spec, "dtype": dtype, "rows": [_thawed(row) for row in rows]}
            for (spec, dtype), rows in self.rows.items()
        ]
        about = {"made": self.made, "budget_seconds": self.budget_seconds, "seconds": self.seconds}
        start = {"format": FORMAT, "format_version": VERSION, "key": _thawed(self.key)}
        return start | about | {"margin": self.margin, "tables": tables}

    def save(self, path: str | os.PathLike) -> None:
        """Write the file, whole or not at all. Raises ConfigError if it cannot be written."""
        whole_file.write(path, whole_file.as_json(self.as_json()).encode(), "tuned table")

    @classmethod
    def load(cls, path: str | os.PathLike) -> TunedTable:
        """Read a file. Raises ConfigError for one that is missing, damaged, something else or of another version."""
        path = Path(path)
        try:
            found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
        except FileNotFoundError:
            raise ConfigError(f"there is no tuned table {path}: make one with 'megatron-lowbit tune'") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"tuned table {str(path)[:300]} cannot be read ({error}): {AGAIN}") from error
        return cls.from_json(found, f"tuned table {path}")

    @classmethod
    def from_json(cls, found: Any, name: str) -> TunedTable:
        """What `as_json` returned. Raises ConfigError."""
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ConfigError(f"{name} is none: give a file that 'megatron-lowbit tune' wrote")
        version = found.get("format_version")
        if type(version) is not int or version != VERSION:
            raise ConfigError(
                f"{name} has format {version!r}, this one reads {VERSION}: update megatron-lowbit, or {AGAIN}"
            )
        start, parts = {"format": str, "format_version": int, "key": dict, "tables": list}, {}
        try:
            found = _typed(found, start | {"made": str, "budget_seconds": float, "seconds": float, "margin": float})
            key = _typed(found["key"], {each.name: _KEY.get(each.name, str) for each in fields(Key)})
            nodes, versions = _all(int, key.pop("nodes")), _all(str, key.pop("versions"))
            for table in found["tables"]:
                table = _typed(table, {"spec": str, "dtype": str, "rows": list})
                if (which := (table["spec"], table["dtype"])) in parts:
                    raise ValueError(f"has {' in '.join(which)} twice")
                rows = [_typed(row, _ROW) for row in table["rows"]]
                kinds = {"ms": float, "failed": str, "skipped": str}
                parts[which] = [
                    Row(**row | {name: _all(kind, row[name]) for name, kind in kinds.items()}) for row in rows
                ]
        except ValueError as error:
            raise ConfigError(f"{name} {error}: {AGAIN}") from None
        about = [found[each] for each in ("made", "budget_seconds", "seconds", "margin")]
        return cls(Key(**key, nodes=tuple(nodes), versions=versions), parts, *about, name)

    def _problem(self) -> str | None:
        """Why this is no table that could be used."""
        if not self.rows:
            return "has no rows"
        if not (0 <= self.margin < 1 and 0 <= self.budget_seconds < math.inf and 0 <= self.seconds < math.inf):
            return f"has margin {self.margin}, budget {self.budget_seconds} s and took {self.seconds} s"
        if self.key.world < 2 or sum(self.key.nodes) != self.key.world or min(self.key.nodes) < 1:
            return f"is for {self.key.world} ranks on nodes of {_plain(self.key.nodes)}"
        for (spec, dtype), rows in self.rows.items():
            where = f"({spec[:80]}, {dtype[:20]})"
            if dtype not in DTYPES or spec != str(_spec.parse(spec)):
                return f"has rows for {where}, which is no spec in its own spelling and one of {', '.join(DTYPES)}"
            sizes = [row.bytes for row in rows]
            if not sizes or sizes[0] < 1 or any(one >= other for one, other in pairwise(sizes)):
                return f"has sizes {sizes[:8]} for {where}, which do not ascend from 1 byte"
            for row in rows:
                if problem := _row_problem(row):
                    return f"{problem}, for {row.bytes} bytes of {where}"
        return None


def fastest(ms: Mapping[str, float], margin: float, only: str | None = None) -> Candidate:
    """Of what was timed, among it exact: the fastest by more than `margin` of its own time; else exact.

    only: an algorithm that alone may be chosen, beside exact.
    """
    timed = {candidate: ms[name] for name in ms if (candidate := Candidate.parse(name)).algorithm != EXACT}
    timed = {candidate: taken for candidate, taken in timed.items() if only in (None, candidate.algorithm)}
    best = min(timed, key=timed.get, default=None)
    return best if best is not None and timed[best] * (1 + margin) < ms[EXACT] else Candidate(EXACT)


_KEY = {"world": int, "nodes": list, "protocol": int, "versions": dict}
_ROW = {"bytes": int, "algorithm": str, "chunks": int, "ms": dict, "failed": dict, "skipped": dict}


def _row_problem(row: Row) -> str | None:
    for name in (*row.ms, *row.failed, *row.skipped, str(row.best)):
        Candidate.parse(name)
    if row.algorithm == EXACT and row.chunks:
        return f"has exact in {row.chunks} chunks"
    if not all(math.isfinite(taken) and taken > 0 for taken in row.ms.values()):
        return f"has times {dict(row.ms)}, which are not all above 0"
    best = str(row.best)
    if best in row.failed:
        return f"has {best} as the fastest, which failed ({row.failed[best]})"
    if best not in row.ms or EXACT not in row.ms:
        return f"has {best} as the fastest, and times of {', '.join(row.ms) or 'nothing'}; both it and exact need one"
    if both := sorted(row.ms.keys() & row.failed.keys()):
        return f"has times of {both[0]}, which failed"
    return None


def _typed(found: Any, kinds: Mapping[str, type]) -> dict:
    """`found`, if it is a dict of exactly these names and kinds; a float may be a whole number. Raises ValueError."""
    if not isinstance(found, dict):
        raise ValueError(f"has {str(found)[:40]!r} where fields {', '.join(kinds)} belong")
    if differing := sorted(found.keys() ^ kinds.keys()):
        raise ValueError(f"{'lacks' if differing[0] in kinds else 'has an unknown'} field {differing[0]!r}")
    return {name: _of(kind, found[name], name) for name, kind in kinds.items()}


def _all(kind: type, found: dict | list) -> dict | list:
    """All values of one kind. Raises ValueError."""
    if isinstance(found, list):
        return [_of(kind, value, "nodes") for value in found]
    return {name: _of(kind, value, name) for name, value in found.items()}


def _of(kind: type, value: Any, name: str) -> Any:
    if kind is float and type(value) is int and abs(value) < 1 << 53:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(f"has {str(value)[:40]!r} as {str(name)[:40]}, which is no {kind.__name__}")
    return value


def _thawed(data: Key | Row) -> dict:
    return {name: dict(v) if isinstance(v, Mapping) else list(v) if isinstance(v, tuple) else v
            for name, v in vars(data).items()}  # fmt: skip


def _plain(value: object) -> str:
    return " + ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def now() -> str:
    """Date and time as a table has it."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
