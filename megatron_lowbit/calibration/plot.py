"""A picture of a calibration: how far the outliers stand out, and whether they are the same ones everywhere.

Few sites: one small graph each, range against feature. Many: a map with a line per site, its features sorted from the
widest range on, so that the outliers are at its left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from ..calibration_file import Calibration
from ..errors import ConfigError

GRAPHS = 24  # up to so many sites, one graph each
COLUMNS = 4
ORDINARY, OUTLIER = "#7a8ca3", "#d1495b"


def check_installed() -> None:
    """Raise ConfigError if there is no matplotlib."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError("a plot needs matplotlib: pip install 'megatron-lowbit[eval]', or leave it out") from error


def plot(calibration: Calibration, overlaps: Mapping[str, float | None], path: str | Path) -> None:
    """Write a PNG. overlaps: site -> what `RangeTracker.overlap` says. Raises ConfigError."""
    check_installed()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = math.ceil(len(calibration.sites) / COLUMNS)
    many = len(calibration.sites) > GRAPHS
    size = (11, 2 + 0.14 * len(calibration.sites)) if many else (14, 1 + 2.4 * rows)
    figure = Figure(size, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, and leaves the caller's own backend alone
    figure.suptitle(
        f"{calibration.metadata.get('model', calibration.name)}: ranges of partial sums at TP {calibration.tp}, "
        f"{calibration.fraction} of the features as outliers"
    )
    (_map if many else _graphs)(figure, calibration, overlaps)
    try:
        figure.savefig(path, format="png", dpi=110)
    except OSError as error:
        raise ConfigError(f"plot {path} cannot be written ({error}): give another file") from error


def _graphs(figure, calibration: Calibration, overlaps: Mapping[str, float | None]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    columns = min(COLUMNS, len(calibration.sites))
    axes = figure.subplots(math.ceil(len(calibration.sites) / columns), columns, squeeze=False).ravel()
    for site, axis in zip(calibration.sites, axes):
        hull, outliers = _positive(calibration.ranges[site].hull), list(calibration.outliers[site])
        axis.plot(hull.numpy(), ".", markersize=2.5, color=ORDINARY)
        axis.plot(outliers, hull[outliers].numpy(), "o", markersize=4, color=OUTLIER)
        axis.axhline(float(hull.median()), linewidth=0.8, linestyle="--", color="black")
        axis.set_yscale("log")
        axis.yaxis.set(major_locator=LogLocator(subs=(1, 1.5, 2, 3, 5, 7)), minor_locator=NullLocator())
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_title(f"{site}, overlap {_percent(overlaps.get(site))}", fontsize=9)
        axis.tick_params(which="both", labelsize=7)
    for axis in axes[len(calibration.sites) :]:
        axis.remove()
    figure.supxlabel("feature (red: outliers; dashed: median; overlap: of the outliers of two halves of the windows)")
    figure.supylabel("range")


def _map(figure, calibration: Calibration, overlaps: Mapping[str, float | None]) -> None:
    from matplotlib.colors import LogNorm

    sites = calibration.sites
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
    features = max(ranges.features for ranges in calibration.ranges.values())
    places = sorted({round(features ** (i / 199)) for i in range(200)})  # from 1 on, ever farther apart
    lines = torch.full((len(sites), len(places)), torch.nan)
    for line, site in zip(lines, sites):
        hull = _positive(calibration.ranges[site].hull).sort(descending=True).values
        inside = [place - 1 for place in places if place <= len(hull)]
        line[: len(inside)] = (hull / hull.median())[inside]
    edges = [place - 0.5 for place in places] + [features + 0.5]
    norm = LogNorm(1, max(2, float(lines.nan_to_num(0).max())))  # what lies below the median needs no colours
    borders = [index - 0.5 for index in range(len(sites) + 1)]
    picture = left.pcolormesh(edges, borders, lines.numpy(), norm=norm, cmap="viridis")
    figure.colorbar(
        picture, ax=left, location="top", fraction=0.02, pad=0.01, aspect=40, label="range / median range of the site"
    )
    counts = [len(calibration.outliers[site]) + 0.5 for site in sites]
    left.vlines(counts, borders[:-1], borders[1:], color=OUTLIER, linewidth=2)
    left.set(xscale="log", xlabel="features, widest first (left of the red line: outliers)", xlim=(0.5, features + 0.5))
    left.set_yticks(range(len(sites)), sites, fontsize=6)
    left.invert_yaxis()
    right.barh(range(len(sites)), [100 * (overlaps.get(site) or 0) for site in sites], color=ORDINARY)
    right.axvline(100 * float(calibration.fraction), linestyle="--", linewidth=0.8, color="black")
    right.set(xlabel="overlap of halves, %\n(dashed: chance)", xlim=(0, 100))


def _positive(hull: torch.Tensor) -> torch.Tensor:
    """A range of zero has no place on a logarithmic axis: it goes to the bottom of it."""
    return hull.clamp_min(float(hull.max()) * 1e-6 or 1e-6)


def _percent(part: float | None) -> str:
    return "-" if part is None else f"{part:.0%}"
