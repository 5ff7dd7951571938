"""Are the outliers of a model the same features throughout, and how far do they stand out, at several TP sizes?

python benchmarks/calibration.py --text held-out.txt --json benchmarks/results/calibration.json
python benchmarks/calibration.py --model DIR --tp 8 --samples 256 --gamma 0.01
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time
from pathlib import Path

import torch
from common import save, show

from megatron_lowbit.calibration.collect import RangeTracker, watch
from megatron_lowbit.calibration.windows import draw
from megatron_lowbit.ranges import Ranges

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


class Several:
    """Trackers of several gammas, shown the same windows."""

    def __init__(self, gammas: list[float]) -> None:
        self.trackers = {gamma: RangeTracker(gamma=gamma) for gamma in gammas}

    def observe(self, site: str, partials: list[torch.Tensor]) -> torch.Tensor:
        return [tracker.observe(site, partials) for tracker in self.trackers.values()][-1]


def row(tracker: RangeTracker) -> dict:
    """The figures of one tracker, over all sites."""
    calibration = tracker.finish()
    times, agree = [], []
    for site, ranges in calibration.ranges.items():
        outliers = set(calibration.outliers[site])
        times.append(float(ranges.hull[sorted(outliers)].median() / ranges.hull.median()))
        of_sum = Ranges(ranges.sum_low[None], ranges.sum_high[None]).outliers(calibration.fraction)
        agree.append(len(outliers & set(of_sum)) / len(outliers))
    overlaps = [tracker.overlap(site) for site in calibration.sites]
    return {
        "overlap": statistics.mean(overlaps), "overlap_least": min(overlaps), "chance": float(calibration.fraction),
        "times": statistics.median(times), "times_most": max(times), "sum_agreement": statistics.mean(agree),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EXAMPLES / "model")
    parser.add_argument("--text", type=Path, default=EXAMPLES / "sample_text.txt")
    parser.add_argument("--tp", type=int, action="append", help="may be repeated (default: 2, 4 and 8)")
    parser.add_argument("--samples", type=int, action="append", help="may be repeated (default: 64 and 256)")
    parser.add_argument("--gamma", type=float, action="append", help="may be repeated (default: 0.01 and 0.05)")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    text = arguments.text.read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(arguments.model)(text, add_special_tokens=False, verbose=False)["input_ids"]
    rows = []
    for tp in arguments.tp or [2, 4, 8]:
        for samples in arguments.samples or [64, 256]:
            windows, several = draw(ids, samples, arguments.window, 0), Several(arguments.gamma or [0.01, 0.05])
            start = time.perf_counter()
            watch(model, windows, tp, several)
            seconds = time.perf_counter() - start
            for gamma, tracker in several.trackers.items():
                rows.append({"tp": tp, "samples": len(windows), "gamma": gamma, "seconds": seconds} | row(tracker))
    show(
        f"{arguments.model.name} on {arguments.text.name}, windows of {arguments.window}",
        ["TP", "windows", "gamma", "overlap", "least", "times the median", "most", "of the sum too", "s"],
        [
            [str(r["tp"]), str(r["samples"]), str(r["gamma"]), f"{r['overlap']:.0%}", f"{r['overlap_least']:.0%}",
             f"{r['times']:.2f}", f"{r['times_most']:.2f}", f"{r['sum_agreement']:.0%}", f"{r['seconds']:.1f}"]
            for r in rows
        ],
    )  # fmt: skip
    save(arguments.json, rows, model=arguments.model.name, text=arguments.text.name, window=arguments.window,
         text_sha256=hashlib.sha256(text.encode()).hexdigest())  # fmt: skip


if __name__ == "__main__":
    main()
