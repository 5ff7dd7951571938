"""What enabling costs on a sharded model of 32 layers, with DeepSpeed and with Transformers: once, and per sum.

Two gloo ranks, a narrow random Llama. Once: milliseconds to enable and to disable 64 sites. Per sum: a decoding step,
[1, 1, hidden], is run in turns by the framework alone and with the patch told to sum exactly. Of both is taken away
what passes within torch.distributed.all_reduce, which varies by more than all else takes; the difference of the medians
is spread over the 64 sums. Afterwards every layer is of the class that it was, which is asserted.

    python benchmarks/enabling.py --json benchmarks/results/enabling.json
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from common import save, show

import megatron_lowbit as lowbit

LAYERS, HIDDEN = 32, 64


def worker(rank: int, port: int, repeats: int, folder: str) -> list[dict]:
    """One rank: the rows of the table."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    return [measure(name, load(folder), repeats) for name, load in FRAMEWORKS.items()]


def measure(framework: str, model: torch.nn.Module, repeats: int) -> dict:
    enable = getattr(lowbit.patches, framework).enable
    kinds = [type(module) for module in model.modules()]
    compressed, exact = lowbit.CommConfig("int8:g128", min_bytes=0), lowbit.CommConfig(algorithm="exact")
    enabling, disabling = [], []
    for _ in range(5):
        start = time.perf_counter()
        handle = enable(model, compressed)
        enabled = time.perf_counter()
        handle.disable()
        enabling.append(enabled - start)
        disabling.append(time.perf_counter() - enabled)
    assert kinds == [type(module) for module in model.modules()], "disabling must put the original classes back"
    ids, alone, patched = torch.zeros(1, 1, dtype=torch.int64), [], []
    clock = Clock(lambda: model(input_ids=ids, use_cache=False))
    for _ in range(repeats):
        alone.append(clock.seconds())
        with enable(model, exact):
            patched.append(clock.seconds())
    return {
        "framework": framework,
        "layers": LAYERS,
        "sites": len(handle.sites),
        "enable_ms": 1e3 * statistics.median(enabling),
        "disable_ms": 1e3 * statistics.median(disabling),
        "step_ms": 1e3 * statistics.median(alone),
        "patch_us_per_sum": 1e6 * (statistics.median(patched) - statistics.median(alone)) / len(handle.sites),
    }


class Clock:
    """Seconds of a step outside of torch.distributed.all_reduce, which both the frameworks and the patch call."""

    def __init__(self, step: Callable[[], object]) -> None:
        self._step, self._within = step, 0.0

    def seconds(self) -> float:
        self._step()  # what the first step after a change prepares
        original, dist.all_reduce, self._within = dist.all_reduce, self._all_reduce(dist.all_reduce), 0.0
        try:
            dist.barrier()
            start = time.perf_counter()
            self._step()
            return time.perf_counter() - start - self._within
        finally:
            dist.all_reduce = original

    def _all_reduce(self, original: Callable) -> Callable:
        def all_reduce(*args, **kwargs):
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self._within += time.perf_counter() - start

        return all_reduce


def with_deepspeed(folder: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return lowbit.patches.deepspeed.init_inference(AutoModelForCausalLM.from_pretrained(folder), 2, None).module


def with_transformers(folder: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))


FRAMEWORKS = {"deepspeed": with_deepspeed, "transformers": with_transformers}


def write_model(folder: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=LAYERS, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_attention_heads=4, vocab_size=64
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        rank, port, folder = arguments.worker
        print(json.dumps(worker(int(rank), int(port), arguments.repeats, folder)))
        dist.barrier()
        dist.destroy_process_group()
        return
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        write_model(folder)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        command = [sys.executable, __file__, "--repeats", str(arguments.repeats), "--worker"]
        environ = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen([*command, str(rank), str(port), folder], env=environ, stdout=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        printed = [rank.communicate(timeout=600)[0] for rank in ranks]
    rows = json.loads(printed[0].splitlines()[-1])
    show(
        f"a Llama of {LAYERS} layers, hidden size {HIDDEN}, 2 ranks, medians",
        ["framework", "sites", "enable, ms", "disable, ms", "a step but for sums, ms", "the patch, µs a sum"],
        [
            [r["framework"], str(r["sites"]), f"{r['enable_ms']:.1f}", f"{r['disable_ms']:.1f}", f"{r['step_ms']:.1f}",
             f"{r['patch_us_per_sum']:.1f}"]
            for r in rows
        ],
    )  # fmt: skip
    versions = {name: version(name) for name in FRAMEWORKS}
    save(arguments.json, rows, ranks=2, repeats=arguments.repeats, **versions)


if __name__ == "__main__":
    main()
