"""Table of benchmarks/link.py for docs/performance.md: several nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Table = tuple[list[str], list[list[str]], str]


def nodes(result: Mapping[str, Any], measured: Callable[[Mapping[str, Any]], str]) -> Table:
    """A row for each network, size and spec, a column for each algorithm; the note below."""
    rows = result["rows"]
    algorithms = list(dict.fromkeys(row["algorithm"] for row in rows if row["algorithm"] != "exact"))
    place = lambda row: (row["nodes"], row["ranks"], row["outer_gbit"], row["bytes"])  # noqa: E731
    found = {(*place(row), row["spec"], row["algorithm"]): row for row in rows}
    lines = []
    for key in dict.fromkeys(key[:5] for key in found if key[5] != "exact"):
        count, ranks, outer, nbytes, spec = key
        base = found[(*key[:4], "bf16", "exact")]["median_ms"]
        own = [found[(*key, algorithm)] for algorithm in algorithms]
        cells = [f"{r['ratio_to_gloo_bf16']:.2f}× ({r['median_ms']:.1f}, {r['wire_ms']:.1f})" for r in own]
        network = f"{count} × {ranks // count}, {outer:g} Gbit/s"
        lines.append([network, f"{nbytes >> 10:,} KiB", f"`{spec}`", f"{base:.1f}", *cells])
    note = (
        f"Nodes × ranks of each, their uplinks; a rank's own link has {rows[0]['rate_gbit']:g} Gbit/s. Times faster "
        f"than gloo's bf16 all-reduce (ms, of these the wire's); medians of {result['repeats']} of the slowest, "
        f"all in turn. {measured(result)}"
    )
    return ["nodes, uplink", "message", "spec", "gloo bf16, ms", *map(_named, algorithms)], lines, note


def _named(algorithm: str) -> str:
    name, _, outer = algorithm.partition(" ")
    return f"{name}, `{outer}` between nodes" if outer else name
