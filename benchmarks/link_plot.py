"""How many times faster than gloo's bf16 all-reduce, against the size of the message: a panel for each link."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lowbit.evaluation.plot import COLORS

EXACT = ("bf16", "fp16", "fp32")


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG. rows: of benchmarks/link.py."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    links = list(dict.fromkeys((row["rate_gbit"], row["ranks"]) for row in rows))
    figure = Figure((4 * len(links), 4), layout="constrained")
    panels = figure.subplots(1, len(links), sharey=True, squeeze=False)[0]
    kinds = list(dict.fromkeys((r["spec"], r["algorithm"]) for r in rows if r["spec"] not in EXACT))
    for axis, (rate, ranks) in zip(panels, links, strict=True):
        own = [row for row in rows if (row["rate_gbit"], row["ranks"]) == (rate, ranks)]
        for color, kind in zip(COLORS * len(kinds), kinds):
            points = sorted((r["bytes"], r["ratio_to_gloo_bf16"]) for r in own if (r["spec"], r["algorithm"]) == kind)
            style = "--" if kind[1] == "gate" else "-"
            axis.plot(*zip(*points), style, color=color, marker="o", markersize=4, label=" ".join(kind))
        axis.axhline(1, color="#7F7F7F", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_title(f"{rate:g} Gbit/s, {ranks} ranks" if rate else f"loopback, {ranks} ranks")
        axis.set_xlabel("bytes of the bf16 message")
    panels[0].set_ylabel("times faster than gloo's bf16 all-reduce")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    FigureCanvasAgg(figure).print_png(str(path))
