"""Time to first token and time per later token: a framework's own exact sums against compressed ones, in turn.

Ranks run in network namespaces, one on each host, over links of a chosen rate (shaped_network.py; needs root); without
root they run on loopback, which is said. A Llama of random weights in bf16 reads a prompt and continues it, exactly and
with each spec, again and again in one process; times are medians of the slowest rank's. `gate` is what a user gets who
names nothing but a spec; `always` compresses every message, those of single tokens too.

--share asks for the share that communication has of an exact prefill: computation is measured on loopback first, then
on a link of the rate that follows, which corrects it; the share that came out is reported. It is the time within
torch.distributed.all_reduce, of each call on the rank that waited least, over the prefill.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import random_llama
import shaped_network
import torch
import ttft_rank
from common import save, show

from megatron_lowbit.config import CommConfig
from megatron_lowbit.engines.registry import ENGINES, check_framework, engine_class
from megatron_lowbit.errors import ConfigError

EXAMPLES = """examples:
  python benchmarks/ttft.py                                       # two ranks, shares of 65 % and of 20 %
  python benchmarks/ttft.py --rate-gbit 1 --ranks 4 --comm int4:g32 --engine transformers
  python benchmarks/ttft.py --model ~/models/Llama-3.2-1B --tokens 512 --share 0.5
  python benchmarks/ttft.py --json benchmarks/results/ttft.json --plot docs/ttft.png
