"""What an evaluation comes to, in a few sentences made from its rows: which case to take, which to avoid, and what the
numbers do not show.

A case is within the limit if its loss is, at the upper end of its 95 % interval; beyond it, if even the lower end is.
In between nothing was shown, and the sentences say so. Cases compete at one TP size: ranks are not chosen for bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LIMIT = 0.01  # of perplexity's loss
FEW = 8  # windows; with fewer, Student's t makes intervals half as wide again as they would be with many

WITHIN, UNDECIDED, BEYOND = "within 1%", "undecided", "above 1%"

Row = Mapping[str, Any]


def name(row: Row) -> str:
    """What a case is called: its plan's file, or its spec, and what travels between nodes, if that is another."""
    between = f", {row['outer_spec']} between nodes" if row.get("outer_spec") else ""
    return f"{row['plan'] or row['spec']}{between}"


def judged(row: Row) -> str:
    """WITHIN, UNDECIDED or BEYOND. An unknown interval decides nothing."""
    low, high = row["loss_interval"]
    return WITHIN if high <= LIMIT else BEYOND if low > LIMIT else UNDECIDED


def saving(row: Row) -> float:
    """How many times fewer bytes a token costs than as bf16; below 1 it costs more."""
    return row["bytes_per_token_bf16"] / row["bytes_per_token"]


def choice(rows: Sequence[Row], tp: int) -> Row | None:
    """The case of fewest bytes that is within the limit at a TP size and saves any; of equal ones, the more exact."""
    good = [row for row in rows if row["tp"] == tp and judged(row) == WITHIN and saving(row) > 1]
    return min(good, key=lambda row: (row["bytes_per_token"], row["kl_mean"]), default=None)


def sentences(rows: Sequence[Row]) -> list[str]:
    """The verdict, plain text: the choice at each TP size, what is bad, what was not shown. rows: at least one."""
    tps = sorted({row["tp"] for row in rows}, reverse=True)
    return [*(_chosen(rows, tp) for tp in tps), *_bad(rows), *_unknown(rows)]


def _chosen(rows: Sequence[Row], tp: int) -> str:
    row, own = choice(rows, tp), [row for row in rows if row["tp"] == tp]
    if row is None:
        cases = "the one case" if len(own) == 1 else f"none of the {len(own)} cases"
        was_not = "was not" if len(own) == 1 else "was"
        return f"TP {tp}: {cases} {was_not} shown to keep perplexity within 1% while saving bytes."
    low, high = row["loss_interval"]
    among = f"the cheapest of {len(own)} cases that keeps" if len(own) > 1 else "the one case, and it keeps"
    return (
        f"TP {tp}: {name(row)}, {row['algorithm']}, is {among} perplexity within 1%: {row['loss']:+.2%} (95% interval "
        f"{low:+.2%} to {high:+.2%}). A token costs {row['bytes_per_token']:,.0f} bytes per rank instead of "
        f"{row['bytes_per_token_bf16']:,.0f} as bf16: {saving(row):.2f} times fewer, {1 - 1 / saving(row):.0%} saved."
    )


def _bad(rows: Sequence[Row]) -> list[str]:
    found, bad = [], [row for row in rows if judged(row) == BEYOND]
    if bad:
        worst = max(bad, key=lambda row: row["loss"])
        are = "loses" if len(bad) == 1 else "lose"
        found.append(
            f"Bad: {len(bad)} of {len(rows)} cases {are} more than 1%, worst {name(worst)} at TP {worst['tp']} "
            f"({worst['algorithm']}) with {worst['loss']:+.1%}."
        )
    if dear := [row for row in rows if saving(row) <= 1]:
        worst = min(dear, key=saving)
        send = "sends" if len(dear) == 1 else "send"
        found.append(
            f"No use: {len(dear)} of {len(rows)} cases {send} as much as bf16 or more, {name(worst)} at TP "
            f"{worst['tp']} ({worst['algorithm']}) {1 / saving(worst):.2f} times as much."
        )
    return found


def _unknown(rows: Sequence[Row]) -> list[str]:
    found, windows = [], rows[0]["windows"]
    if windows < 2:
        return ["Not shown: one window has no error to estimate, so no loss has an interval; evaluate more windows."]
    undecided = [row for row in rows if judged(row) == UNDECIDED]
    zero = [row for row in rows if row["loss_interval"][0] <= 0 <= row["loss_interval"][1]]
    if undecided:
        reach = "reaches" if len(undecided) == 1 else "reach"
        found.append(
            f"Undecided: {len(undecided)} of {len(rows)} intervals {reach} across 1%; a longer text would tell."
        )
    if zero:
        found.append(
            f"Not shown: the loss of {len(zero)} of {len(rows)} cases, whose intervals hold zero; their KL divergence "
            "tells them apart."
        )
    if windows < FEW:
        found.append(f"Careful: {windows} windows are few, and intervals from so few are rough.")
    return found
