"""What the cost model is held against: our own measurements on shaped links, and figures that others have published."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from common import RESULTS

from megatron_lowbit.tuning import cost_model, machines, traffic
from megatron_lowbit.tuning.cost_model import Transformer, Way
from megatron_lowbit.tuning.machines import Machine

PUBLISHED = RESULTS.parent / "published_all_reduce.json"
BASE = "bf16"  # the exact all-reduce that link.py compares with
RANDOM = "random weights"
COMPRESSED = ("auto", "one-shot", "two-step", "hierarchical")


@dataclass(frozen=True)
class Case:
    """A measured all-reduce. seconds: measured; rate, outer: Gbit/s of shaped links, and of their nodes' uplinks."""

    source: str
    machine: str
    way: Way
    bytes: int
    world: int
    seconds: float
    rate: float | None = None
    outer: float | None = None
    nodes: int = 1

    def modelled(self, machine: Machine) -> float:
        return cost_model.all_reduce(machine, self.way, self.bytes, self.world).total

    @property
    def name(self) -> str:
        spec = "" if self.way.algorithm == "exact" else f" {self.way.spec}"
        spec += f", {self.way.outer} between" if self.way.outer else ""
        return f"{self.machine}, {self.world} ranks, {self.bytes >> 10:,} KiB, {self.way.algorithm}{spec}"

    def within(self, machine: Machine) -> Machine:
        """`machine` in the nodes of this case."""
        if self.nodes == 1:
            return machine
        rate = machine.link.rate * self.outer / self.rate
        return machines.joined(machine, machines.Link(rate, machine.link.start), self.world // self.nodes)


def shaped(rows: Sequence[dict[str, Any]]) -> list[Case]:
    """Of the rows of link.py: gloo's bf16 all-reduce, and what was compressed, one chunking of each."""
    cases = []
    for row in rows:
        name, _, outer = row["algorithm"].partition(" ")
        exact = (row["spec"], name) == (BASE, "exact")
        if not row["rate_gbit"] or not (exact or (name in COMPRESSED and row["path"] in traffic.ALGORITHMS)):
            continue
        way = cost_model.EXACT if exact else Way.of(row["spec"], row["path"], outer or None)
        where, nodes = machines.SHAPED.format(row["rate_gbit"]), row.get("nodes", 1)
        if nodes > 1:
            where += f", {nodes} nodes at {row['outer_gbit']:g}"
        source, seconds = "shaped nodes" if nodes > 1 else "shaped links", row["median_ms"] / 1e3
        cases.append(
            Case(
                source, where, way, row["bytes"], row["ranks"], seconds, row["rate_gbit"], row.get("outer_gbit"), nodes
            )
        )
    return cases


@dataclass(frozen=True)
class Prefill(Case):
    """A measured time to first token. products: seconds of it, without communication; bytes: of each message."""

    model: Transformer = cost_model.LLAMA_3_8B
    tokens: int = 0
    products: float = 0.0

    def modelled(self, machine: Machine) -> float:
        """With products as fast as they were measured: what is modelled is communication."""
        unit = cost_model.time_to_first_token(
            replace(machine, flops=1.0), self.way, self.model, self.tokens, self.world
        )
        machine = replace(machine, flops=unit.compute / self.products)
        return cost_model.time_to_first_token(machine, self.way, self.model, self.tokens, self.world).total

    @property
    def name(self) -> str:
        return f"{super().name}, {self.tokens} tokens"


def prefills(result: dict[str, Any]) -> list[Prefill]:
    """Of what benchmarks/ttft.py measured with weights of its own, as of others it does not tell the sizes."""
    if not result["rows"] or not result["model"].endswith(RANDOM):
        return []
    layers, hidden, ffn = (result[name] for name in ("layers", "hidden", "ffn"))
    model = Transformer(result["model"], layers * (4 * hidden**2 + 3 * hidden * ffn), layers, hidden)
    return [
        Prefill(
            "TTFT", machines.SHAPED.format(round(row["rate_gbit"], 3)), Way.of(row["spec"], path),
            cost_model.HALF * row["tokens"] * hidden, row["ranks"], row["ttft_ms"] / 1e3, row["rate_gbit"], model=model,
            tokens=row["tokens"], products=row["ttft_exact_ms"] / 1e3 * (1 - row["share"]),
        )
        for row in result["rows"]
        if row["rate_gbit"] and len(row["paths"]) == 1 and (path := next(iter(row["paths"]))) in traffic.ALGORITHMS[1:]
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
