"""Tables of what benchmarks/link.py measured, for README.md and docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import geometric_mean
from typing import Any

Result = Mapping[str, Any]
Table = tuple[list[str], list[list[str]], str]
Measured = Callable[[Result], str]
DIRECT = "direct"


def sizes(result: Result, measured: Measured) -> Table:
    """A row for each link, number of ranks and size: times faster than gloo's bf16 all-reduce."""
    found, specs = _always(result)
    lines = []
    for place in dict.fromkeys(key[:3] for key in found):
        base, own = found[(*place, "bf16")], [found[(*place, spec)] for spec in (DIRECT, *specs)]
        cells = [f"{r['ratio_to_gloo_bf16']:.2f}× ({r['median_ms']:.1f})" for r in own]
        exact = [f"{base['median_ms']:.1f}", f"{base['wire_ms'] or 0:.1f}"]
        lines.append([_link(base), f"{base['bytes'] >> 10:,} KiB", *exact, *cells])
    note = (
        f"Times faster than gloo's bf16 all-reduce (ms): as the default sends what it leaves exact, then every message "
        f"compressed; medians of {result['repeats']} of the slowest rank, all in turn. {measured(result)}"
    )
    columns = ["link", "message", "gloo bf16, ms", "of that on the wire", "left exact", *(f"`{s}`" for s in specs)]
    return columns, lines, note


def largest(result: Result, measured: Measured) -> Table:
    """Of the largest message alone."""
    found, specs = _always(result)
    nbytes = max(key[2] for key in found)
    lines = [
        [_link(found[(*place, "bf16")]), *(f"{found[(*place, spec)]['ratio_to_gloo_bf16']:.2f}×" for spec in specs)]
        for place in dict.fromkeys(key[:3] for key in found if key[2] == nbytes)
    ]
    note = (
        f"Times faster than gloo's bf16 all-reduce, {nbytes >> 20} MiB, CPUs; ranks and links share two cores. "
        f"{measured(result)}"
    )
    return ["link", *(f"`{spec}`" for spec in specs)], lines, note


def chunks(result: Result, measured: Measured) -> Table:
    """A row for each link, a column for each number of chunks."""
    rows = [row for row in result["rows"] if row["algorithm"] not in ("exact", "auto")]
    lines = [[_link(here[0]), *(f"{row['ratio_to_gloo_bf16']:.2f}×" for row in here)] for here in _by_link(rows)]
    note = (
        f"Times faster than gloo's bf16 all-reduce, `{rows[0]['spec']}`, {rows[0]['bytes'] >> 20} MiB; medians of "
        f"{result['repeats']}. {measured(result)}"
    )
    names = {"collectives": "unchunked", "1 chunks": "in one piece"}
    return ["link", *(names.get(name, name) for name in dict.fromkeys(row["algorithm"] for row in rows))], lines, note


def gate(result: Result, measured: Measured) -> Table:
    """A row for each link and number of ranks: what the default made of all sizes and specs, against gloo's bf16.

    Beside what was left exact stands gloo's fp16 all-reduce of the same sizes, which ours has no part in: how far apart
    medians of as good as the same operation are.
    """
    fp16 = {_key(row): row["ratio_to_gloo_bf16"] for row in result["rows"] if row["spec"] == "fp16"}
    lines = []
    for here in _by_link([row for row in result["rows"] if row["algorithm"] == "gate"]):
        exact = [row["ratio_to_gloo_bf16"] for row in here if row["path"] == "exact"]
        control = [fp16[_key(row)] for row in here if row["path"] == "exact"]
        sent = [row["ratio_to_gloo_bf16"] for row in here if row["path"] != "exact"]
        lines.append([_link(here[0]), *_spread(sent), *_spread(exact), *_spread(control)[1:]])
    note = (
        f"Of {result['repeats']} measurements of each size and spec, against gloo's bf16 all-reduce. {measured(result)}"
    )
    columns = ["link", "compressed", "least", "mean", "left exact", "least", "mean", "gloo fp16, least", "mean"]
    return columns, lines, note


def _always(result: Result) -> tuple[dict[tuple, Mapping[str, Any]], list[str]]:
    """(rate, ranks, bytes, spec) -> its row, of those that compress whatever the size; the specs.

    Among them DIRECT, what the default leaves exact: torch's own where it has no way of its own.
    """
    rows = [row for row in result["rows"] if row["algorithm"] in ("exact", "auto")]
    found = {(*_key(row), row["spec"]): row for row in rows}
    own = {_key(row): row for row in result["rows"] if row["algorithm"] == DIRECT}
    found |= {(*place, DIRECT): own.get(place, found[(*place, "bf16")]) for place in map(_key, rows)}
    return found, list(dict.fromkeys(r["spec"] for r in rows if r["algorithm"] == "auto"))


def _key(row: Mapping[str, Any]) -> tuple:
    return row["rate_gbit"], row["ranks"], row["bytes"]


def _by_link(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    places = dict.fromkeys((row["rate_gbit"], row["ranks"]) for row in rows)
    return [[row for row in rows if (row["rate_gbit"], row["ranks"]) == place] for place in places]


def _link(row: Mapping[str, Any]) -> str:
    rate = f"{row['rate_gbit']:g} Gbit/s" if row["rate_gbit"] else "loopback"
    return f"{rate}, {row['ranks']} ranks"


def _spread(ratios: Sequence[float]) -> list[str]:
    """How many, the least, their geometric mean."""
    if not ratios:
        return ["0", "", ""]
    return [str(len(ratios)), f"{min(ratios):.2f}×", f"{geometric_mean(ratios):.2f}×"]


def nodes(result: Result, measured: Measured) -> Table:
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
