"""Tuned tables for the tests: made up, not measured."""

from __future__ import annotations

from megatron_lowbit.tuned_table import Key, Row, TunedTable

KEY = Key("a CPU, 2 cores", 2, (2,), "gloo", "numba", 2, {"megatron_lowbit": "0.1.0", "torch": "2.13.0"})
WAYS = {"exact": 1.0, "one-shot/1": 2.0, "two-step/1": 2.0}


def row(nbytes: int, best: str, **failed: str) -> Row:
    """In which `best` takes half of exact's time, and what failed none."""
    algorithm, _, chunks = best.partition("/")
    ms = {way: taken for way, taken in (WAYS | {best: 0.5}).items() if way not in failed}
    return Row(nbytes, algorithm, int(chunks or 0), ms, failed, {})


def table(rows: dict[int, str], key: Key = KEY, spec: str = "int4:g32", dtype: str = "bf16", **more) -> TunedTable:
    """rows: bytes -> the fastest candidate."""
    found = {(spec, dtype): [row(nbytes, best) for nbytes, best in rows.items()]}
    return TunedTable(key, found, "2026-11-22T00:00:00+00:00", 60.0, 12.5, **more)
