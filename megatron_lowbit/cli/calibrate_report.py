"""What a person sees of a calibration, and what is written for machines."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ..calibration_file import Calibration

if TYPE_CHECKING:
    from .calibrate import Job


def show(job: Job, calibration: Calibration, overlaps: Mapping[str, float | None], seconds: float) -> None:
    """Print the table, and write it as JSON if that was asked for."""
    rows = [_row(calibration, site, overlaps[site]) for site in calibration.sites]
    facts = {key: calibration.metadata[key] for key in ("model", "text", "text_sha256", "algorithm", "dtype")}
    facts |= {key: int(calibration.metadata[key]) for key in ("samples", "sequence_length", "seed")}
    facts |= {"tp": job.tp, "gamma": float(calibration.metadata["gamma"]), "fraction": str(calibration.fraction)}
    facts |= {"digest": calibration.digest, "seconds": seconds}
    console = Console(highlight=False, emoji=False)
    console.print(_table(facts, rows))
    fewer = f", all that the text has of the {job.samples} asked for" if facts["samples"] < job.samples else ""
    windows = f"{facts['samples']} windows of {facts['sequence_length']} tokens{fewer}"
    console.print(f"{windows}, {seconds:.1f} s; {job.out.name} has digest {calibration.digest[:12]}", soft_wrap=True)
    if job.json:
        job.json.write_text(json.dumps(facts | {"sites": rows}, indent=2) + "\n", encoding="utf-8")


def _row(calibration: Calibration, site: str, overlap: float | None) -> dict:
    hull, outliers = calibration.ranges[site].hull, calibration.outliers[site]
    return {
        "site": site,
        "features": len(hull),
        "outliers": len(outliers),
        "outlier_range": statistics.median(hull[list(outliers)].tolist()),
        "median_range": statistics.median(hull.tolist()),
        "overlap": overlap,
        "chance": len(outliers) / len(hull),
    }


def _table(facts: dict, rows: list[dict]) -> Table:
    table = Table(title=f"{facts['model']} · TP={facts['tp']} · {facts['fraction']} of the features as outliers")
    table.add_column("site", overflow="fold")
    for column in ("outliers", "range", "median", "times", "overlap", "chance"):
        table.add_column(column, justify="right")
    for row in rows:
        times = f"{row['outlier_range'] / row['median_range']:.1f}" if row["median_range"] else "-"
        table.add_row(
            row["site"],
            f"{row['outliers']} of {row['features']}",
            f"{row['outlier_range']:.3g}",
            f"{row['median_range']:.3g}",
            times,
            "-" if row["overlap"] is None else f"{row['overlap']:.0%}",
            f"{row['chance']:.1%}",
        )
    table.caption = (
        "range of the median outlier and of the median feature; overlap: outliers on which every second window and the "
        "others agree, and what chance would give"
    )
    return table
