"""Modelled against measured times: a point for each case, on both scales logarithmic; on the line they are equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lowbit.evaluation.plot import COLORS

BAND = 0.2  # the goal, on both sides of the line
PANELS = ("shaped links", "MI300X", "8 B200")  # what names of sources begin with
LOOKS = [(color, marker) for marker in "o^" for color in COLORS]


def plot(cases: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG. cases: of benchmarks/cost_model.py, filled where held out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((5 * len(PANELS), 5), layout="constrained")
    for axis, title in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        own = [case for case in cases if case["source"].startswith(title)]
        for (color, marker), source in zip(LOOKS, dict.fromkeys(case["source"] for case in own)):
            points = [case for case in own if case["source"] == source]
            face = color if points[0]["held_out"] else "none"
            x, y = ([case[what] for case in points] for what in ("measured_ms", "modelled_ms"))
            label = f"{source.removeprefix(title).strip(' ,')}, {'held out' if points[0]['held_out'] else 'fitted'}"
            axis.scatter(x, y, s=18, marker=marker, facecolors=face, edgecolors=color, label=label)
        times = [case[what] for case in own for what in ("measured_ms", "modelled_ms")]
        ends = [0.8 * min(times), 1.25 * max(times)]
        axis.plot(ends, ends, color="#7F7F7F", linewidth=0.8)
        low, high = ([end * (1 + sign * BAND) for end in ends] for sign in (-1, 1))
        axis.fill_between(ends, low, high, color="#7F7F7F", alpha=0.15)
        axis.set(xscale="log", yscale="log", xlabel="measured, ms", ylabel="modelled, ms")
        axis.set_title(title)
        axis.legend(frameon=False, fontsize="x-small")
    FigureCanvasAgg(figure).print_png(str(path))
