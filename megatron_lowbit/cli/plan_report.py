"""What a person sees of a plan, and what is written into its file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import whole_file
from ..evaluation.metrics import Tokens, summary
from ..evaluation.planning import predicted
from ..plan_file import Plan
from ..spec import parse
from . import GATE_FAILED
from .evaluate_report import made, nats
from .files import BUNDLED, write

if TYPE_CHECKING:
    from ..evaluation.planning import Setting
    from .plan import Result
    from .plan_job import Job
    from .subject import Subject

SHOWN = 64  # sites, at most: a person reads no more, and the file has all


def show(job: Job, setting: Setting, other: Subject, result: Result) -> int:
    """Write the plan and the JSON, print the tables -> the exit code."""
    plan = _plan(job, setting, other, result)
    plan.save(job.out)
    facts = dict(plan.metadata)
    if job.json:
        effects = [
            {"site": site, "leg": leg, "spec": spec, "kl": kl} for (site, leg, spec), kl in result.effects.items()
        ]
        text = {**facts, "tp": plan.tp, "algorithm": plan.algorithm, "sites": dict(plan.sites), "effects": effects}
        write(job.json, whole_file.as_json(text).encode(), "--json")
    console = Console(highlight=False, emoji=False)
    console.print(_sites(setting, plan, result))
    console.print(_comparison(facts))
    console.print(_words(job, facts), markup=False, soft_wrap=True)
    for note in job.subject.notes([job.tp]):
        console.print(f"note: {note}", soft_wrap=True)
    return 0 if facts["holds"] else GATE_FAILED


def _plan(job: Job, setting: Setting, other: Subject, result: Result) -> Plan:
    """The chosen plan with where it came from."""
    case = result.case
    chosen = case.config.planned
    held_out = result.held_out[case]
    holds = job.budget.kind == "bits" or job.budget.cost(held_out).value <= job.budget.nats
    kl = result.floor + predicted(result.effects, setting, chosen.sites)
    measured = _figures(result.planning[case])
    ratio = kl / measured["kl_mean"] if measured["kl_mean"] else math.nan  # nothing was lost
    rows = [
        {
            "spec": spec,
            "bits_per_value": own.bits_per_value(setting.features),
            "bytes_per_token": own.bytes_per_token(setting.features),
            "kl_predicted": result.floor + predicted(result.effects, setting, own.config.planned.sites),
            "kl_planning": _figures(result.planning[own])["kl_mean"],
            **_figures(result.held_out[own]),
        }
        for spec, own in result.uniform.items()
    ]
    metadata = {
        **job.subject.facts,
        **made(),
        "budget": {"kind": job.budget.kind, "value": job.budget.value},
        "holds": holds,
        "candidates": list(job.candidates),
        "probe": job.probe,
        "bits_per_value": case.bits_per_value(setting.features),
        "bytes_per_token": case.bytes_per_token(setting.features),
        "planning": {"kl_predicted": kl, "predicted_by_measured": ratio, **measured},
        "held_out": {
            "text": other.facts["text"],
            "text_sha256": other.facts["text_sha256"],
            **_figures(held_out),
        },
        "kl_floor": result.floor,
        "uniform": rows,
        "tensors": job.subject.digests,
    }
    return Plan(chosen.sites, chosen.tp, chosen.algorithm, metadata, f"plan {job.out.name}")


def _figures(tokens: Sequence[Tokens]) -> dict:
    """Of a case over some windows, as `evaluate --json` names them."""
    of = summary(tokens)
    return {
        "windows": of.windows,
        "tokens": of.tokens,
        "kl_mean": of.kl_mean,
        "kl_error": of.kl_error,
        "perplexity": of.perplexity,
        "perplexity_exact": of.perplexity_exact,
        "loss": of.loss,
        "loss_interval": list(of.loss_interval),
        "top1_agreement": of.top1_agreement,
    }


def _sites(setting: Setting, plan: Plan, result: Result) -> Table:
    title = f"{plan.name}: TP {plan.tp}, {plan.algorithm}; KL: predicted"
    table = Table(title=escape(title), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("site", *setting.legs, "bits", "KL"):
        table.add_column(column, justify="right" if column in ("bits", "KL") else "left", overflow="fold")
    for site, spec in list(plan.sites.items())[:SHOWN]:
        legs = [spec] * len(setting.legs) if spec == "exact" else [str(getattr(parse(spec), g)) for g in setting.legs]
        bits = result.case.bits_at(site, setting.features[site])
        table.add_row(escape(site), *legs, f"{bits:.2f}", nats(predicted(result.effects, setting, {site: spec}), 6))
    if len(plan.sites) > SHOWN:
        table.caption = f"and {len(plan.sites) - SHOWN} more: see the file"
    return table


def _comparison(facts: dict) -> Table:
    """The plan beside the same spec everywhere."""
    held = facts["held_out"]
    title = f"on {held['windows']} held-out windows of {held['text']}"
    table = Table(title=escape(title), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("", "bits", "bytes per token", "KL predicted", "KL", "loss", "± 95 %"):
        table.add_column(column, justify="right" if column else "left", no_wrap=not column)
    own = {"spec": "this plan", "kl_predicted": facts["planning"]["kl_predicted"], **held}
    own |= {name: facts[name] for name in ("bits_per_value", "bytes_per_token")}
    for row in [own, *sorted(facts["uniform"], key=lambda row: row["bits_per_value"])]:
        low, high = row["loss_interval"]
        table.add_row(
            row["spec"],
            f"{row['bits_per_value']:.3f}",
            f"{row['bytes_per_token']:,.0f}",
            nats(row["kl_predicted"], 5),
            nats(row["kl_mean"], 5),
            f"{row['loss']:+.2%}",
            "-" if math.isnan(low) else f"{(high - low) / 2:.2%}",
            end_section=row is own,
        )
    return table


def _words(job: Job, facts: dict) -> str:
    planning, held = facts["planning"], facts["held_out"]
    ratio = planning["predicted_by_measured"]
    lines = [
        f"Effects added up to {nats(planning['kl_predicted'], 5)} nats; the whole plan cost "
        f"{nats(planning['kl_mean'], 5)} on the {planning['windows']} windows it was chosen on"
        + (f" ({ratio:.0%} predicted)." if ratio > 0 else ".")
    ]
    if not facts["holds"]:
        cost = f"{held['loss']:+.2%}" if job.budget.kind == "perplexity" else f"{held['kl_mean']:.5f} nats"
        lines.append(
            f"THE BUDGET DOES NOT HOLD: {cost} on held-out text, above {job.budget}. The plan was written and says so; "
            "give more --windows, a text more like that of inference, or another budget."
        )
    model = "" if job.subject.folder.folder.resolve() == BUNDLED / "model" else " --model DIR"
    calibration = " --comm-calibration FILE" if any(map(_calibrated, facts["candidates"])) else ""
    uses = f"CommConfig(plan={str(job.out)!r})"
    if job.subject.folder.predicts != "masked":  # an encoder generates nothing
        uses = (
            f"megatron-lowbit generate{model} --tp {job.tp} --comm-plan {job.out}{calibration}, "
            f"--lowbit-comm-plan {job.out} in Megatron's scripts, or {uses}"
        )
    lines.append(f"Use it: {uses}.")
    return "\n".join(lines)


def _calibrated(spec: str) -> bool:
    return parse(spec).calibrated
