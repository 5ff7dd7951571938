"""Whether outliers of partial sums sit in the same features throughout a text, site by site.

The premise of every codec that keeps some features apart: an outlier while calibrating will be one in inference.
Measured on the first windows of the evaluated text as `calibrate` measures it on its own (calibration/collect.py): the
features of the widest ranges in every second window against those in the others; and, if there is a calibration from
another text, its outliers against those of this text.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..calibration.collect import RangeTracker, watch
from ..calibration_file import FRACTION, Calibration
from .sensitivity import place
from .windows import Window

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WINDOWS = 8  # each costs about what one costs exactly


def consistency(
    model: torch.nn.Module, windows: Sequence[Window], tp: int, calibration: Calibration | None = None
) -> dict[str, Any]:
    """What the report says of outliers at one TP size.

    Returns {"tp", "windows", "fraction", "calibration" (bool), "rows": a site each with "site", "layer", "kind",
    "features", "outliers" (how many), "overlap" (part of them that both halves of the windows share; None with a single
    window), "chance" (what the overlap would be without any pattern), "times" (the median outlier's range, in that of
    the median feature), "calibrated" (part of them that are the calibration's too, or None)}. Raises as RangeTracker.
    """
    tracker = RangeTracker(calibration.fraction if calibration else FRACTION)
    first, device = windows[:WINDOWS], next(model.parameters()).device
    watch(model, torch.stack([window.ids for window in first]).to(device), tp, tracker)
    here, rows = tracker.finish(), []
    for site in here.sites:
        own, hull = here.outliers[site], here.ranges[site].hull
        median = statistics.median(hull.tolist())
        known = calibration.outliers.get(site) if calibration else None
        layer, kind = place(site)
        rows.append(
            {
                "site": site,
                "layer": layer,
                "kind": kind,
                "features": len(hull),
                "outliers": len(own),
                "overlap": tracker.overlap(site),
                "chance": len(own) / len(hull),
                "times": statistics.median(hull[list(own)].tolist()) / median if median else None,
                "calibrated": None if known is None else len(set(own) & set(known)) / len(own),
            }
        )
    return {
        "tp": tp,
        "windows": len(first),
        "fraction": str(here.fraction),
        "calibration": calibration is not None,
        "rows": rows,
    }


def draw(figure: Figure, found: dict[str, Any], what: str) -> None:
    """Fill a figure, by layer, with a line for each kind of site. what: "overlap", which there is from two windows on,
    and dotted what the calibration shares; or "times", how far the outliers stand out."""
    from matplotlib.ticker import MaxNLocator

    from .plot import COLORS, FAINT

    axis, rows = figure.subplots(), found["rows"]
    for number, kind in enumerate(dict.fromkeys(row["kind"] for row in rows)):
        own = [(i if row["layer"] is None else row["layer"], row) for i, row in enumerate(rows) if row["kind"] == kind]
        look = {"color": COLORS[number % len(COLORS)], "marker": "os^Dv"[number % 5], "linewidth": 1}
        layers, scale = [layer for layer, _ in own], 100 if what == "overlap" else 1
        axis.plot(layers, [_drawn(row[what], scale) for _, row in own], label=kind, **look)
        if what == "overlap" and found["calibration"]:
            shared = [_drawn(row["calibrated"], scale) for _, row in own]
            axis.plot(layers, shared, linestyle=":", markerfacecolor="none", **look)
    chance = 100 * max(row["chance"] for row in rows) if what == "overlap" else 1
    axis.axhline(chance, color=FAINT, linestyle="--", linewidth=1)
    if what == "overlap":
        axis.set(ylim=(-4, 104), ylabel="outliers in common, %")
    else:
        axis.set(ylim=(0, None), ylabel="range of outliers / of the rest")
    axis.set_xlabel("layer")
    axis.grid(color=FAINT, alpha=0.25, linewidth=0.6)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)


def _drawn(value: float | None, scale: float) -> float:
    return math.nan if value is None else scale * value
