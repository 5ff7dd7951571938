"""`evaluate`: what each spec costs in accuracy at each TP size, on one device and before any rank is started."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import ALGORITHMS, DEFAULT_SPEC
from ..errors import ConfigError
from .evaluate_job import LENGTH, Job, check
from .evaluate_report import GATE_FAILED
from .files import read_text
from .job import DTYPES, add_model_arguments

if TYPE_CHECKING:
    import torch

    from ..calibration_file import Calibration

WINDOWS = 64  # of the text, at most

HELP = "what specs cost in accuracy at a TP size, on one device"
DESCRIPTION = """Compare a model's predictions with compressed partial sums to its own, token by token, for every spec
and TP size. One process simulates all ranks, bit for bit what they would reduce; no rank is started."""
EXAMPLES = """examples:
  megatron-lowbit evaluate --tp 2,4,8 --comm int8:g128 int4:g32 gauss4:g128
  megatron-lowbit evaluate --model ~/models/Llama-3.2-1B --text held-out.txt --tp 4 --comm int4:g32 --json now.json
  megatron-lowbit evaluate --comm int4:g32 --baseline earlier.json --fail-above 0.5%      exit code 3 if it got worse
  megatron-lowbit evaluate --tp 8 --comm selective4 --calibration-text other.txt --progress p.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evaluate`."""
    what = parser.add_argument_group("model and text")
    add_model_arguments(what, engine=False)  # Transformers computes what any engine's ranks would
    what.add_argument("--dtype", choices=DTYPES, default="auto", help="to compute in (default: the checkpoint's)")
    what.add_argument("--text", type=Path, metavar="FILE", help="text to predict (default: the bundled one)")
    what.add_argument("--windows", type=int, metavar="N", help=f"of the text (default: what it has, at most {WINDOWS})")
    what.add_argument(
        "--window-length", type=int, metavar="N", help=f"tokens (default: {LENGTH}, or the model's positions if fewer)"
    )
    what.add_argument("--stride", type=int, metavar="N", help="tokens between windows (default: they do not overlap)")
    comm = parser.add_argument_group("communication")
    comm.add_argument("--tp", type=_sizes, metavar="N,N", default=[2], help="tensor-parallel ranks (default: 2)")
    comm.add_argument(
        "--comm", nargs="+", action="extend", metavar="SPEC", help=f"what travels (default: {DEFAULT_SPEC})"
    )
    comm.add_argument(
        "--comm-plan", type=Path, action="append", metavar="FILE", help="a spec for each site; at its TP size"
    )
    comm.add_argument(
        "--comm-algorithm",
        "--algorithm",
        nargs="+",
        metavar="NAME",
        default=["auto"],
        help=f"one or more of {', '.join(ALGORITHMS[:3])} (default: auto)",
    )
    comm.add_argument("--comm-sites", metavar="GLOB", action="append", help="compress these sites only")
    comm.add_argument(
        "--comm-calibration",
        type=Path,
        action="append",
        metavar="FILE",
        help="for specs that need one; one for each TP",
    )
    comm.add_argument(
        "--calibration-text", type=Path, metavar="FILE", help="or another text, to calibrate with at once"
    )
    out = parser.add_argument_group("results")
    out.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")
    out.add_argument("--plot", type=Path, metavar="PNG", help="draw loss against bits per value")
    out.add_argument("--progress", type=Path, metavar="FILE", help="keep what was found here, and go on from there")
    out.add_argument("--baseline", type=Path, metavar="FILE", help="--json of an earlier run to compare with")
    out.add_argument(
        "--fail-above",
        type=_percent,
        metavar="P%",
        help=f"end with {GATE_FAILED} if perplexity is higher by more: than the baseline's, or else than exact",
    )


def _sizes(text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(size) for size in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 2,4,8") from None


def _percent(text: str) -> float:
    try:
        return float(text.removesuffix("%")) / 100
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no percentage such as 1%") from None


def run(arguments: argparse.Namespace) -> int:
    """Check everything, evaluate all cases, report. Returns the exit code: 3 if the gate fails."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn
    from rich.progress import Progress as Bar

    from ..engines.fingerprint import tensor_digests
    from ..engines.hf_folder import hushed, read_folder
    from ..engines.simulated_tp import features
    from ..engines.text_model import load_tokenizer
    from ..evaluation.gate import Gate
    from ..evaluation.progress_file import Progress
    from ..evaluation.run import evaluate
    from ..evaluation.windows import consecutive
    from . import evaluate_report

    job = check(arguments)
    text = read_text(job.text, "--text")
    with hushed():
        tokenizer = load_tokenizer(job.model, job.trust.remote_code)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = consecutive(ids, job.length, job.stride, job.windows, prefix=tokenizer("")["input_ids"])
    windows = windows[: job.windows or WINDOWS]
    digests = tensor_digests(job.model)
    gate = Gate.load(job.baseline, job.fail_above, digests) if job.fail_above is not None else None
    with hushed():
        model = read_folder(job.model, job.trust).load(job.dtype)
    import torch

    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    calibrations = job.calibrations
    if job.calibration_text:
        calibrations = _calibrate(job, model, tokenizer)
    cases, sites = job.cases(calibrations), features(model)
    facts = _facts(job, text, model.dtype, digests)
    for case in cases:
        if not any(map(case.config.selects, sites)):
            raise ConfigError(f"--comm-sites {' '.join(job.sites)} selects none of {', '.join(list(sites)[:3])} …")
        case.config.check(sites, case.tp, facts["fingerprint"])
    with Bar(*Bar.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("windows", total=len(windows) * len(cases))
        with Progress(job.progress, facts) as progress:
            bar.advance(task, sum(progress.done(case, n) for case in cases for n in range(len(windows))))
            for number, case, tokens in evaluate(model, windows, cases, progress.done):
                progress.add(case, number, tokens)
                bar.advance(task)
    rows = evaluate_report.rows({case: progress.tokens(case)[: len(windows)] for case in cases}, sites)
    return evaluate_report.show(job, facts, digests, rows, gate)


def _calibrate(job: Job, model: torch.nn.Module, tokenizer) -> dict[int, Calibration]:
    """A calibration at each TP size, from another text than the one that is predicted."""
    from ..calibration.collect import RangeTracker, watch
    from ..calibration.windows import draw
    from .calibrate import SAMPLES, SEQUENCE_LENGTH

    other = read_text(job.calibration_text, "--calibration-text")
    if other == read_text(job.text, "--text"):
        raise ConfigError("--calibration-text is the text that is predicted: give another, or results would flatter")
    ids = tokenizer(other, add_special_tokens=False, verbose=False)["input_ids"]
    length = min(SEQUENCE_LENGTH, job.length)
    windows = draw(ids, SAMPLES, length, seed=0, prefix=tokenizer("")["input_ids"]).to(model.device)
    found = {}
    for tp in job.tps:
        tracker = RangeTracker()
        watch(model, windows, tp, tracker)
        found[tp] = tracker.finish()
    return found


def _facts(job: Job, text: str, dtype: torch.dtype, digests: Mapping[str, str]) -> dict[str, str]:
    """What results depend on beside the case; names, never paths."""
    from ..engines.fingerprint import fingerprint

    return {
        "model": job.model.resolve().name,
        "fingerprint": fingerprint(job.model),
        "text": job.text.name,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "window_length": str(job.length),
        "stride": str(job.stride or job.length),
        "dtype": str(dtype).removeprefix("torch."),
    }
