"""How long `megatron-lowbit evaluate` takes for one more spec, as a multiple of a plain perplexity run of the model.

The bundled model over windows of 512 tokens of a text. Plain: Transformers' forward pass, the loss of each token, and
nothing else. One more spec: the forward pass with N simulated ranks, and the comparison with logits that are there
already, as all specs share the exact run. Both in turns, window by window; of the ratios the median.

    python benchmarks/evaluating.py --json benchmarks/results/evaluating.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from common import save, show

import megatron_lowbit as lowbit
from megatron_lowbit.calibration.collect import RangeTracker, watch
from megatron_lowbit.cli.files import BUNDLED
from megatron_lowbit.engines.hf_folder import hushed, read_folder
from megatron_lowbit.engines.simulated_tp import simulated_tp
from megatron_lowbit.engines.text_model import load_tokenizer
from megatron_lowbit.evaluation.metrics import compare
from megatron_lowbit.evaluation.run import predictions
from megatron_lowbit.evaluation.windows import Window, consecutive
from megatron_lowbit.simulate import reduced

SPECS = ("int4:g32", "int8:g128", "gauss4:g128", "gauss4:g128:trellis", "selective4")
TPS, DTYPES, LENGTH = (2, 4, 8), ("float32", "bfloat16"), 512


def plain(model: torch.nn.Module, window: Window) -> float:
    """The sum of the tokens' losses."""
    logits = predictions(model, window)
    return torch.nn.functional.cross_entropy(logits.float(), window.targets, reduction="sum").item()


def one_more(
    model: torch.nn.Module, window: Window, exact: torch.Tensor, config: lowbit.CommConfig, tp: int
) -> torch.Tensor:
    with simulated_tp(model, tp, lambda site, partials: reduced(partials, config, site)):
        return compare(exact, predictions(model, window), window.targets).nll.sum()


def seconds(function: Callable, *arguments: object) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def measure(model: torch.nn.Module, windows: list[Window], repeats: int) -> list[dict]:
    exact, rows = [predictions(model, window) for window in windows], []
    for tp in TPS:
        tracker = RangeTracker()
        watch(model, torch.stack([window.ids for window in windows]), tp, tracker)
        calibration = tracker.finish()
        for spec in SPECS:
            config = lowbit.CommConfig(spec, "auto", 0, calibration=calibration if spec == "selective4" else None)
            times = []
            for turn in range(repeats + 1):  # the first compiles kernels
                for window, logits in zip(windows, exact, strict=True):
                    alone = seconds(plain, model, window)
                    also = seconds(one_more, model, window, logits, config, tp)
                    times += [(alone, also)] if turn else []
            rows.append(
                {
                    "dtype": str(model.dtype).removeprefix("torch."),
                    "tp": tp,
                    "spec": spec,
                    "plain_ms": 1e3 * statistics.median(alone for alone, _ in times),
                    "one_more_ms": 1e3 * statistics.median(also for _, also in times),
                    "ratio": statistics.median(also / alone for alone, also in times),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=BUNDLED / "sample_text.txt")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="of all windows")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    tokenizer, rows = load_tokenizer(BUNDLED / "model"), []
    ids = tokenizer(arguments.text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    windows = consecutive(ids, LENGTH, count=arguments.windows, prefix=tokenizer("")["input_ids"])
    for dtype in DTYPES:
        with hushed():
            model = read_folder(BUNDLED / "model").load(getattr(torch, dtype))
        rows += measure(model, windows, arguments.repeats)
    show(
        f"one more spec, {len(windows)} windows of {LENGTH} tokens, one thread",
        ["spec", "dtype", "TP", "plain, ms", "one more, ms", "ratio"],
        [[row["spec"], row["dtype"], str(row["tp"]), f"{row['plain_ms']:.1f}", f"{row['one_more_ms']:.1f}",
          f"{row['ratio']:.2f}"] for row in rows],
    )  # fmt: skip
    facts = {"windows": len(windows), "length": LENGTH, "repeats": arguments.repeats, "threads": 1}
    save(arguments.json, rows, text=arguments.text.name, transformers=version("transformers"), **facts)


if __name__ == "__main__":
    main()
