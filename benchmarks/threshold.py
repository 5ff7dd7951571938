"""From which message size compression pays on a link: exact against compressed, in turn, two ranks over gloo.

With --rate-gbit the ranks run in two network namespaces joined by a veth pair that `tc tbf` limits (needs root; both
are removed afterwards); without, over loopback. The smallest size from which compressed is faster at every larger
size is what `megatron_lowbit/policy.py` holds as MIN_BYTES.

    python benchmarks/threshold.py --rate-gbit 1 --json benchmarks/results/threshold.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from common import save, show

import megatron_lowbit as lowbit

SIZES = [1 << power for power in range(10, 24)]
NAMESPACES = ("lowbit-a", "lowbit-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29577


@contextmanager
def shaped_link(rate_gbit: float):
    """Two namespaces whose veth pair sends at `rate_gbit` in each direction -> (command prefixes, interface names)."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"):
        raise SystemExit("error: --rate-gbit needs root, ip and tc: run as root, or leave it out to use loopback")
    interfaces = [f"veth-{name}" for name in NAMESPACES]

    def sh(*command: str) -> None:
        subprocess.run(command, check=True)

    try:
        for name in NAMESPACES:
            sh("ip", "netns", "add", name)
        sh("ip", "link", "add", interfaces[0], "netns", NAMESPACES[0], "type", "veth",
           "peer", "name", interfaces[1], "netns", NAMESPACES[1])  # fmt: skip
        for name, interface, address in zip(NAMESPACES, interfaces, ADDRESSES, strict=True):
            inside = ("ip", "netns", "exec", name)
            sh(*inside, "ip", "addr", "add", f"{address}/24", "dev", interface)
            sh(*inside, "ip", "link", "set", interface, "up")
            sh(*inside, "ip", "link", "set", "lo", "up")
            sh(*inside, "tc", "qdisc", "add", "dev", interface, "root", "tbf", "rate", f"{rate_gbit}gbit",
               "burst", "32kb", "latency", "50ms")  # fmt: skip
        yield [("ip", "netns", "exec", name) for name in NAMESPACES], interfaces
    finally:
        for name in NAMESPACES:
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def worker(rank: int, address: str, spec: str, repeats: int) -> None:
    """One rank: time all sizes, exact and compressed in turn; rank 0 prints the rows."""
    dist.init_process_group("gloo", init_method=f"tcp://{address}:{PORT}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    rows = []
    for size in SIZES:
        x = torch.randn(
            size // 2 // 512 or 1, min(512, size // 2), generator=torch.Generator().manual_seed(rank)
        ).bfloat16()
        seconds: dict[str, list[float]] = {"exact": [], spec: []}
        for repeat in range(repeats + 3):
            for name, taken in seconds.items():
                dist.barrier()
                start = time.perf_counter()
                if name == "exact":
                    lowbit.all_reduce(x, spec, algorithm="exact")
                else:
                    lowbit.all_reduce(x, spec, min_bytes=0)
                if repeat >= 3:
                    taken.append(time.perf_counter() - start)
        medians = {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()}
        rows.append({"bytes": size, "exact_ms": medians["exact"], "compressed_ms": medians[spec]})
    if rank == 0:
        print(json.dumps(rows))
    dist.barrier()


def crossover(rows: list[dict]) -> int | None:
    """The smallest size from which compressed is faster at every measured size."""
    best = None
    for row in reversed(rows):
        if row["compressed_ms"] >= row["exact_ms"]:
            break
        best = row["bytes"]
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate-gbit", type=float, help="link rate (default: loopback, unlimited)")
    parser.add_argument("--spec", default="int4:g32")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=2, metavar=("RANK", "ADDRESS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(int(arguments.worker[0]), arguments.worker[1], arguments.spec, arguments.repeats)

    def run(prefixes, interfaces, address) -> list[dict]:
        ranks = [
            subprocess.Popen(
                [*prefix, sys.executable, __file__, "--worker", str(rank), address, "--spec", arguments.spec,
                 "--repeats", str(arguments.repeats)],
                env=os.environ | {"GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE, text=True,
            )
            for rank, (prefix, interface) in enumerate(zip(prefixes, interfaces, strict=True))
        ]  # fmt: skip
        outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
        return json.loads(outputs[0])

    if arguments.rate_gbit:
        with shaped_link(arguments.rate_gbit) as (prefixes, interfaces):
            rows = run(prefixes, interfaces, ADDRESSES[0])
    else:
        rows = run([(), ()], ["lo", "lo"], "127.0.0.1")
    link = f"{arguments.rate_gbit:g} Gbit/s" if arguments.rate_gbit else "loopback"
    show(
        f"bf16 all-reduce, 2 ranks, {link}, median ms; faster from {crossover(rows)} bytes on",
        ["bytes", "exact", arguments.spec, "ratio"],
        [
            [f"{r['bytes']:,}", f"{r['exact_ms']:.3f}", f"{r['compressed_ms']:.3f}",
             f"{r['exact_ms'] / r['compressed_ms']:.2f}x"]
            for r in rows
        ],
    )  # fmt: skip
    save(arguments.json, rows, link=link, ranks=2, spec=arguments.spec, crossover_bytes=crossover(rows))


if __name__ == "__main__":
    main()
