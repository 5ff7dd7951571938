"""All-reduce on links of a chosen rate: exact against any specs, in turn, and against the wire's own time.

Ranks run in network namespaces, one on each host, over gloo (shaped_network.py; needs root). Without root they run on
loopback, which is said. Times are medians over repeats of the slowest rank's. `gate` is what a user gets who names
nothing but a spec, and `direct` how it sends what it leaves exact; every other row compresses whatever the size.

    python benchmarks/link.py --rate-gbit 1 --ranks 2 --bytes 65536 8388608 --comm int4:g32 gauss4:g128
    python benchmarks/link.py --rate-gbit 0.2 1 5 --ranks 2 4 --json benchmarks/results/link.json --plot docs/link.png

With --nodes, so many nodes of so many ranks each, whose uplinks have --outer-gbit; --outer: what travels between nodes.

    python benchmarks/link.py --nodes 2x2 2x3 --rate-gbit 5 --outer-gbit 0.5 --bytes 8388608 --comm int4:g32 \\
        --algorithm two-step hierarchical --outer int3:g32 --json benchmarks/results/link_nodes.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import shaped_network
import torch
import torch.distributed as dist
from common import save, show
from rich.progress import Progress

import megatron_lowbit as lowbit
from megatron_lowbit import policy
from megatron_lowbit.calibration_file import Calibration
from megatron_lowbit.communicator import Communicator, communicator
from megatron_lowbit.config import ALGORITHMS
from megatron_lowbit.errors import ConfigError
from megatron_lowbit.ranges import Ranges
from megatron_lowbit.spec import Spec, parse

FEATURES = 4096
BYTES = [4 << 10, 64 << 10, 256 << 10, 1 << 20, 8 << 20]
SPECS = ["int8:g128", "int4:g32", "gauss4:g128", "int2:g32"]
EXACT = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BASE = "bf16"  # what others are compared with
SITE = "all_reduce"
GATE = "gate"
DIRECT = "direct"  # exact, over connections of our own
WARM_UP = 2
SMALL, CALLS = 1 << 20, 8  # smaller messages are so many to a measurement: a wake-up takes as long as one
SECONDS = 900


def worker(job: dict) -> None:
    """One rank: every operation in turn, again and again; rank 0 prints the times of the slowest rank as JSON."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(dist.get_rank())
    rows = []
    for nbytes in job["bytes"]:
        values = nbytes // 2
        x = torch.randn(max(values // FEATURES, 1), min(FEATURES, values)).bfloat16()
        operations = {(name, "exact"): partial(exact, x.to(dtype)) for name, dtype in EXACT.items()}
        operations |= left_alone(x)
        for spec, algorithm in product(job["specs"], job["algorithms"]):
            name, _, outer = algorithm.partition(" ")
            options = {} if name == GATE else {"algorithm": name, "min_bytes": 0, "outer_spec": outer or None}
            operations[spec, algorithm] = compressed(x, spec, **options)
        for spec, count in product(job["specs"], job["chunks"]):
            operations[spec, f"{count} chunks" if count else "collectives"] = in_chunks(x, spec, count)
        rows += [row | {"bytes": nbytes} for row in measure(operations, x, job["repeats"])]
    if dist.get_rank() == 0:
        print(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()  # threads of gloo that still run when a process ends abort it


def exact(x: torch.Tensor) -> None:
    dist.all_reduce(x.clone())  # a copy, as everything else leaves its input as it is


def left_alone(x: torch.Tensor) -> dict[tuple[str, str], Callable[[], torch.Tensor]]:
    """What the gate does with a message that it does not compress."""
    way = communicator_of(x, "int8:g128")
    decision = policy.exact(x.nbytes, way.facts)
    return {(BASE, DIRECT): partial(way.all_reduce_by, decision, x)} if decision.way else {}


def compressed(x: torch.Tensor, spec: str, **options) -> Callable[[], torch.Tensor]:
    return partial(communicator_of(x, spec, **options).all_reduce, x)


def communicator_of(x: torch.Tensor, spec: str, **options) -> Communicator:
    calibration = statistics_of(x, parse(spec)) if parse(spec).calibrated else None
    return communicator(None, lowbit.CommConfig(spec, calibration=calibration, **options))


def statistics_of(x: torch.Tensor, spec: Spec) -> Calibration:
    """Of normal values: where outliers are makes no difference to how long it takes."""
    world, features = dist.get_world_size(), x.shape[-1]
    reach, total = torch.full((world, features), 4.0), torch.full((features,), 4.0 * world**0.5)
    fraction = next(leg.outliers for leg in (spec.scatter, spec.gather) if leg.calibrated)
    return Calibration.from_ranges({SITE: Ranges(-reach, reach, -total, total)}, fraction)


def in_chunks(x: torch.Tensor, spec: str, count: int) -> Callable[[], torch.Tensor]:
    """0: the backend's own collectives."""
    way = communicator_of(x, spec, min_bytes=0)
    return partial(way.all_reduce_by, policy.Decision(policy.resolved("auto", way.world), chunks=count), x)


def measure(operations: dict, x: torch.Tensor, repeats: int) -> list[dict]:
    taken, sent, paths = {key: [] for key in operations}, {}, {}
    calls = CALLS if x.nbytes < SMALL else 1
    for repeat in range(WARM_UP + repeats):
        order = list(operations)
        random.Random(repeat).shuffle(order)  # alike on all ranks; what came before tells in a small message's time
        for key in order:
            lowbit.reset_stats()
            dist.barrier()
            start = time.perf_counter()
            for _ in range(calls):
                operations[key]()
            if repeat >= WARM_UP:
                taken[key].append((time.perf_counter() - start) / calls)
            for site in lowbit.stats().values():
                sent[key], paths[key] = site["bytes_sent"] / calls, next(iter(site["paths"]))
    seconds = torch.tensor([taken[key] for key in operations], dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)  # a collective is over when the last rank has its result
    world = dist.get_world_size()
    rows = []
    for (name, algorithm), times in zip(operations, seconds.tolist(), strict=True):
        ring = x.numel() * EXACT.get(name, torch.bfloat16).itemsize * 2 * (world - 1) / world
        rows.append({
            "spec": name, "algorithm": algorithm, "path": paths.get((name, algorithm), "exact"),
            "median_ms": 1e3 * statistics.median(times), "bytes_sent": sent.get((name, algorithm), ring),
        })  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate-gbit", type=float, nargs="+", default=[1.0], help="of each rank's link")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="added to every packet")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--nodes", type=nodes, nargs="+", default=[], metavar="KxL", help="K nodes of L ranks")
    parser.add_argument("--outer-gbit", type=float, nargs="+", default=[1.0], help="of each node's uplink")
    parser.add_argument("--outer", nargs="+", default=[], metavar="SPEC", help="between nodes, in hierarchical")
    parser.add_argument("--bytes", type=int, nargs="+", default=BYTES, help="of the bf16 message")
    parser.add_argument("--comm", nargs="+", metavar="SPEC", default=SPECS)
    parser.add_argument(
        "--algorithm", nargs="+", default=["auto"], help="auto, one-shot, two-step, hierarchical, or gate"
    )
    parser.add_argument(
        "--chunks", type=int, nargs="+", default=[], help="compare numbers of chunks, too; 0: the backend's collectives"
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(json.loads(arguments.worker))
        return 0
    return shaped_network.exit_code(lambda: benchmark(arguments))


def benchmark(arguments: argparse.Namespace) -> int:
    check(arguments)
    specs = [str(parse(spec)) for spec in arguments.comm]
    algorithms = arguments.algorithm + [f"hierarchical {parse(spec)}" for spec in arguments.outer]
    job = {"bytes": arguments.bytes, "specs": specs, "algorithms": algorithms}
    job |= {"chunks": arguments.chunks, "repeats": arguments.repeats}
    program = [os.path.abspath(__file__), "--worker", json.dumps(job)]
    rows, rates = [], arguments.rate_gbit
    try:
        shaped_network.check()
    except shaped_network.NetworkError as error:
        print(f"{error}: measuring on loopback, which no rate limits", file=sys.stderr)
        rates = [None]
    with Progress() as bar:
        places = list(product(arguments.nodes, arguments.outer_gbit))
        places = places or [((1, ranks), None) for ranks in arguments.ranks]
        task = bar.add_task("links", total=len(rates) * len(places))
        for rate, place in product(rates, places):
            rows += link(rate, *place, arguments.delay_ms, program)
            bar.advance(task)
    report(rows)
    save(arguments.json, rows, features=FEATURES, repeats=arguments.repeats, delay_ms=arguments.delay_ms)
    if arguments.plot:
        from link_plot import plot

        plot(rows, arguments.plot)
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for what cannot be measured."""
    for name, least in (("ranks", 2), ("bytes", 2), ("chunks", 0), ("repeats", 1)):
        given = getattr(arguments, name)
        for value in given if isinstance(given, list) else [given]:
            if value < least:
                raise ConfigError(f"--{name} {value}: it must be at least {least}")
    for name in ("rate_gbit", "outer_gbit"):
        for rate in getattr(arguments, name):
            if not 0 < rate < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')} {rate:g}: a rate is above 0")
    if not 0 <= arguments.delay_ms < math.inf:
        raise ConfigError(f"--delay-ms {arguments.delay_ms:g}: a delay is not negative")
    for algorithm in arguments.algorithm:
        if algorithm != GATE and algorithm not in ALGORITHMS:
            raise ConfigError(f"--algorithm {algorithm}: use {GATE} or one of {', '.join(ALGORITHMS)}")


def nodes(text: str) -> tuple[int, int]:
    """2x3 -> (2, 3), for argparse."""
    try:
        count, ranks = map(int, text.split("x"))
        if count < 1 or ranks < 1:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of nodes and of ranks on each, such as 2x3") from None
    return count, ranks


def link(
    rate: float | None, place: tuple[int, int], outer: float | None, delay_ms: float, program: list[str]
) -> list[dict]:
    """The rows of one kind of link. rate: Gbit/s, None: loopback; place: nodes, ranks on each; outer: of uplinks."""
    count, ranks = place
    if rate is None:
        here = [shaped_network.Host("", "127.0.0.1", "lo", node) for node in range(count) for _ in range(ranks)]
        found = json.loads(shaped_network.run_ranks(here, program, SECONDS))
    else:
        with shaped_network.shaped_network([ranks] * count, rate, outer, delay_ms=delay_ms) as hosts:
            found = json.loads(shaped_network.run_ranks(hosts, program, SECONDS))
    base = {row["bytes"]: row["median_ms"] for row in found if (row["spec"], row["algorithm"]) == (BASE, "exact")}
    for row in found:
        wire = row["bytes_sent"] * 8e-6 / rate if rate else None
        row |= {"rate_gbit": rate, "ranks": count * ranks, "ratio_to_gloo_bf16": base[row["bytes"]] / row["median_ms"]}
        if count > 1:
            row |= {"nodes": count, "outer_gbit": outer if rate else None, "uplink_bytes": uplink(row, count, ranks)}
            wire = max(wire, row["uplink_bytes"] * 8e-6 / outer) if rate else None
        row["wire_ms"] = wire
    return found


def uplink(row: dict, count: int, ranks: int) -> float:
    """Bytes that each of `count` nodes of `ranks` ranks sends over its uplink; exactly as in a ring of all ranks."""
    if row["path"] == "exact":
        return row["bytes_sent"]
    outer = row["algorithm"].partition(" ")[2]
    spec, values = parse(outer or row["spec"]), row["bytes"] // 2
    shape = max(values // FEATURES, 1), min(FEATURES, values)
    scatter, gather = (lowbit.codec(str(leg)).wire_nbytes(shape) for leg in (spec.scatter, spec.gather))
    if row["path"] == "one-shot":
        return ranks * (count - 1) * ranks * scatter
    return (1 if row["path"] == "hierarchical" else ranks) * (count - 1) / count * (scatter + gather)


def report(rows: list[dict]) -> None:
    show(
        "all-reduce over gloo, median of the slowest rank; ratio: gloo's bf16 all-reduce against it",
        ["Gbit/s", "ranks", "bytes", "spec", "algorithm", "path", "ms", "the wire's", "ratio"],
        [
            [f"{r['rate_gbit'] or 'loopback'}" + (f" / {r['outer_gbit']}" if r.get("outer_gbit") else ""),
             f"{r['ranks']}" + (f" on {r['nodes']}" if "nodes" in r else ""), f"{r['bytes']:,}", r["spec"],
             r["algorithm"], r["path"], f"{r['median_ms']:.2f}", f"{r['wire_ms']:.2f}" if r["wire_ms"] else "",
             f"{r['ratio_to_gloo_bf16']:.2f}x"]
            for r in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
