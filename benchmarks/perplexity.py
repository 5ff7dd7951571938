"""What each spec costs in perplexity on a Llama, at several TP sizes, simulated on one device.

Every row-parallel layer is evaluated as N partial products and reduced by `simulate.all_reduce`, bit for bit what N
ranks would do. All specs see the same windows, so small differences count. Specs that need a calibration get one at
each TP size, from another text.

    python benchmarks/perplexity.py --text held-out.txt --tokens 16384 --json benchmarks/results/perplexity.json
    python benchmarks/perplexity.py --model DIR --tp 2 --spec int4:g32 --spec int6:g64
"""

from __future__ import annotations

import argparse
import hashlib
import math
from pathlib import Path

import torch
from common import save, show
from rich.progress import Progress

import megatron_lowbit as lowbit
from megatron_lowbit.calibration.collect import RangeTracker, watch
from megatron_lowbit.calibration.windows import draw
from megatron_lowbit.engines.simulated_tp import simulated_tp
from megatron_lowbit.spec import parse

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SPECS = ["int8:g128", "int6:g128", "int6:g64", "int6:g32", "int5:g128", "int5:g64", "int5:g32", "int4:g32/int8:g128",
         "int4:g128", "int4:g64", "int4:g32", "int4:g32:sym", "int3:g32", "int2:g32", "int2:g32:sym",
         "gauss6:g128", "gauss5:g256", "gauss5:g128:trellis", "gauss4:g128", "gauss4:g256", "gauss4:g128:trellis",
         "gauss3:g256", "gauss3:g128:trellis", "gauss2:g128:trellis", "gauss4:g128:trellis:outliers=1/64", "selective4",
         "int4:g64:spike", "int3:g64:spike", "int2:g128:sym:spike",
         "fp8", "mxfp8", "mxfp6", "mxfp4", "nvfp4"]  # fmt: skip


@torch.inference_mode()
def loss(
    model: torch.nn.Module, windows: torch.Tensor, tp: int, spec: str | None, algorithm: str, calibration=None
) -> torch.Tensor:
    """Mean negative log likelihood of each window, in nats; spec None: exact."""
    calibration = calibration if spec and parse(spec).calibrated else None

    def reduce(site: str, partials: list[torch.Tensor]) -> torch.Tensor:
        return lowbit.simulate.all_reduce(partials, spec or "fp32", algorithm if spec else "exact", calibration, site)

    with simulated_tp(model, tp, reduce):
        return torch.stack([
            torch.nn.functional.cross_entropy(model(input_ids=w[None]).logits[0, :-1].float(), w[1:]) for w in windows
        ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EXAMPLES / "model")
    parser.add_argument("--text", type=Path, default=EXAMPLES / "sample_text.txt")
    parser.add_argument("--tokens", type=int, default=16384, help="how much of the text to use, at most")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--tp", type=int, action="append", help="may be repeated (default: 2, 4 and 8)")
    parser.add_argument("--spec", action="append", help="may be repeated (default: a set of 33)")
    parser.add_argument("--algorithm", default="auto")
    parser.add_argument(
        "--calibration-text",
        type=Path,
        default=EXAMPLES / "sample_text.txt",
        help="another text, for selective4 and such",
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = arguments.text.read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0, : arguments.tokens]
    windows = ids[: len(ids) // arguments.window * arguments.window].view(-1, arguments.window)
    shape, specs, rows = (arguments.window, model.config.hidden_size), arguments.spec or SPECS, []
    other_text = arguments.calibration_text.read_text(encoding="utf-8")
    other_windows = draw(tokenizer(other_text)["input_ids"], samples=256, length=min(256, arguments.window), seed=0)
    if calibrated := [spec for spec in specs if parse(spec).calibrated]:
        assert other_text != text, f"{calibrated} would be evaluated on what they were calibrated on: give another text"
    with Progress() as bar:
        tps = arguments.tp or [2, 4, 8]
        task = bar.add_task("evaluating", total=len(tps) * (len(specs) + 1))
        for tp in tps:
            exact = loss(model, windows, tp, None, arguments.algorithm)
            bar.advance(task)
            tracker = RangeTracker()
            if calibrated:
                watch(model, other_windows, tp, tracker)
            calibration = tracker.finish() if calibrated else None
            for spec in specs:
                change = loss(model, windows, tp, spec, arguments.algorithm, calibration) - exact
                legs = [
                    lowbit.codec(str(leg)).bits_per_value(shape) for leg in (parse(spec).scatter, parse(spec).gather)
                ]
                one_shot = arguments.algorithm == "one-shot" or (arguments.algorithm == "auto" and tp == 2)
                bits = legs[0] if one_shot else (legs[0] + legs[-1]) / 2
                volume = bits * ((tp - 1) if one_shot else 2 * (tp - 1) / tp)
                rows.append({
                    "spec": spec, "tp": tp, "algorithm": "one-shot" if one_shot else "two-step", "bits_per_value": bits,
                    "times_fewer_bytes_than_bf16": 2 * (tp - 1) / tp * 16 / volume,
                    "perplexity_exact": math.exp(exact.mean()), "perplexity": math.exp((exact + change).mean()),
                    "loss_percent": 100 * math.expm1(change.mean()),
                    "loss_percent_standard_error": 100 * float(change.std() / math.sqrt(len(change))),
                })  # fmt: skip
                bar.advance(task)
    show(
        f"{arguments.model.name} on {arguments.text.name}, {windows.numel():,} tokens",
        ["spec", "TP", "algorithm", "bits/value", "fewer bytes than bf16", "perplexity", "loss", "± (1 s.e.)"],
        [
            [r["spec"], str(r["tp"]), r["algorithm"], f"{r['bits_per_value']:.2f}",
             f"{r['times_fewer_bytes_than_bf16']:.2f}x", f"{r['perplexity']:.3f}", f"{r['loss_percent']:+.2f} %",
             f"{r['loss_percent_standard_error']:.2f}"]
            for r in rows
        ],
    )  # fmt: skip
    facts = {
        "calibration_text": arguments.calibration_text.name,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    save(arguments.json, rows, model=arguments.model.name, text=arguments.text.name, tokens=windows.numel(), **facts)


if __name__ == "__main__":
    main()
