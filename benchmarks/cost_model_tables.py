"""Tables of the cost model for docs/: how far it is off, and what it expects of each machine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Table = tuple[list[str], list[list[str]]]


def errors(result: Mapping[str, Any]) -> Table:
    """A row for each part of each source."""
    columns = ["source", "parameters fitted to", "", "cases", "median error", "from 1 MiB on", "worst", "the worst"]
    return columns, [
        [row["source"], row["fitted_to"], "**held out**" if row["held_out"] else "fitted", str(row["cases"]),
         f"{row['median_error']:.0%}", f"{row['median_error_large'] or math.nan:.0%}",
         f"{row['worst_error']:.0%}", row["worst_case"]]
        for row in result["rows"]
    ]  # fmt: skip


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def machines(result: Mapping[str, Any]) -> Table:
    """A row for each machine that is described; every figure is modelled."""
    size = f"{result['bytes'] >> 20} MiB"
    columns = ["modelled", "ranks", "algorithm", f"{size} exact, ms", "compressed", "TTFT exact, ms",
               "communication's share", "compressed", "per token exact, ms", "with the gate"]  # fmt: skip
    lines = []
    for row in result["machines"]:
        cells = [row["machine"], str(row["ranks"]), row["algorithm"], _ms(row["modelled_exact_ms"]),
                 f"{row['modelled_gain']:.2f}×"]  # fmt: skip
        if "modelled_ttft_ms" in row:
            cells += [_ms(row["modelled_ttft_ms"]), f"{row['modelled_share']:.0%}",
                      f"{row['modelled_ttft_gain']:.2f}×", _ms(row["modelled_token_ms"]),
                      f"{row['modelled_token_gain']:.2f}×"]  # fmt: skip
        lines.append(cells + [""] * (len(columns) - len(cells)))
    return columns, lines
