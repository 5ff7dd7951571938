"""A picture of a sensitivity: layer by kind of site, the effect on the left and the noise on the right."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..calibration.plot import check_installed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ANNOTATED = 64  # up to so many rows, each field holds its number, too
PANELS = {"kl_mean": "KL divergence alone, nats", "sqnr_db": "SQNR, dB"}

Row = Mapping[str, Any]


def heat_map(rows: Sequence[Row], title: str) -> bytes:
    """PNG. rows: of `sensitivity --json`. Raises ConfigError without matplotlib.

    What has no effect above zero, or no noise, is left white.
    """
    check_installed()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds, layers = axes_of(rows)
    height = 2 + 0.3 * min(len(layers), 40) + 0.08 * max(0, len(layers) - 40)
    figure = Figure((5 + 1.4 * len(kinds), height), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, and leaves the caller's own backend alone
    figure.suptitle(title, fontsize=10, wrap=True)
    draw(figure, rows)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def axes_of(rows: Sequence[Row]) -> tuple[list[str], list[int | None]]:
    """The kinds of sites and the layers, in the order in which they are drawn."""
    layers = sorted({row["layer"] for row in rows}, key=lambda layer: (layer is None, layer))
    return list(dict.fromkeys(row["kind"] for row in rows)), layers


def draw(figure: Figure, rows: Sequence[Row], panels: Iterable[str] = tuple(PANELS)) -> None:
    """Fill a figure, with a panel for each of these keys of PANELS."""
    panels = list(panels)
    for axis, name in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels):
        axis.set_ylabel("layer")
        axis.label_outer()
        _panel(axis, rows, name)


def _panel(axis: Axes, rows: Sequence[Row], name: str) -> None:
    from matplotlib.colors import LogNorm

    kinds, layers = axes_of(rows)
    logarithmic = name == "kl_mean"  # of SQNR it is the low ones that are bad
    values = [[math.nan] * len(kinds) for _ in layers]
    for row in rows:
        if (value := row[name]) is not None and (value > 0 or not logarithmic):
            values[layers.index(row["layer"])][kinds.index(row["kind"])] = value
    there = [value for line in values for value in line if not math.isnan(value)]
    norm = LogNorm(min(there), max(there) * (1 + 1e-6)) if logarithmic and there else None
    picture = axis.pcolormesh(values, cmap="viridis" if logarithmic else "viridis_r", norm=norm)
    axis.invert_yaxis()
    axis.figure.colorbar(picture, ax=axis, label=PANELS[name]).ax.minorticks_off()
    axis.set_xticks([x + 0.5 for x in range(len(kinds))], kinds, fontsize="small", rotation=20)
    step = math.ceil(len(layers) / 40)
    names = ["none" if layer is None else str(layer) for layer in layers]
    axis.set_yticks([y + 0.5 for y in range(0, len(layers), step)], names[::step], fontsize="small")
    if len(rows) > ANNOTATED:
        return
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if not math.isnan(value):
                ink = "black" if sum(picture.cmap(picture.norm(value))[:3]) > 1.5 else "white"
                text = f"{value:.2g}" if logarithmic else f"{value:.1f}"
                axis.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize="x-small", color=ink)