"""
SHARES = [0.65, 0.2]  # of 4 x L40 and of A100s in the Flash Communication paper
SPECS = ["int4:g32", "gauss4:g128", "gauss4:g128:trellis"]
SIZES = {"layers": 16, "hidden": 512, "heads": 8, "ffn": 1408, "vocab": 4096}
BURST = 32 << 10  # bytes that a link lets pass at once: what gathers while ranks compute must be little of a message
TRIAL = {"specs": [], "repeats": 3, "decode_tokens": 1}  # tells how long computation takes
SECONDS = 900


def main() -> int:
    arguments = parse()
    if arguments.worker:
        ttft_rank.run(json.loads(arguments.worker))
        return 0
    return shaped_network.exit_code(lambda: benchmark(arguments))


def benchmark(arguments: argparse.Namespace) -> int:
    from rich.progress import Progress

    check(arguments)
    rates = links(arguments)
    rows = []
    with model_folder(arguments) as folder, Progress() as bar:
        check_model(arguments, folder)
        shares = arguments.share if rates is None else [None] * len(rates)
        task = bar.add_task("links", total=len(shares) + (rates is None) * (1 + len(shares)))
        if rates is None:
            trial = measured(arguments, folder, None, **TRIAL)["exact"]
            rates = [rate_for(share, trial) for share in shares]
            bar.advance(task)
            for index, (share, rate) in enumerate(zip(shares, rates, strict=True)):
                trial = measured(arguments, folder, rate, **TRIAL)["exact"]
                rates[index] = rate_for(share, trial, rate)
                bar.advance(task)
        for share, rate in zip(shares, rates, strict=True):
            rows += link(arguments, folder, share, rate)
            bar.advance(task)
    report(rows)
    facts = {name: getattr(arguments, name) for name in ("tokens", "decode_tokens", "repeats", "device")}
    if arguments.model:
        facts["model"] = Path(arguments.model).resolve().name
    else:
        facts |= {"model": "Llama with random weights"} | {name: getattr(arguments, name) for name in SIZES}
    save(arguments.json, rows, dtype="bfloat16", **facts)
    if arguments.plot:
        from ttft_plot import plot

        plot(rows, arguments.plot)
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Raises LowBitError for what ranks would refuse."""
    check_framework(arguments.engine)
    for spec in arguments.comm:
        CommConfig(spec)
    for share in arguments.share:
        if not 0 < share < 1:
            raise ConfigError(f"--share {share:g}: a share lies between 0 and 1, such as 0.65")
    for name in ("ranks", "tokens", "decode_tokens", "repeats", *SIZES):
        least = 2 if name == "ranks" else 1
        if getattr(arguments, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: it must be at least {least}")
    if any(rate <= 0 for rate in arguments.rate_gbit):
        raise ConfigError(f"--rate-gbit {min(arguments.rate_gbit):g}: a rate is above 0")
    if arguments.hidden % (2 * arguments.heads):
        raise ConfigError(f"--heads {arguments.heads} do not divide --hidden {arguments.hidden} into even numbers")
    if arguments.device == "cuda" and torch.cuda.device_count() < arguments.ranks:
        found = torch.cuda.device_count()
        raise ConfigError(f"{arguments.ranks} ranks on GPUs need as many, and there are {found}: use --device cpu")


def check_model(arguments: argparse.Namespace, folder: str) -> None:
    """Raises LowBitError for a model that these ranks cannot share, or that has too few positions."""
    facts = engine_class(arguments.engine).read(folder)
    facts.check_tensor_parallel(arguments.ranks)
    tokens, later, most = arguments.tokens, arguments.decode_tokens, facts.max_positions
    if most is not None and tokens + later > most:
        raise ConfigError(
            f"{tokens} tokens and {later} more are above the model's {most} positions: give fewer --tokens"
        )


def links(arguments: argparse.Namespace) -> list[float | None] | None:
    """Rates in Gbit/s, [None] for the machine's own; None: those that --share leads to."""
    if arguments.device == "cuda":
        print("ranks on GPUs talk over NCCL as it is: no link is shaped", file=sys.stderr)
        return [None]
    try:
        shaped_network.check()
    except shaped_network.NetworkError as error:
        print(f"{error}: measuring on loopback, which no rate limits, whatever the share", file=sys.stderr)
        return [None]
    return arguments.rate_gbit or None


@contextmanager
def model_folder(arguments: argparse.Namespace):
    """--model, or a folder with a Llama of random weights as long as it is needed."""
    if arguments.model:
        yield arguments.model
        return
    sizes = {name: getattr(arguments, name) for name in SIZES}
    with tempfile.TemporaryDirectory(prefix="lowbit-ttft-") as folder:
        random_llama.write(Path(folder), **sizes, positions=arguments.tokens + arguments.decode_tokens)
        yield folder


def measured(arguments: argparse.Namespace, folder: str, rate: float | None, **changes: object) -> dict:
    """What ttft_rank.measure returns on links of `rate` Gbit/s, or on the machine's own."""
    job = {name: getattr(arguments, name) for name in ("engine", "device", "tokens", "decode_tokens", "repeats")}
    job |= {"model": str(folder), "specs": arguments.comm, "algorithms": list(ttft_rank.ALGORITHMS)} | changes
    program = [os.path.abspath(__file__), "--worker", json.dumps(job)]
    if rate is None:
        printed = shaped_network.run_ranks(arguments.ranks, program, SECONDS)
    else:
        with shaped_network.shaped_network([arguments.ranks], rate, burst=BURST) as hosts:
            printed = shaped_network.run_ranks(hosts, program, SECONDS)
    return json.loads(printed.splitlines()[-1])


def rate_for(share: float, trial: dict, rate: float | None = None) -> float:
    """Gbit/s at which all-reduces should have this share of a prefill. trial: the "exact" of a run at `rate`, None:
    on loopback. What all-reduces took there beyond the wire's time, the processor's work, is taken to stay."""
    wire = trial["bytes_exact"] * 8e-6 / rate if rate else 0.0
    beyond = trial["all_reduces_ms"] - wire
    wanted = share / (1 - share) * (trial["ttft_ms"] - trial["all_reduces_ms"]) - beyond
    if wanted <= 0:
        raise ConfigError(
            f"--share {share:g} cannot be had: with no wire at all it would be more: give a larger share, or a larger "
            "model"
        )
    return trial["bytes_exact"] * 8e-6 / wanted


def link(arguments: argparse.Namespace, folder: str, target: float | None, rate: float | None) -> list[dict]:
    """The rows of one link."""
    found = measured(arguments, folder, rate)
    exact = found["exact"]
    common = {"engine": arguments.engine, "rate_gbit": rate, "ranks": arguments.ranks, "tokens": arguments.tokens}
    shares = {"share": exact["share"], "share_target": target}
    base = {
        "ttft_exact_ms": exact["ttft_ms"],
        "decode_exact_ms": exact["decode_ms"],
        "bytes_exact": exact["bytes_exact"],
    }
    return [common | row | shares | base | {"ratio": exact["ttft_ms"] / row["ttft_ms"]} for row in found["rows"]]


def report(rows: list[dict]) -> None:
    first = rows[0]
    show(
        f"{first['engine']}, {first['ranks']} ranks, {first['tokens']} tokens; ms, medians of the slowest rank",
        ["link", "share", "spec", "", "TTFT exact", "TTFT", "ratio", "MB sent", "token exact", "token", "ratio"],
        [
            [f"{r['rate_gbit']:.3g} Gbit/s" if r["rate_gbit"] else "unlimited", f"{r['share']:.0%}", r["spec"],
             r["algorithm"], f"{r['ttft_exact_ms']:.0f}", f"{r['ttft_ms']:.0f}", f"{r['ratio']:.2f}x",
             f"{r['bytes_sent'] / 1e6:.1f} of {r['bytes_exact'] / 1e6:.1f}", f"{r['decode_exact_ms']:.2f}",
             f"{r['decode_ms']:.2f}", f"{r['decode_exact_ms'] / r['decode_ms']:.2f}x"]
            for r in rows
        ],
    )  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=list(ENGINES), default="megatron")
    parser.add_argument("--model", help="a Hugging Face folder, in place of random weights and of the sizes below")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size, help=f"of the random model (default: {size})")
    parser.add_argument("--tokens", type=int, default=1024, help="of the prompt (default: 1024)")
    parser.add_argument("--decode-tokens", type=int, default=32, help="after each prompt (default: 32)")
    parser.add_argument("--ranks", type=int, default=2, help="the TP size (default: 2)")
    parser.add_argument("--share", type=float, nargs="+", default=SHARES, help="of communication (default: 0.65 0.2)")
    parser.add_argument("--rate-gbit", type=float, nargs="+", default=[], help="of the links, in place of --share")
    parser.add_argument("--comm", nargs="+", metavar="SPEC", default=SPECS, help=f"(default: {' '.join(SPECS)})")
    parser.add_argument("--repeats", type=int, default=10, help="of every prompt (default: 10)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: ranks on GPUs, over NCCL")
    parser.add_argument("--json", type=Path, help="write the rows, the machine and the sizes")
    parser.add_argument("--plot", type=Path, help="draw a picture (PNG)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
