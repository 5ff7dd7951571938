"""What a prefill takes, exact and with each spec as the gate decides: a panel for each link, communication in grey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lowbit.evaluation.plot import COLORS

GREY = "#BFBFBF"


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG. rows: of benchmarks/ttft.py."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    gated = [row for row in rows if row["algorithm"] == "gate"]
    links = list(dict.fromkeys((row["rate_gbit"], row["share"]) for row in gated))
    figure = Figure((5 * len(links), 3.5), layout="constrained")
    for axis, (rate, share) in zip(figure.subplots(1, len(links), squeeze=False)[0], links, strict=True):
        own = [row for row in gated if (row["rate_gbit"], row["share"]) == (rate, share)]
        exact, names = own[0]["ttft_exact_ms"], ["exact", *(row["spec"] for row in own)]
        computation = (1 - share) * exact
        bars = axis.barh(names, [exact, *(row["ttft_ms"] for row in own)], color=GREY)
        axis.barh(names, [computation, *(min(computation, row["ttft_ms"]) for row in own)], color=COLORS[0])
        axis.bar_label(bars, ["", *(f"{row['ratio']:.2f}×" for row in own)], padding=3)
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.set_xlabel("ms to the first token; grey: communication")
        where = f"{rate:.3g} Gbit/s" if rate else "loopback"
        axis.set_title(f"{where}, {own[0]['ranks']} ranks: a share of {share:.0%}")
    FigureCanvasAgg(figure).print_png(str(path))
