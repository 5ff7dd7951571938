"""`plan`: a spec for each site and leg, chosen under a budget and measured on text it was not chosen on."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import ALGORITHMS
from . import GATE_FAILED, calibrations, subject
from .evaluate import percent
from .plan_job import CANDIDATES, DIRECT, HELD_OUT, PLANNING, PROBE, Job, check

if TYPE_CHECKING:
    from ..evaluation.cases import Case
    from ..evaluation.metrics import Tokens
    from ..evaluation.planning import Key, Setting

HELP = "choose a spec for each site under a budget"
DESCRIPTION = """Choose a spec for each site, and for each leg of two-step, under a budget: the
fewest bytes for a loss, or the least loss for its bits. The whole plan is then
measured on text that it was not chosen on."""
EXAMPLES = f"""examples:
  megatron-lowbit plan --tp 8 --budget-bits 4.25 --out plan.json
  megatron-lowbit plan --model DIR --text FILE --tp 4 \\
      --budget-perplexity 1% --out plan.json --progress p.safetensors
  megatron-lowbit plan --model DIR --text FILE --held-out OTHER --tp 4 \\
      --budget-kl 0.01 --out plan.json
  megatron-lowbit plan --tp 2 --candidates int4:g32,int6:g32,int8:g128 \\
      --probe none --budget-bits 5 --out plan.json
Exit code {GATE_FAILED}: the plan was written, and breaks its budget on held-out text."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `plan`."""
    subject.add_arguments(parser, PLANNING)
    held = parser.add_argument_group("held-out text")
    held.add_argument("--held-out", type=Path, metavar="FILE", help="to measure on (default: the rest of --text)")
    held.add_argument("--held-out-windows", type=int, metavar="N", help=f"of it (default: at most {HELD_OUT})")
    comm = parser.add_argument_group("communication")
    comm.add_argument("--tp", type=int, metavar="N", default=2, help="tensor-parallel ranks (default: 2)")
    comm.add_argument(
        "--comm-algorithm",
        "--algorithm",
        metavar="NAME",
        default="auto",
        help=f"one of {', '.join(ALGORITHMS[:3])} (default: auto)",
    )
    comm.add_argument(
        "--candidates",
        nargs="+",
        action="extend",
        metavar="SPEC,SPEC",
        help=f"for a leg, beside exact (default: {','.join(CANDIDATES)})",
    )
    comm.add_argument(
        "--probe",
        metavar="SPEC",
        default=PROBE,
        help=f"measured at each site and leg; other specs' effects follow from their noise (default: %(default)s); "
        f"{DIRECT}: measure each candidate",
    )
    calibrations.add_arguments(comm)
    budget = parser.add_argument_group("budget, one of")
    budget.add_argument("--budget-kl", type=float, metavar="X", help="KL divergence from the exact model, nats")
    budget.add_argument("--budget-perplexity", type=percent, metavar="P%", help="rise of perplexity")
    budget.add_argument("--budget-bits", type=float, metavar="B", help="bits per value, averaged over sites and legs")
    out = parser.add_argument_group("results")
    out.add_argument("--out", type=Path, metavar="FILE", required=True, help="plan to write, JSON")
    out.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")
    out.add_argument("--progress", type=Path, metavar="FILE", help="keep what was found here, and go on from there")


@dataclass(frozen=True)
class Result:
    """planning, held_out: what each case's tokens told; the cases are `case` and the uniform ones, by spec."""

    case: Case
    uniform: dict[str, Case]
    effects: dict[Key, float]
    floor: float
    planning: dict[Case, Sequence[Tokens]]
    held_out: dict[Case, Sequence[Tokens]]


def run(arguments: argparse.Namespace) -> int:
    """Check everything, measure effects, choose, measure the choice, write it. Returns the exit code: 3 if the budget
    does not hold on the held-out text."""
    job = check(arguments)
    from ..evaluation.budget import search
    from ..evaluation.metrics import mean
    from ..evaluation.planning import Setting, check_bits, options, uncompressed
    from . import plan_report
    from .evaluating import evaluated

    of = job.subject
    windows, other, held_out, first = job.windows()  # first: what is too short is said before anything takes long
    calibration = job.calibrations.made(of).get(job.tp)
    setting = Setting(job.tp, job.algorithm, of.features, calibration)
    if job.budget.kind == "bits":  # before any run, and so without effects
        check_bits(setting, options(setting, defaultdict(float), job.candidates), job.budget.value)
    uniform = {spec: setting.everywhere(spec) for spec in job.candidates}
    nothing = uncompressed(next(iter(uniform.values())))
    found: dict[Case, Sequence[Tokens]] = evaluated(of, [nothing, *uniform.values()], windows, job.progress)
    effects = _effects(job, setting, windows, found)

    def measure(case: Case) -> Sequence[Tokens]:
        if case not in found:
            found.update(evaluated(of, [case], windows, job.progress))
        return found[case]

    choices = options(setting, effects, job.candidates)
    case = search(job.budget, setting, choices, measure, list(uniform.values()))
    progress = job.progress
    if progress is not None and other is not of:
        progress = progress.with_name(progress.name + ".held-out")
    last = evaluated(other, list({case, *uniform.values()}), held_out, progress, first)
    floor = mean([window.kl for window in found[nothing]]).value
    return plan_report.show(job, setting, other, Result(case, uniform, effects, floor, found, last))


def _effects(job: Job, setting: Setting, windows, found: dict[Case, Sequence[Tokens]]) -> dict[Key, float]:
    """Of each candidate at each site and leg."""
    from ..evaluation.planning import measured_effects, probes, scaled_effects
    from .evaluating import evaluated, measured_noise

    cases = probes(setting, job.measured)
    found |= evaluated(job.subject, list(cases.values()), windows, job.progress)
    effects = measured_effects(setting, cases, found)
    if job.probe is None:
        return effects
    specs = dict.fromkeys([job.probe, *job.candidates])
    names = [(leg, spec) for leg in setting.legs for spec in specs]
    configs = [setting.on_leg(*name).config for name in names]
    noise = dict(zip(names, measured_noise(job.subject, windows, configs, job.tp), strict=True))
    return scaled_effects(setting, job.probe, effects, noise, job.candidates)
