"""Tensor-parallel process groups for `init_inference`, where DeepSpeed has one per process.

DeepSpeed makes the group of ranks 0 to tp_size - 1 for the first engine and keeps it in a class attribute: a second
engine of another tp_size gets the first one's group, and ranks from tp_size on are in no group. Here every tp_size has
its groups of neighbouring ranks, of which this rank's is what the engine finds.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.inference.engine import InferenceEngine

from megatron_lowbit.errors import ConfigError
from megatron_lowbit.patches._replacements import Replacements

from .shared_memory import without_shared_memory

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[int, dist.ProcessGroup]] = weakref.WeakKeyDictionary()


@contextmanager
def tensor_parallel_group(tp_size: int) -> Iterator[None]:
    """An engine that is made in here gets this rank's group of tp_size ranks. A collective call of all ranks.

    Starts DeepSpeed's communication unless it runs. Raises ConfigError if tp_size does not divide the ranks.
    """
    _start(tp_size)
    world = dist.get_world_size()
    if world % tp_size:
        raise ConfigError(
            f"tp_size={tp_size} does not divide the {world} rank{'s' if world > 1 else ''} of this job: start it with "
            f"a multiple of {tp_size}, as in 'torchrun --nproc-per-node {tp_size} SCRIPT', or give another tp_size"
        )
    held = Replacements()
    held.set(InferenceEngine, "inference_mp_group", _group(tp_size))
    try:
        yield
    finally:
        held.undo()


def _start(tp_size: int) -> None:
    if not dist.is_initialized() and (missing := [name for name in _LAUNCHED if name not in os.environ]):
        raise ConfigError(
            f"torch.distributed is not initialised and {missing[0]} is not set: start the program with "
            f"'torchrun --nproc-per-node {tp_size} SCRIPT' or 'deepspeed --num_gpus {tp_size} SCRIPT', or call "
            "torch.distributed.init_process_group first"
        )
    if not deepspeed.comm.is_initialized():
        with without_shared_memory():
            deepspeed.init_distributed(auto_mpi_discovery=False)
    if "LOCAL_RANK" in os.environ:  # as DeepSpeed does where it makes its group
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))


def _group(tp_size: int) -> dist.ProcessGroup:
    known = _groups.setdefault(dist.group.WORLD, {})
    if tp_size not in known:
        for first in range(0, dist.get_world_size(), tp_size):
            ranks = range(first, first + tp_size)
            group = dist.new_group(list(ranks))
            if dist.get_rank() in ranks:
                known[tp_size] = group
    return known[tp_size]
