"""What the codecs were made to reach, computed from the rows of the quality benchmark."""

from __future__ import annotations

from distributions import ORDINARY

ROBUST = ("Gaussian", "outliers", ORDINARY, "Student t(3)")
ROBUST_BITS, ROBUST_DB = 4.35, 20.0
LOW_BITS, LOW_DB = 2.125, 9.2  # the theory of a 2-bit Lloyd-Max codebook gives 9.3 dB
WIDTHS, GAIN_DB = range(2, 7), 2.0


def targets(rows: list[dict]) -> list[dict]:
    """For each goal that has a candidate among the measured codecs, the best of them.

    {"goal", "needed_db", "spec", "bits_per_value", "db", "met", "met_by": every spec that meets it, "figures"}
    """
    return [*_robust(rows), *_low_bits(rows), *_gains(rows)]


def _best(goal: str, needed: float, db: dict[str, float], rows: dict[str, dict]) -> dict:
    """db: what each candidate reaches. rows: spec -> its row."""
    best = max(db, key=db.get)
    return {
        "goal": goal, "needed_db": needed, "spec": best, "bits_per_value": rows[best]["bits_per_value"],
        "db": db[best], "met": db[best] >= needed, "met_by": [spec for spec in db if db[spec] >= needed],
    }  # fmt: skip


def _robust(rows: list[dict]) -> list[dict]:
    """The least of four distributions."""
    of = {name: _cheap(rows, name, ROBUST_BITS) for name in ROBUST}
    least = {spec: min(of[name][spec]["sqnr_db"] for name in ROBUST) for spec in of["Gaussian"]}
    if not least:
        return []
    goal = f"least of {'; '.join(ROBUST)}, up to {ROBUST_BITS} bits"
    best = _best(goal, ROBUST_DB, least, of["Gaussian"])
    return [best | {"figures": {name: of[name][best["spec"]]["sqnr_db"] for name in ROBUST}}]


def _low_bits(rows: list[dict]) -> list[dict]:
    found = _cheap(rows, "Gaussian", LOW_BITS)
    if not found:
        return []
    db = {spec: row["sqnr_db"] for spec, row in found.items()}
    best = _best(f"Gaussian, up to {LOW_BITS} bits", LOW_DB, db, found)
    return [best | {"figures": {"Gaussian": best["db"]}}]


def _cheap(rows: list[dict], data: str, bits: float) -> dict[str, dict]:
    """Spec -> its row for that distribution, if it needs at most so many bits."""
    return {row["spec"]: row for row in rows if row["data"] == data and row["bits_per_value"] <= bits}


def _gains(rows: list[dict]) -> list[dict]:
    """Over plain integers of each width: the model's sums after two-step, at the largest TP size that was measured."""
    tp = max((row["tp"] for row in rows if row["tp"]), default=0)
    found = {row["spec"]: row for row in rows if row["tp"] == tp and row["hop"] == "two-step"}
    goals = []
    for plain in (found[f"int{width}:g32"] for width in WIDTHS if f"int{width}:g32" in found):
        others = [r for r in found.values() if r is not plain and r["bits_per_value"] <= plain["bits_per_value"]]
        if not others:
            continue
        goal = f"gain over {plain['spec']} ({plain['bits_per_value']:.3g} bits, {plain['sqnr_db']:.1f} dB) at TP {tp}"
        gains = {row["spec"]: row["sqnr_db"] - plain["sqnr_db"] for row in others}
        best = _best(goal, GAIN_DB, gains, found)
        row = found[best["spec"]]
        goals.append(best | {"figures": {
            "plain": plain["sqnr_db"], "best": row["sqnr_db"],
            "gain of the mean of sites": row["mean_of_sites_db"] - plain["mean_of_sites_db"],
        }})  # fmt: skip
    return goals
