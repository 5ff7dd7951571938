"""Accuracy for the bits: signal to quantization noise of every codec, on known distributions and on a model.

One hop is decode(encode(x)) of each tensor that is sent; two-step is what every rank holds after a full all-reduce,
against the exact sum of what was sent. Inputs are values of bf16, outputs are kept in fp32, so that what is measured is
the codec and not the rounding of its result; energies are summed in fp64. The Shannon bound of a Gaussian is
20 log10(2) = 6.02 dB per bit. Codecs that need a calibration get it from other draws, or from another part of the text.

    python benchmarks/quality.py --json benchmarks/results/quality.json --plot docs/sqnr.png
    python benchmarks/quality.py --spec int4:g32 --spec gauss4:g128 --text FILE --tokens 8192
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common import save, show
from distributions import CALIBRATION_DRAWS, DISTRIBUTIONS, NAMES, SHAPE, sample
from partial_sums import EXAMPLES, Source, partial_sums
from quality_targets import targets
from rich.progress import Progress

import megatron_lowbit as lowbit
from megatron_lowbit.calibration import RangeTracker
from megatron_lowbit.calibration.collect import GAMMA
from megatron_lowbit.calibration_file import Calibration
from megatron_lowbit.spec import parse_leg

SPECS = [
    *(f"int{bits}:g32" for bits in range(2, 9)), "int4:g64", "int4:g128", "int8:g128",
    *(f"int{bits}:g32:sym" for bits in range(2, 5)),
    *(f"int{bits}:g{group}:spike" for bits in (2, 3, 4) for group in (32, 64)), "int4:g128:spike",
    "int4:g32:outliers=1/64",
    "gauss4:g64", *(f"gauss{bits}:g128" for bits in range(2, 8)), *(f"gauss{bits}:g256" for bits in range(2, 8)),
    *(f"gauss{bits}:g128:outliers=1/64" for bits in (2, 3, 4)),
    *(f"gauss{bits}:g256:outliers=1/64" for bits in (3, 4, 5)),
    *(f"gauss{bits}:g128:trellis" for bits in range(2, 6)), "gauss4:g256:trellis",
    *(f"gauss{bits}:g128:trellis:outliers=1/64" for bits in (2, 3, 4)),
    "selective4", "fp8", "mxfp8", "mxfp6", "mxfp4", "nvfp4",
]  # fmt: skip
SHANNON = 20 * math.log10(2)  # dB per bit
ONE_HOP, TWO_STEP = "one hop", "two-step"
Energies = tuple[float, float]  # of the signal, of the noise


def energies(exact: torch.Tensor, result: torch.Tensor) -> Energies:
    exact = exact.double()
    return float(exact.square().sum()), float((result - exact).square().sum())


def decibels(signal: float, noise: float) -> float:
    """Signal to noise; infinite without noise."""
    return 10 * math.log10(signal / noise) if noise else math.inf


def one_hop(codec: lowbit.Codec, x: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(x), x.shape, torch.float32)


def config(spec: str, calibration: Calibration) -> lowbit.CommConfig:
    return lowbit.CommConfig(spec=spec, calibration=calibration if parse_leg(spec).calibrated else None)


def row(data: str, tp: int | None, hop: str, spec: str, shape: Sequence[int], total: Energies) -> dict:
    bits = lowbit.codec(spec).bits_per_value(shape)
    return {
        "data": data, "tp": tp, "hop": hop, "spec": spec, "bits_per_value": bits, "sqnr_db": decibels(*total),
        "shannon_db": SHANNON * bits,
    }  # fmt: skip


def synthetic(name: str, specs: Sequence[str], shape: tuple[int, int], advance: Callable[[], None]) -> list[dict]:
    """One row per spec and part of the distribution."""
    data, tracker, rows = sample(name, shape), RangeTracker(), []
    for draw in data.calibration:
        tracker.observe(name, [draw])
    calibration = tracker.finish()
    for spec in specs:
        decoded = one_hop(config(spec, calibration).codec("scatter", name, 0), data.x)
        for part, features in data.parts.items():
            total = energies(data.x[:, features], decoded[:, features])
            rows.append(row(part, None, ONE_HOP, spec, shape, total))
        advance()
    return rows


def model(
    places: dict[str, list[torch.Tensor]],
    calibration: Calibration,
    specs: Sequence[str],
    tp: int,
    advance: Callable[[], None],
) -> list[dict]:
    """Two rows per spec: all sites' energies together, and how the sites differ."""
    found: dict[tuple[str, str], dict[str, Energies]] = {(s, hop): {} for s in specs for hop in (ONE_HOP, TWO_STEP)}
    for site, partials in places.items():
        exact = sum(x.double() for x in partials)
        for spec in specs:
            chosen = config(spec, calibration)
            sent = [one_hop(chosen.codec("scatter", site, rank), x) for rank, x in enumerate(partials)]
            total = lowbit.simulate.all_reduce(partials, spec, "two-step", chosen.calibration, site)
            found[spec, ONE_HOP][site] = energies(torch.stack(partials), torch.stack(sent))
            found[spec, TWO_STEP][site] = energies(exact, total)
            advance()
    shape, rows = exact.shape, []
    for (spec, hop), by_site in found.items():
        signal, noise = map(sum, zip(*by_site.values()))
        each = {name: decibels(*of_site) for name, of_site in by_site.items()}
        worst = min(each, key=each.get)
        rows.append(row("model", tp, hop, spec, shape, (signal, noise)) | {
            "mean_of_sites_db": sum(each.values()) / len(each), "worst_site": worst, "worst_site_db": each[worst],
            "worst_site_share_of_energy": by_site[worst][0] / signal,
        })  # fmt: skip
    return rows


