"""A picture of a sensitivity: layer by kind of site, the effect on the left and the noise on the right."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..calibration.plot import check_installed

ANNOTATED = 64  # up to so many rows, each field holds its number, too


def heat_map(rows: Sequence[Mapping[str, Any]], title: str, format: str = "png") -> bytes:
    """rows: of `sensitivity --json`. format: "png" or "svg". Raises ConfigError without matplotlib.

    What has no effect above zero, or no noise, is left white.
    """
    check_installed()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    layers = sorted({row["layer"] for row in rows}, key=lambda layer: (layer is None, layer))
    height = 2 + 0.3 * min(len(layers), 40) + 0.08 * max(0, len(layers) - 40)
    figure = Figure((5 + 1.4 * len(kinds), height), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, and leaves the caller's own backend alone
    figure.suptitle(title, fontsize=10, wrap=True)
    panels = (("kl_mean", "KL divergence alone, nats", "viridis", True), ("sqnr_db", "SQNR, dB", "viridis_r", False))
    for axis, (name, label, colours, logarithmic) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        axis.set_ylabel("layer")
        axis.label_outer()
        _panel(axis, rows, kinds, layers, name, label, colours, logarithmic)
    out = io.BytesIO()
    figure.savefig(out, format=format, dpi=110, metadata={"Date": None} if format == "svg" else None)
    return out.getvalue()


def _panel(axis, rows, kinds, layers, name, label, colours, logarithmic) -> None:
    from matplotlib.colors import LogNorm

    values = [[math.nan] * len(kinds) for _ in layers]
    for row in rows:
        if (value := row[name]) is not None and (value > 0 or not logarithmic):
            values[layers.index(row["layer"])][kinds.index(row["kind"])] = value
    there = [value for line in values for value in line if not math.isnan(value)]
    norm = LogNorm(min(there), max(there) * (1 + 1e-6)) if logarithmic and there else None
    picture = axis.imshow(values, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
    axis.figure.colorbar(picture, ax=axis, label=label).ax.minorticks_off()
    axis.set_xticks(range(len(kinds)), kinds, fontsize=8, rotation=20)
    step = math.ceil(len(layers) / 40)
    names = ["none" if layer is None else str(layer) for layer in layers]
    axis.set_yticks(range(0, len(layers), step), names[::step], fontsize=8)
    if len(rows) > ANNOTATED:
        return
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if not math.isnan(value):
                shade = sum(picture.cmap(picture.norm(value))[:3])
                text = f"{value:.2g}" if logarithmic else f"{value:.1f}"
                axis.text(x, y, text, ha="center", va="center", fontsize=7, color="black" if shade > 1.5 else "white")
