"""A picture of an evaluation: what is lost against what is sent, a point for every case, and the frontier: the cases to
which no other of the same TP size and algorithm is better in both.

A colour for each TP size, a marker for each algorithm. Up to NAMED cases are named all, else those on the frontier of
the largest TP size alone, as names of forty specs would cover what they name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .labels import label
from .verdict import LIMIT, name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of Okabe and Ito, told apart by all readers.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, FAINT, PAPER = "#1B1F24", "#8A9099", "#FEFEFE"
LEAST = 1e-6  # nats; what rounds to no divergence at all is drawn here, as the scale has no zero
NAMED = 8  # cases
STRAIGHT = 0.1  # %; up to this loss the scale is linear, beyond logarithmic: int2 and int8 fit into one picture
LOOKS = {"one-shot": ("o", "--"), "two-step": ("s", "-"), "hierarchical": ("^", ":")}  # marker, frontier
METRICS = {"loss": "perplexity above exact, %", "kl_mean": "KL divergence, nats"}

Row = Mapping[str, Any]


def groups(rows: Sequence[Row]) -> dict[tuple[int, str], list[Row]]:
    """Cases that compete with each other, by (TP size, algorithm), in ascending order of both."""
    keys = sorted({(row["tp"], row["algorithm"]) for row in rows})
    return {key: [row for row in rows if (row["tp"], row["algorithm"]) == key] for key in keys}


def frontier(rows: Sequence[Row], metric: str, against: str = "bits_per_value") -> list[Row]:
    """Those that no other beats in both `against` and `metric`, the cheapest first. What is not finite is none."""
    best, found = math.inf, []
    for row in sorted(rows, key=lambda row: (row[against], row[metric])):
        if row[metric] < best:
            best = row[metric]
            found.append(row)
    return found


def pareto(axis: Axes, rows: Sequence[Row], metric: str) -> None:
    """Draw a metric of METRICS against bits per value, without names: see `named`."""
    tps = sorted({row["tp"] for row in rows})
    axis.set(xlabel="bits per value", ylabel=METRICS[metric])
    axis.grid(color=FAINT, alpha=0.25, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.margins(0.08, 0.12)  # for the names of the points
    if metric == "loss":
        axis.set_yscale("symlog", linthresh=STRAIGHT)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.axhline(0, color=FAINT, linewidth=0.9)
        axis.axhline(100 * LIMIT, color=FAINT, linewidth=0.9, linestyle=":")
    else:
        axis.set_yscale("log")
    for (tp, algorithm), own in groups(rows).items():
        color, (marker, line) = COLORS[tps.index(tp) % len(COLORS)], LOOKS[algorithm]
        best = frontier(own, metric)
        if metric == "loss":
            low, high = zip(*([100 * bound for bound in row["loss_interval"]] for row in own))
            axis.vlines(_columns(own, metric)[0], low, high, color=color, linewidth=1, alpha=0.5)
        axis.plot(*_columns(own, metric), color=color, linestyle="", marker=marker, markersize=3, alpha=0.6)
        axis.plot(
            *_columns(best, metric), color=color, linestyle=line, linewidth=1, drawstyle="steps-post", marker=marker,
            markersize=5.5, label=f"TP {tp}, {algorithm}",
        )  # fmt: skip


def named(axis: Axes, rows: Sequence[Row], metric: str) -> None:
    """Write names beside the points; after the figure was drawn once, as they are measured."""
    chosen = rows if len(rows) <= NAMED else frontier(list(groups(rows).values())[-1], metric)
    names = [(*place, name(row)) for place, row in zip(zip(*_columns(chosen, metric)), chosen)]
    label(axis, names, list(zip(*_columns(rows, metric))), INK, PAPER)


def draw(figure: Figure, rows: Sequence[Row], metrics: Sequence[str], title: str = "") -> None:
    """Fill a new figure with a panel for each metric and one legend. It gets a canvas that can measure text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)  # draws without a display, and leaves the caller's own backend alone
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axis, metric in zip(axes, metrics):
        pareto(axis, rows, metric)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title or None)
    canvas.draw()
    figure.set_layout_engine("none")  # what was measured stays where it is
    for axis, metric in zip(axes, metrics):
        named(axis, rows, metric)


def plot(rows: Sequence[Row], title: str, path: str | Path) -> None:
    """Write a PNG. rows: of `evaluate --json`. On the left perplexity's loss with its interval, on the right the KL
    divergence, both against bits per value."""
    from matplotlib.figure import Figure

    figure = Figure((12, 5.6), layout="constrained", dpi=110)
    draw(figure, rows, tuple(METRICS), title)
    figure.savefig(str(path), format="png")


def _columns(rows: Sequence[Row], metric: str) -> tuple[list[float], list[float]]:
    """(bits, values as they are drawn)."""
    scale, least = (100, -math.inf) if metric == "loss" else (1, LEAST)
    return [row["bits_per_value"] for row in rows], [max(scale * row[metric], least) for row in rows]
