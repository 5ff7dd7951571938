"""`calibrate`: a model's usual ranges and outlier features at one TP size, into a file that ranks read."""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..calibration.collect import ALGORITHMS, GAMMA, RangeTracker, watch
from ..calibration.plot import check_installed, plot
from ..calibration.windows import draw
from ..calibration_file import FRACTION, Calibration
from ..engines.registry import check_framework
from ..errors import ConfigError
from ..spec import fraction as parse_fraction
from . import launch
from .files import bundled, check_output, read_text
from .job import DTYPES, add_model_arguments, read_model

if TYPE_CHECKING:
    from ..engines.model_facts import ModelFacts, Trust

SAMPLES, SEQUENCE_LENGTH = 256, 256  # why so many windows: docs/calibration.md

HELP = "find the outlier features of a model's partial sums"
DESCRIPTION = """Find the usual ranges and the outlier features of a model's partial sums at one TP size, which codecs
such as int4:outliers=1/64 need. One process simulates all ranks; run it once per model and TP size."""
EXAMPLES = """examples:
  megatron-lowbit calibrate --model ~/models/Llama-3.2-1B --tp 4 --text prose.txt --out llama-1b-tp4.safetensors
  megatron-lowbit calibrate --tp 2 --text prose.txt --out small.safetensors --plot small.png --json small.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `calibrate`."""
    what = parser.add_argument_group("model and files")
    add_model_arguments(what)
    what.add_argument("--tp", type=int, metavar="N", required=True, help="tensor-parallel ranks, as in inference")
    what.add_argument("--text", type=Path, metavar="FILE", required=True, help="text like that of inference")
    what.add_argument("--out", type=Path, metavar="FILE", required=True, help="calibration to write, safetensors")
    what.add_argument("--plot", type=Path, metavar="PNG", help="draw ranges, outliers and overlaps")
    what.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")
    how = parser.add_argument_group("statistics")
    how.add_argument(
        "--samples", type=int, metavar="N", default=SAMPLES, help="windows of the text, at most (default: %(default)s)"
    )
    how.add_argument(
        "--sequence-length",
        type=int,
        metavar="N",
        help=f"tokens of a window (default: {SEQUENCE_LENGTH}, or the model's positions if fewer)",
    )
    how.add_argument("--gamma", type=float, default=GAMMA, help="weight of a new window (default: %(default)s)")
    how.add_argument(
        "--fraction",
        metavar="F",
        default=str(FRACTION),
        help="of the features that are outliers (default: %(default)s)",
    )
    how.add_argument(
        "--algorithm",
        choices=ALGORITHMS,
        default="auto",
        help="one-shot: a smaller file, which two-step cannot use (default: auto, for both)",
    )
    how.add_argument("--dtype", choices=DTYPES, default="auto", help="to compute in (default: the checkpoint's)")
    how.add_argument("--seed", type=int, default=0, help="of the choice of windows (default: 0)")


@dataclass(frozen=True)
class Job:
    """The checked arguments."""

    model: Path
    facts: ModelFacts
    trust: Trust
    tp: int
    text: Path
    out: Path
    plot: Path | None
    json: Path | None
    samples: int
    sequence_length: int
    tracker: RangeTracker
    dtype: torch.dtype | None  # None: the checkpoint's
    seed: int


