"""One HTML page about an evaluation, complete in itself: it opens from disk, without a network and without JavaScript.

Made of plain data alone, which is what `evaluate --json` and its relatives write. Texts that come from a user (names of
models, files and specs) are escaped by the template; what is marked safe is the drawings, whose texts the XML library
escapes. A policy in the page forbids everything that would be loaded from elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .. import whole_file
from ..errors import ConfigError
from . import verdict

TEMPLATE = "report.html"
BARS = 12  # cases at a TP size; of more, those are shown that no other beats in bytes and divergence
HIGH = 40  # rows; a longer table gets a scroll bar of its own
SQUARE, HALF = (5.8, 5.3), (5.8, 3.8)  # inches; a telephone shows them at about their size
HIGHEST = 7.5  # inches, of a map of many layers
WORST = 5  # sites that the sensitivity's table lists


@dataclass(frozen=True)
class Findings:
    """facts: of the JSON, with versions and date. rows, tasks, notes: as they are there. command: what to type again.

    sensitivity: of its own JSON; consistency: what `consistency.consistency` returns; None where it was not measured.
    """

    facts: Mapping[str, str]
    rows: Sequence[Mapping[str, Any]]
    command: str
    sensitivity: Mapping[str, Any] | None = None
    consistency: Mapping[str, Any] | None = None
    tasks: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()


def check_installed() -> None:
    """Raise ConfigError if a package that draws or writes the page is missing."""
    from ..calibration.plot import check_installed as check_matplotlib

    check_matplotlib()
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise ConfigError("a report needs Jinja2: pip install 'megatron-lowbit[eval]', or leave it out") from error


def write(findings: Findings, folder: Path) -> Path:
    """Write `folder`/index.html, and the folder if there is none -> its path. Raises ConfigError."""
    text = page(findings)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"report {folder} cannot be written ({error}): give another folder") from error
    path = folder / "index.html"
    whole_file.write(path, text.encode(), "report")
    return path


def page(findings: Findings) -> str:
    """The page's HTML. Raises ConfigError if what it needs is not installed."""
    check_installed()
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = PackageLoader("megatron_lowbit.evaluation", "")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.lstrip_blocks = True
    environment.filters["number"] = _number
    environment.globals |= {"name": verdict.name, "saving": verdict.saving, "judged": verdict.judged}
    rows = findings.rows
    chosen = {tp: verdict.choice(rows, tp) for tp in sorted({row["tp"] for row in rows})}
    sensitive = sorted((findings.sensitivity or {}).get("rows", ()), key=lambda row: -row["kl_mean"])[:WORST]
    return environment.get_template(TEMPLATE).render(
        f=findings,
        facts=findings.facts,
        verdict=[*verdict.sentences(rows), *(f"Note: {note}." for note in findings.notes)],
        chosen=list(filter(None, chosen.values())),
        bars=[_bars(rows, tp) for tp in chosen],
        drawings={name: Markup(drawing) for name, drawing in _drawings(findings).items()},
        sensitive=sensitive,
        high=len(rows) > HIGH,
        named=_named(rows),
    )


def _drawings(findings: Findings) -> dict[str, str]:
    """Name -> <svg>."""
    from . import consistency, heat_map, plot
    from .svg import inline

    found, rows = {}, findings.rows
    for metric, what in plot.METRICS.items():
        best = ", ".join(verdict.name(row) for row in plot.frontier(list(plot.groups(rows).values())[-1], metric))
        alt = f"{what}, against bits per value, {len(rows)} cases. On the frontier of {_named(rows)[1]}: {best}."
        found[metric] = inline(metric, alt, SQUARE, partial(plot.draw, rows=rows, metrics=(metric,)))
    if findings.sensitivity:
        sites = findings.sensitivity["rows"]
        worst, height = max(sites, key=lambda row: row["share"]), 2 + 0.3 * len(heat_map.axes_of(sites)[1])
        for panel, what in heat_map.PANELS.items():
            alt = f"{what}, by layer and kind of site. Most sensitive of {len(sites)}: {worst['site']}."
            draw = partial(heat_map.draw, rows=sites, panels=[panel])
            found[f"map_{panel}"] = inline(f"map-{panel}", alt, (SQUARE[0], min(height, HIGHEST)), draw)
    if findings.consistency:
        of = findings.consistency
        draw = partial(consistency.draw, found=of)
        if of["windows"] > 1:
            alt = f"Part of the outliers that halves of the windows share, by layer, TP {of['tp']}."
            found["overlap"] = inline("overlap", alt, HALF, partial(draw, what="overlap"))
        alt = f"Range of the median outlier in that of the median feature, by layer, TP {of['tp']}."
        found["outliers"] = inline("outliers", alt, HALF, partial(draw, what="times"))
    return found


def _named(rows: Sequence[Mapping[str, Any]]) -> tuple[bool, str]:
    """(whether all points have names, else the group whose frontier has)."""
    from .plot import NAMED, groups

    tp, algorithm = list(groups(rows))[-1]
    return len(rows) <= NAMED, f"TP {tp}, {algorithm}"


def _bars(rows: Sequence[Mapping[str, Any]], tp: int) -> dict[str, Any]:
    """Bars at one TP size, from few bytes on: (row, length in % of the longest); how many cases have none."""
    from .plot import frontier

    own = [row for row in rows if row["tp"] == tp]
    shown = frontier(own, "kl_mean", "bytes_per_token") if len(own) > BARS else own
    shown = sorted(shown, key=lambda row: (row["bytes_per_token"], row["kl_mean"]))
    base = own[0]["bytes_per_token_bf16"]
    longest = max([base, *(row["bytes_per_token"] for row in shown)])
    lengths = [(row, 100 * row["bytes_per_token"] / longest) for row in shown]
    return {
        "tp": tp,
        "algorithms": sorted({row["algorithm"] for row in shown}),
        "bars": lengths,
        "bf16": base,
        "bf16_length": 100 * base / longest,
        "hidden": len(own) - len(shown),
    }


def _number(value: float | None, form: str) -> str:
    """A number as a format says; a dash for what is not known."""
    return "–" if value is None or math.isnan(value) else format(value, form)
