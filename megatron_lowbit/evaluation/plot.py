"""A picture of an evaluation: what is lost against what is sent, a point for every case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Colours of Okabe and Ito, told apart by all readers.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LEAST = 1e-6  # nats; what rounds to no divergence at all is drawn here, as the scale has no zero


def plot(rows: Sequence[Mapping[str, Any]], title: str, path: str | Path) -> None:
    """Write a PNG. rows: of `evaluate --json`. On the left perplexity's loss with its interval, on the right the KL
    divergence, both against bits per value."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, tp in zip(COLORS * len(rows), sorted({row["tp"] for row in rows})):
        own = sorted((row for row in rows if row["tp"] == tp), key=lambda row: row["bits_per_value"])
        bits, loss = [row["bits_per_value"] for row in own], [100 * row["loss"] for row in own]
        reach = [50 * (high - low) for low, high in (row["loss_interval"] for row in own)]
        left.errorbar(bits, loss, yerr=reach, color=color, marker="o", linestyle="", capsize=3, label=f"TP {tp}")
        divergence = [max(row["kl_mean"], LEAST) for row in own]
        right.plot(bits, divergence, color=color, marker="o", linestyle="", label=f"TP {tp}")
        for row, x, y in zip(own, bits, divergence, strict=True):
            right.annotate(row["plan"] or row["spec"], (x, y), (4, 4), textcoords="offset points", fontsize=7)
    left.axhline(0, color="#7F7F7F", linewidth=0.8)
    left.set_ylabel("perplexity above exact, %")
    right.set_ylabel("KL divergence, nats")
    right.set_yscale("log")
    for axis in (left, right):
        axis.set_xlabel("bits per value")
        axis.margins(x=0.15)  # for the names of the points
    figure.suptitle(title)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
    FigureCanvasAgg(figure).print_png(str(path))
