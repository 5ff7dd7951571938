"""The picture of the quality benchmark: SQNR against bits, one curve per family of codecs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


@dataclass(frozen=True)
class Family:
    """Specs that `pattern` matches in full, drawn alike: colours of Okabe and Ito, told apart by all readers."""

    label: str
    pattern: str
    color: str
    marker: str
    line: str = "-"  # "": points that are formats of their own; several have their names beside them


FAMILIES = (
    Family("int, g32", r"int\d:g32", "#000000", "o"),
    Family("int, g64, spike", r"int\d:g64:spike", "#0072B2", "s"),
    Family("gauss, g128", r"gauss\d:g128", "#E69F00", "^"),
    Family("gauss, g256 (no metadata)", r"gauss\d:g256", "#D55E00", "v"),
    Family("gauss, g128, trellis", r"gauss\d:g128:trellis", "#8C6D00", "*"),
    Family("gauss, g128, outliers", r"gauss\d:g128:outliers=.*", "#009E73", "D", "--"),
    Family("fp8, MX, NVFP4", r"(mx|nv)?fp\d.*", "#CC79A7", "P", ""),
    Family("selective4", r"selective4.*", "#56B4E9", "X", ""),
)


def plot(rows: list[dict], path: Path) -> None:
    """Write a PNG: Gaussian values in one hop, and the model's sums after two-step at the largest TP size measured."""
    tp = max(row["tp"] for row in rows if row["tp"])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5.4), sharey=True, layout="constrained")
    _panel(left, [row for row in rows if row["data"] == "Gaussian"], "Gaussian values, one hop")
    sums = [row for row in rows if row["tp"] == tp and row["hop"] == "two-step"]
    _panel(right, sums, f"the model's sums, TP {tp}, two-step")
    bounds = sorted((row["bits_per_value"], row["shannon_db"]) for row in rows if row["data"] == "Gaussian")
    left.plot(*zip(*bounds), color="#7F7F7F", linestyle=":", label="Shannon bound")
    left.set_ylabel("signal to quantization noise, dB")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _panel(axis: pyplot.Axes, rows: list[dict], title: str) -> None:
    for family in FAMILIES:
        points = sorted(
            (row["bits_per_value"], row["sqnr_db"], row["spec"])
            for row in rows
            if re.fullmatch(family.pattern, row["spec"])
        )
        if not points:
            continue
        bits, decibels, specs = zip(*points)
        axis.plot(bits, decibels, color=family.color, marker=family.marker, linestyle=family.line or "none",
                  markersize=6, linewidth=1.2, label=family.label)  # fmt: skip
        if not family.line and len(points) > 1:
            for spec, point in zip(specs, zip(bits, decibels)):
                place = {"xytext": (-6, -3), "ha": "right"} if spec.startswith("fp8") else {"xytext": (6, -9)}
                axis.annotate(spec, point, textcoords="offset points", fontsize=8, color=family.color, **place)
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("bits per value, scales and the like included")
    axis.set_xlim(1.7, 9.3)
    axis.grid(alpha=0.3)
