"""Starting one process per rank on this machine, with torch's elastic launcher, unless a launcher already did."""

from __future__ import annotations

import datetime
import logging
import os
import signal
import sys
from contextlib import contextmanager

from ..errors import ConfigError, RankError

# Ctrl-C reaches the whole process group, and the launcher passes it on: a rank ends at once, without a traceback of its
# own. One that ignored it would be waited for, for 30 s.
RANK = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
from megatron_lowbit.__main__ import main
sys.exit(main())
"""


def world_size() -> int | None:
    """How many ranks the surrounding launcher started; None outside of one."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return None
    if not (os.environ["RANK"].isdecimal() and os.environ["WORLD_SIZE"].isdecimal()):
        raise ConfigError(
            f"RANK={os.environ['RANK']!r} and WORLD_SIZE={os.environ['WORLD_SIZE']!r} are no numbers: start with "
            "torchrun, or unset them"
        )
    return int(os.environ["WORLD_SIZE"])


def start_ranks(ranks: int, argv: list[str], debug: bool) -> int:
    """Run `python -m megatron_lowbit argv…` once per rank -> exit code. Ranks write to this terminal themselves.

    A failing rank ends the others. Raises RankError for one that was killed by a signal.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if not debug:
        logging.disable(logging.CRITICAL)  # of this process, which only waits; the ranks speak for themselves
    threads = max(1, (os.cpu_count() or 1) // ranks)
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    if not debug:
        environment |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error"}
    os.environ.update(environment)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=f"lowbit-{os.getpid()}",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-c", RANK, *argv)
    except SignalException:  # Ctrl-C, or a request to end; the launcher has ended the ranks
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == -signal.SIGINT:  # seen before the launcher's own
            raise KeyboardInterrupt from None
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise RankError(
                f"rank {rank} was killed by {name}; if the kernel did it for want of memory, use more ranks "
                "or a smaller model"
            ) from None
        return failure.exitcode
    return 0


@contextmanager
def process_group(ranks: int, timeout: float):
    """torch.distributed over the launcher's ranks: NCCL with CUDA, else gloo. `timeout`: seconds until a silent peer is
    given up. Raises ConfigError if the launcher started another number of ranks, RankError if they do not meet."""
    import torch
    import torch.distributed as dist

    if (started := world_size()) != ranks:
        raise ConfigError(
            f"--tp is {ranks}, but the launcher started {started} ranks: start {ranks}, or give --tp {started}"
        )
    cuda, local_rank = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {local_rank} has no GPU, this machine has {torch.cuda.device_count()}: start one rank per "
                "GPU, or hide them (CUDA_VISIBLE_DEVICES=) to run on the CPU"
            )
        torch.cuda.set_device(local_rank)
    try:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=timeout))
    except RuntimeError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '')}"
        raise RankError(
            f"rank {os.environ['RANK']} did not meet all {ranks} ranks at {address} within {timeout:g} s: look "
            "whether all were started, and whether this address and port are open from every machine "
            f"({str(error).splitlines()[0]})"
        ) from error
    yield
    dist.destroy_process_group()  # not after an error: the others may never come
