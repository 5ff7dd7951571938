"""`generate`: text generation under tensor parallelism, with and without compressed communication."""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from .. import telemetry
from ..config import CommConfig
from ..errors import ModelError
from . import launch
from .job import Job, add_arguments, check

if TYPE_CHECKING:
    from ..engines.base import Engine

__all__ = ["DESCRIPTION", "EXAMPLES", "HELP", "add_arguments", "run"]

HELP = "generate text with tensor parallelism, compressed or not"
DESCRIPTION = """Generate text with tensor parallelism through the framework's own inference engine. Starts its
own ranks, unless torchrun already did. With --compare: once exactly and once compressed, side by side."""
EXAMPLES = """examples:
  megatron-lowbit generate --compare
  megatron-lowbit generate --model ~/models/Llama-3.2-1B --tp 4 --comm int4:g32/int8:g128 --prompt "Once upon a time"
  megatron-lowbit generate --comm int3:g32 --compare --prompts prompts.txt --text held-out.txt --json result.json
  torchrun --nproc-per-node 2 -m megatron_lowbit generate --tp 2 --temperature 0.8 --top-k 40 --seed 7
"""


def run(arguments: argparse.Namespace) -> int:
    """Check everything once, then start ranks or, inside one, do the work. Returns the exit code."""
    job = check(arguments)
    if launch.world_size() is None:
        return launch.start_ranks(job.tp, arguments.argv, arguments.debug)
    with launch.process_group(job.tp, arguments.timeout):
        work(job)
    return 0


def work(job: Job) -> None:
    """Inside a rank: load, run, report."""
    import torch

    from . import report

    engine = _engine(job)
    for number in (signal.SIGINT, signal.SIGTERM):  # Megatron dumps all stacks on these; ending quietly is enough
        faulthandler.unregister(number)
    faulthandler.disable()
    engine.check(job.prompts, job.sampling)
    show = report.Report(job, rank=int(os.environ["RANK"]))
    results = {}
    if job.compare or job.config is None:
        results["exact"] = _measure(engine, job, CommConfig(algorithm="exact"), show.stream("exact"))
    if job.config is not None:
        results["compressed"] = _measure(engine, job, job.config, show.stream(job.config.spec))
        if not any(set(site["paths"]) - {"exact"} for site in results["compressed"]["stats"].values()):
            raise ModelError(
                f"nothing was compressed: no message reached --comm-min-bytes {job.config.min_bytes} at a selected "
                "site; lower it, or give other --comm-sites"
            )
    if len(results) == 2:
        results["compressed"]["token_agreement"] = agreement(
            results["exact"]["tokens"], results["compressed"]["tokens"]
        )
    torch.distributed.barrier()
    show.finish(results)


def agreement(exact: list[tuple[int, ...]], compressed: list[tuple[int, ...]]) -> float:
    """Fraction of positions, over all prompts, at which both runs chose the same token."""
    pairs = [
        (a, b)
        for left, right in zip(exact, compressed, strict=True)
        for a, b in zip(left + (-1,) * (len(right) - len(left)), right + (-1,) * (len(left) - len(right)), strict=True)
    ]
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else 1.0


def _measure(engine: Engine, job: Job, config: CommConfig, stream) -> dict:
    """One run: generation (timed), perplexity, and what both sent."""
    with engine.enable(config):
        # Compile or load the kernels, make the buffers and let the ranks compare settings before the clock starts.
        engine.generate(job.prompts[:1], replace(job.sampling, max_new_tokens=1))
        telemetry.reset_stats()
        start, generations = time.perf_counter(), []
        for index, prompt in enumerate(job.prompts):  # one by one, so that the text can be read as it comes
            stream.begin(prompt)
            generations += engine.generate([prompt], job.sampling, lambda _, piece: stream.write(piece))
            stream.end(index)
        seconds = time.perf_counter() - start
        perplexity = engine.perplexity(job.text).value if job.text else None
    stats = telemetry.stats()
    return {
        "texts": [g.text for g in generations],
        "tokens": [g.tokens for g in generations],
        "perplexity": perplexity,
        "seconds": seconds,
        "bytes_sent": sum(site["bytes_sent"] for site in stats.values()),
        "bytes_exact": sum(site["bytes_bf16"] for site in stats.values()),
        "stats": stats,
    }


def _engine(job: Job) -> Engine:
    import torch

    from ..engines.registry import engine_class

    dtype = job.dtype and getattr(torch, job.dtype)
    return engine_class(job.engine)(job.model, job.tp, dtype, progress=True, debug=job.debug, trust=job.trust)
