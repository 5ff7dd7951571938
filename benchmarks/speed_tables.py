"""Tables of docs/performance.md, from what benchmarks/link.py and benchmarks/ttft.py found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_lowbit import links
from megatron_lowbit.spec import parse

Row = Mapping[str, Any]


def crossover(exact: Mapping[int, float], compressed: Mapping[int, float]) -> int | None:
    """Bytes of the smallest message from which on compressed is faster at every measured size; None: at no size.

    exact, compressed: bytes -> ms.
    """
    best = None
    for nbytes in sorted(compressed, reverse=True):
        if compressed[nbytes] >= exact[nbytes]:
            break
        best = nbytes
    return best


def thresholds(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """A row for each link and number of ranks, a column for each spec: what was measured, and what links.py holds."""
    rows = [row for row in rows if row["rate_gbit"]]
    specs = list(dict.fromkeys(row["spec"] for row in rows if row["algorithm"] == "auto"))
    lines = []
    for rate, ranks in dict.fromkeys((row["rate_gbit"], row["ranks"]) for row in rows):
        here = [row for row in rows if (row["rate_gbit"], row["ranks"]) == (rate, ranks)]
        kind, exact, cells = links.reaching(rate), _times(here, "bf16", "exact"), []
        exact |= {size: min(exact[size], taken) for size, taken in _times(here, "bf16", "direct").items()}
        for spec in specs:
            held = kind.worth_from(parse(spec), ranks)
            cells.append(f"{_size(crossover(exact, _times(here, spec, 'auto')))} ({_size(held)})")
        lines.append([f"{rate:g} Gbit/s, {ranks} ranks", kind.name, *cells])
    return ["link", "kind", *(f"`{spec}`" for spec in specs)], lines


def _times(rows: Sequence[Row], spec: str, algorithm: str) -> dict[int, float]:
    return {r["bytes"]: r["median_ms"] for r in rows if (r["spec"], r["algorithm"]) == (spec, algorithm)}


def _size(nbytes: int | None) -> str:
    return "never" if nbytes is None or nbytes >= links.NEVER else f"{nbytes >> 10:,} KiB"


def first_tokens(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """A row for each link and spec: with the gate, and with every message compressed."""
    found = {(r["engine"], r["rate_gbit"], r["share_target"], r["spec"], r["algorithm"]): r for r in rows}
    lines = []
    for place in dict.fromkeys(key[:4] for key in found):
        gate, always = found[(*place, "gate")], found[(*place, "always")]
        rate = f"{gate['rate_gbit']:.3g} Gbit/s" if gate["rate_gbit"] else "loopback"
        lines.append([
            f"{rate}, {gate['ranks']} ranks", f"{gate['share']:.0%}", f"`{gate['spec']}`",
            f"{gate['ttft_exact_ms']:.0f}", f"{gate['ttft_ms']:.0f} (**{gate['ratio']:.2f}×**)",
            f"{always['ttft_ms']:.0f} ({always['ratio']:.2f}×)",
            f"{gate['bytes_exact'] / 1e6:.1f} → {always['bytes_sent'] / 1e6:.1f}", f"{gate['decode_exact_ms']:.2f}",
            *(f"{r['decode_ms']:.2f} ({r['decode_ms'] / r['decode_exact_ms'] - 1:+.1%})" for r in (gate, always)),
        ])  # fmt: skip
    columns = ["link", "communication", "spec", "exact, ms", "gate", "always", "MB per rank", "a later token exact, ms"]
    return [*columns, "gate", "always"], lines


def note(result: Mapping[str, Any]) -> str:
    """What was measured of first tokens, and how. result: what benchmarks/ttft.py wrote."""
    sizes = ""
    if "layers" in result:  # of random weights; a folder's name says it all
        sizes = f" of {result['layers']} layers, hidden size {result['hidden']}, {result['ffn']} in the MLP"
    return (
        f"{result['model']}{sizes}, {result['dtype']}; {result['rows'][0]['engine']}; a prompt of {result['tokens']:,} "
        f"tokens and {result['decode_tokens']} more; medians of {result['repeats']}, all in turn, of the slowest rank. "
    )
