"""What the cost model is held against: our own measurements on shaped links, and figures that others have published."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lowbit.tuning import cost_model, machines
from megatron_lowbit.tuning.cost_model import Way
from megatron_lowbit.tuning.machines import Machine

PUBLISHED = Path(__file__).with_name("published_all_reduce.json")
BASE = "bf16"  # the exact all-reduce that link.py compares with


@dataclass(frozen=True)
class Case:
    """A measured all-reduce. seconds: measured; rate: Gbit/s of a shaped link."""

    source: str
    machine: str
    way: Way
    bytes: int
    world: int
    seconds: float
    rate: float | None = None

    def modelled(self, machine: Machine) -> float:
        return cost_model.all_reduce(machine, self.way, self.bytes, self.world).total

    @property
    def name(self) -> str:
        spec = "" if self.way.algorithm == "exact" else f" {self.way.spec}"
        return f"{self.machine}, {self.world} ranks, {self.bytes >> 10:,} KiB, {self.way.algorithm}{spec}"


def shaped(rows: Sequence[dict[str, Any]]) -> list[Case]:
    """Of the rows of link.py: gloo's bf16 all-reduce, and what was compressed, among hosts of one node."""
    kept = [
        row
        for row in rows
        if row["rate_gbit"] and not row.get("outer_gbit") and row["path"] in ("exact", "one-shot", "two-step")
        and ((row["spec"], row["algorithm"]) == (BASE, "exact") or row["algorithm"] in ("auto", "one-shot", "two-step"))
    ]  # fmt: skip
    return [
        Case(
            "shaped links", machines.SHAPED.format(row["rate_gbit"]),
            cost_model.EXACT if row["path"] == "exact" else Way.of(row["spec"], row["path"]),
            row["bytes"], row["ranks"], row["median_ms"] / 1e3, row["rate_gbit"],
        )
        for row in kept
    ]  # fmt: skip


def published() -> list[Case]:
    """Peers' codecs are named by the spec of ours that has as many bits; their kernels do everything in one go."""
    cases = []
    for table in json.loads(PUBLISHED.read_text())["tables"]:
        for row in table["rows"]:
            for column, microseconds in row["us"].items():
                algorithm, spec = table["ways"][column]
                way = cost_model.EXACT if algorithm == "exact" else Way.of(spec, algorithm, chunks=1)
                source = f"{table['name']}, TP {row['world']}"
                cases.append(Case(source, table["machine"], way, row["bytes"], row["world"], microseconds / 1e6))
    return cases