def report(rows: list[dict], goals: list[dict]) -> None:
    """Print three tables."""
    specs = list(dict.fromkeys(r["spec"] for r in rows))
    cells = {(r["data"], r["tp"], r["hop"], r["spec"]): r for r in rows}
    lines = []
    for spec in specs:
        of_spec = [cells[name, None, ONE_HOP, spec] for name in NAMES]
        lines.append([spec, f"{of_spec[0]['bits_per_value']:.3f}", *(f"{r['sqnr_db']:.2f}" for r in of_spec)])
    show("Distributions: SQNR in dB, one hop", ["spec", "bits", *NAMES], lines)
    tps = sorted({r["tp"] for r in rows if r["tp"]})
    lines = []
    for spec in specs:
        sums = [cells["model", tp, TWO_STEP, spec] for tp in tps]
        values = [cells["model", tps[-1], ONE_HOP, spec], *sums]
        lines.append([spec, f"{sums[-1]['bits_per_value']:.3f}", *(f"{r['sqnr_db']:.2f}" for r in values),
                      f"{sums[-1]['mean_of_sites_db']:.2f}", f"{sums[-1]['worst_site_db']:.2f}"])  # fmt: skip
    columns = [f"one hop, TP {tps[-1]}", *(f"sum, TP {tp}" for tp in tps), "mean of sites", "worst site"]
    show("The model's partial sums: SQNR in dB", ["spec", "bits", *columns], lines)
    show("Targets", ["goal", "dB needed", "reached", "by", "bits", "met"],
         [[g["goal"], f"{g['needed_db']:g}", f"{g['db']:.2f}", g["spec"], f"{g['bits_per_value']:.3f}",
           "yes" if g["met"] else "no"] for g in goals])  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", action="append", help=f"one leg; may be repeated (default: a set of {len(SPECS)})")
    parser.add_argument("--model", type=Path, default=EXAMPLES / "model")
    parser.add_argument("--text", type=Path, default=EXAMPLES / "sample_text.txt")
    parser.add_argument("--tokens", type=int, default=4096, help="how much of the text to use, at most (default: 4096)")
    parser.add_argument("--tp", type=int, action="append", help="may be repeated (default: 2, 4 and 8)")
    parser.add_argument("--rows", type=int, default=SHAPE[0], help="of the distributions (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, metavar="PNG")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    specs, tps, shape = options.spec or SPECS, options.tp or [2, 4, 8], (options.rows, SHAPE[1])
    source, rows = Source.load(options.model, options.text, options.tokens), []
    steps = len(DISTRIBUTIONS) + 2 * source.model.config.num_hidden_layers * len(tps)
    with Progress() as bar:
        task = bar.add_task("measuring", total=steps * len(specs))
        for name in DISTRIBUTIONS:
            rows += synthetic(name, specs, shape, lambda: bar.advance(task))
        for tp in tps:
            rows += model(*partial_sums(source, tp), specs, tp, lambda: bar.advance(task))
    goals = targets(rows)
    report(rows, goals)
    save(options.json, rows, shape=shape, gamma=GAMMA, calibration_draws=CALIBRATION_DRAWS, **source.facts,
         targets=goals)  # fmt: skip
    if options.plot:
        from quality_plot import plot

        plot(rows, options.plot)


if __name__ == "__main__":
    main()