def check(arguments: argparse.Namespace) -> Job:
    """Arguments -> Job. Raises ConfigError or ModelError for anything that can be known before a model is loaded."""
    if (launch.world_size() or 1) > 1:
        raise ConfigError("calibrate simulates all ranks in one process: start it without torchrun")
    fraction = parse_fraction(arguments.fraction)
    if fraction is None or not 0 < fraction <= 1:
        raise ConfigError(
            f"--fraction is {arguments.fraction!r}: give a number above 0 and up to 1, such as {FRACTION}"
        )
    if not 0 < arguments.gamma <= 1:
        raise ConfigError(f"--gamma is {arguments.gamma}: give a number above 0 and up to 1, such as {GAMMA}")
    if arguments.samples < 1:
        raise ConfigError(f"--samples is {arguments.samples}: give at least one window")
    if not 0 <= arguments.seed < 2**63:
        raise ConfigError(f"--seed is {arguments.seed}: give a number from 0 to 2**63 - 1")
    if arguments.tp < 2:
        raise ConfigError(f"--tp is {arguments.tp}: give 2 or more ranks, as fewer have nothing to communicate")
    outputs = {name: getattr(arguments, name) for name in ("out", "plot", "json") if getattr(arguments, name)}
    for name, path in outputs.items():
        check_output(path, f"--{name}")
    if arguments.out.exists() and not arguments.out.is_file():
        raise ConfigError(f"--out {arguments.out} is a device: give a file")
    folder = bundled(arguments.model, "model", "--model DIR").resolve()
    for name, path in outputs.items():
        if path.resolve() == arguments.text.resolve() or (path.exists() and path.resolve().parent == folder):
            raise ConfigError(f"--{name} {path} is one of the files that are read: give another name")
    if len({path.resolve() for path in outputs.values()}) < len(outputs):
        raise ConfigError(f"{', '.join(f'--{name}' for name in outputs)} name one file twice: give each its own")
    if arguments.plot:
        check_installed()
    check_framework("transformers")  # which computes what any engine's ranks would
    model = bundled(arguments.model, "model", "--model DIR")
    trust, facts = read_model(model, arguments, arguments.tp)
    positions = facts.max_positions
    length = arguments.sequence_length
    if length is None:
        length = min(SEQUENCE_LENGTH, positions or SEQUENCE_LENGTH)
    if length < 2 or (positions is not None and length > positions):
        room = "2 tokens or more" if positions is None else f"2 to {positions} tokens, the model's positions"
        raise ConfigError(f"--sequence-length is {length}: give {room}")
    return Job(
        model,
        facts,
        trust,
        arguments.tp,
        arguments.text,
        arguments.out,
        arguments.plot,
        arguments.json,
        arguments.samples,
        length,
        RangeTracker(fraction, arguments.gamma, arguments.algorithm),
        DTYPES[arguments.dtype] and getattr(torch, DTYPES[arguments.dtype]),
        arguments.seed,
    )


def run(arguments: argparse.Namespace) -> int:
    """Check everything, watch the model, write the files, say what was found. Returns the exit code."""
    job = check(arguments)
    from ..engines.text_model import load_tokenizer

    text = read_text(job.text, "--text")
    tokenizer = load_tokenizer(job.model, job.trust.remote_code)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # verbose: warns of the text's length
    windows = draw(ids, job.samples, job.sequence_length, job.seed, prefix=tokenizer("")["input_ids"])
    start = time.perf_counter()
    dtype = _watch(job, windows)
    calibration = _of_engine(job.tracker.finish(_facts(job, text, dtype)), job.facts.sites)
    calibration.save(job.out)
    from . import calibrate_report

    overlaps = {site: job.tracker.overlap(site) for site in calibration.sites}
    calibrate_report.show(job, calibration, overlaps, time.perf_counter() - start)
    if job.plot:
        plot(calibration, overlaps, job.plot)
    return 0


def _watch(job: Job, windows: torch.Tensor) -> torch.dtype:
    """Load the model, to the GPU if there is one, and show the tracker all windows. Returns the model's dtype."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    from ..engines.hf_folder import hushed, read_folder

    with hushed():
        model = read_folder(job.model, job.trust).load(job.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("windows", total=len(windows))
        watch(model.to(device), windows.to(device), job.tp, job.tracker, lambda: bar.advance(task))
    return model.dtype


def _of_engine(calibration: Calibration, sites: Sequence[str]) -> Calibration:
    """Without the sites that the engine does not have, such as experts that DeepSpeed leaves whole."""
    kept = [site for site in calibration.sites if site in sites or not sites]
    ranges, outliers = ({site: found[site] for site in kept} for found in (calibration.ranges, calibration.outliers))
    return replace(calibration, ranges=ranges, outliers=outliers)


def _facts(job: Job, text: str, dtype: torch.dtype) -> dict[str, str]:
    """What the file says of its origin: names, never paths."""
    from ..engines.fingerprint import fingerprint

    return {
        "model": job.model.resolve().name,
        "fingerprint": fingerprint(job.model),
        "dtype": str(dtype).removeprefix("torch."),
        "sequence_length": str(job.sequence_length),
        "seed": str(job.seed),
        "text": job.text.name,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
