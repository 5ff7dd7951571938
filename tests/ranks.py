"""Real ranks for the tests: one process each, joined by gloo over loopback."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

_context = multiprocessing.get_context("forkserver")  # imports torch once, then forks ranks in milliseconds
_context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "megatron_lowbit.simulate", "numba"])


def run_ranks(world: int, function: Callable, *args, timeout: float = 120, dead: tuple[int, ...] = ()) -> list:
    """Run function(rank, world, *args) on `world` ranks inside an initialised gloo group -> results by rank.

    `function` is a module-level function; results are tensors, numbers, strings, lists and dicts of them. A rank that
    raises or outlives `timeout` fails the test. `dead`: ranks expected to exit without a result (None is returned).
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _context.Process(target=_main, args=(rank, world, folder, function, args, timeout), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        stuck = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        assert not stuck, f"ranks {stuck} still ran after {timeout} s"
        errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        assert not errors, "\n".join(errors)
        return [
            None if rank in dead else torch.load(f"{folder}/{rank}.result", weights_only=True) for rank in range(world)
        ]


def _main(rank: int, world: int, folder: str, function: Callable, args: tuple, timeout: float) -> None:
    import torch.distributed as dist

    try:
        torch.set_num_threads(1)
        os.environ.update(GLOO_SOCKET_IFNAME="lo", RANK=str(rank), WORLD_SIZE=str(world))
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=timeout),
        )
        torch.save(function(rank, world, *args), f"{folder}/{rank}.result")
        dist.barrier()  # nobody hangs up while a slower rank still needs it
        dist.destroy_process_group()
    except BaseException:
        Path(f"{folder}/{rank}.error").write_text(f"rank {rank} of {world}:\n{traceback.format_exc()}")
        os._exit(1)
