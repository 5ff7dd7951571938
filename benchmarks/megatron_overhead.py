"""What the Megatron-Core patch adds to a call of RowParallelLinear beyond the collective: microseconds, two gloo ranks.

A decoding step's message, [1, 1, hidden], so that nothing hides it. Calls and, within them, products and exchanges are
timed together: what is left of a call is Python, and the patch's is what it has left more than the base layer. Once it
is disabled the original function is back, which is asserted.

    python benchmarks/megatron_overhead.py --json benchmarks/results/megatron_overhead.json
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from common import save, show

import megatron_lowbit as lowbit

HIDDEN, SPEC = 256, "int4:g32"


def worker(rank: int, port: int, repeats: int) -> list[dict]:
    """One rank: the rows of the table."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    from megatron.core.tensor_parallel import layers

    from megatron_lowbit.communicator import Communicator
    from megatron_lowbit.engines.megatron import init_tensor_parallel
    from megatron_lowbit.patches import megatron_core, megatron_cpu

    megatron_cpu.enable()
    init_tensor_parallel(2)
    config = lowbit.CommConfig(SPEC, min_bytes=0)
    alone = [dist.new_group([peer]) for peer in range(2)][rank]
    pair, single = build(None), build(alone)
    x, whole = torch.randn(1, 1, HIDDEN // 2), torch.randn(1, 1, HIDDEN)
    original, rows = layers.RowParallelLinear.forward, []
    inner = Stopwatch()  # what is not Python around it: the product and the exchange
    for layer in (pair, single):
        layer._forward_impl = inner.timed(layer._forward_impl)
    layers.reduce_from_tensor_model_parallel_region = inner.timed(layers.reduce_from_tensor_model_parallel_region)
    Communicator.all_reduce = inner.timed(Communicator.all_reduce)

    with torch.no_grad():
        base, base_one = inner.measure(lambda: pair(x), repeats), inner.measure(lambda: single(whole), repeats)
        for route, model in (("one model", torch.nn.ModuleList([pair, single])), ("process-wide", None)):
            with megatron_core.enable(config, model) as handle:
                for site in range(160 if model is None else 0):  # as a model of 80 layers has
                    handle.count(f"layers.{site // 2}.{('attention', 'mlp')[site % 2]}")
                ours, ours_one = inner.measure(lambda: pair(x), repeats), inner.measure(lambda: single(whole), repeats)
            assert layers.RowParallelLinear.forward is original, "disabling must put the original function back"
            rows.append(
                {
                    "route": route,
                    "base_us": base["total"],
                    "compressed_us": ours["total"],
                    "patch_us": ours["outside"] - base["outside"],
                    "patch_one_rank_us": ours_one["outside"] - base_one["outside"],
                    "original_is_back": True,
                }
            )
    return rows


class Stopwatch:
    """Microseconds of calls, in total and outside of the functions that were `timed`."""

    def __init__(self) -> None:
        self.inside = 0.0

    def timed(self, function: Callable) -> Callable:
        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside += time.perf_counter() - start

        return call

    def measure(self, call: Callable[[], object], repeats: int) -> dict[str, float]:
        """Medians of `repeats` calls; ranks start every twentieth together."""
        total, outside = [], []
        for repeat in range(repeats + 20):
            if repeat % 20 == 0:
                dist.barrier()
            self.inside, start = 0.0, time.perf_counter()
            call()
            taken = time.perf_counter() - start
            if repeat >= 20:
                total.append(taken)
                outside.append(taken - self.inside)
        return {"total": 1e6 * statistics.median(total), "outside": 1e6 * statistics.median(outside)}


def build(group: dist.ProcessGroup | None) -> torch.nn.Module:
    from megatron.core.tensor_parallel.layers import RowParallelLinear
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=4, tensor_model_parallel_size=2,
        use_cpu_initialization=True,
    )  # fmt: skip
    options = {"bias": False, "input_is_parallel": True, "skip_bias_add": False}
    return RowParallelLinear(
        HIDDEN, HIDDEN, config=config, init_method=torch.nn.init.xavier_normal_, tp_group=group, **options
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        rank, port = arguments.worker
        print(json.dumps(worker(rank, port, arguments.repeats)))
        dist.barrier()
        dist.destroy_process_group()
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", str(rank), str(port), "--repeats", str(arguments.repeats)],
            env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    printed = [rank.communicate(timeout=600)[0] for rank in ranks]
    rows = json.loads(printed[0].splitlines()[-1])
    show(
        f"a call of RowParallelLinear, [1, 1, {HIDDEN}], {SPEC}, 2 ranks, median microseconds",
        ["enabled for", "base", "compressed", "of that the patch", "the patch, on one rank"],
        [
            [r["route"], *(f"{r[key]:.1f}" for key in ("base_us", "compressed_us", "patch_us", "patch_one_rank_us"))]
            for r in rows
        ],
    )
    facts = {"ranks": 2, "spec": SPEC, "shape": [1, 1, HIDDEN], "repeats": arguments.repeats}
    save(arguments.json, rows, megatron_core=version("megatron-core"), **facts)


if __name__ == "__main__":
    main()
