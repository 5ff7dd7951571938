"""The tables of docs/accuracy.md, from what benchmarks/accuracy.py found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
TP, ALGORITHM = 8, "two-step"  # where the goals are set
GOALS = ((6.2, 0.005), (5.2, 0.012), (4.2, 0.04), (3.2, 0.15))  # bits per value at most, loss of perplexity at most
PLAIN = [f"int{bits}:g32" for bits in range(7, 1, -1)]
LOSS = 0.01  # what the default may cost


def losses(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """A row for each spec, a column for each algorithm and TP size: loss and the half of its 95 % interval."""
    places = sorted({(row["algorithm"], row["tp"]) for row in rows})
    found = {(row["spec"], row["algorithm"], row["tp"]): row for row in rows}
    lines = []
    for spec, family in _specs(rows).items():
        own = [found.get((spec, *place)) for place in places]
        cells = [_loss(row) if row else "" for row in own]
        lines.append([f"`{spec}`", family, _bits(found, spec), *cells])
    return ["spec", "family", "bits", *(f"{algorithm}, TP {tp}" for algorithm, tp in places)], lines


def divergences(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """KL divergence in thousandths of a nat, in the same order; top-1 agreement where the goals are set."""
    places = sorted({(row["algorithm"], row["tp"]) for row in rows})
    found = {(row["spec"], row["algorithm"], row["tp"]): row for row in rows}
    lines = []
    for spec in _specs(rows):
        own = [found.get((spec, *place)) for place in places]
        last = found.get((spec, ALGORITHM, TP))
        lines.append([
            f"`{spec}`", _bits(found, spec), *(f"{1000 * row['kl_mean']:.3g}" if row else "" for row in own),
            f"{1000 * last['kl_p99']:.3g}" if last else "", f"{last['top1_agreement']:.1%}" if last else "",
        ])  # fmt: skip
    columns = [f"{algorithm}, TP {tp}" for algorithm, tp in places]
    return ["spec", "bits", *columns, "99th percentile", "top-1 agreement"], lines


def goals(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """What was to be reached, and the spec of the least divergence that is allowed the bits."""
    lines = []
    for bits, limit in GOALS:
        best = _best(rows, bits)
        met = best["loss"] <= limit
        lines.append([
            f"at most {limit:.1%} at {bits:g} bits", f"`{best['spec']}`", f"{best['bits_per_value']:.3f}", _loss(best),
            "yes" if met else "no",
        ])  # fmt: skip
    return ["goal", "best spec", "bits", "loss", "met"], lines


def halves(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Plain integers of each width, and the best spec at no more bits: how much of the loss is left."""
    lines = []
    for spec in PLAIN:
        plain = next(row for row in _where(rows) if row["spec"] == spec)
        best = _best(rows, plain["bits_per_value"])
        ratio = best["kl_mean"] / plain["kl_mean"]
        lines.append([
            f"`{spec}`", f"{plain['bits_per_value']:g}", _loss(plain), f"`{best['spec']}`",
            f"{best['bits_per_value']:g}", _loss(best), f"{ratio:.2f}", "yes" if ratio <= 0.5 else "no",
        ])  # fmt: skip
    return ["plain", "bits", "loss", "best spec", "bits", "loss", "its KL / plain KL", "half or less"], lines


def cheapest(rows: Sequence[Row]) -> list[str]:
    """Specs whose loss is within LOSS at every TP size and algorithm, the upper end of its interval too; fewest
    bits first, then least divergence."""
    specs = {}
    for spec in _specs(rows):
        own = [row for row in rows if row["spec"] == spec]
        if all(row["loss_interval"][1] <= LOSS for row in own):
            specs[spec] = max(row["bits_per_value"] for row in own), max(row["kl_mean"] for row in own)
    return sorted(specs, key=specs.get)


def _where(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if (row["tp"], row["algorithm"]) == (TP, ALGORITHM)]


def _best(rows: Sequence[Row], bits: float) -> Row:
    """By divergence: it has no noise from the text, so that it tells near ones apart."""
    return min((row for row in _where(rows) if row["bits_per_value"] <= bits + 1e-9), key=lambda row: row["kl_mean"])


def _specs(rows: Sequence[Row]) -> dict[str, str]:
    return {row["spec"]: row["family"] for row in rows}


def _bits(found: Mapping[tuple, Row], spec: str) -> str:
    bits = sorted({row["bits_per_value"] for key, row in found.items() if key[0] == spec})
    return " / ".join(f"{each:.3g}" if each >= 10 else f"{each:.4g}" for each in bits)


def _loss(row: Row) -> str:
    low, high = row["loss_interval"]
    return f"{row['loss']:+.2%} ± {50 * (high - low):.2f}"
