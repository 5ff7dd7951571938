"""How fast the links of a group are: what its own exact all-reduce reaches, the same number on every rank."""

from __future__ import annotations

import time
import weakref

import torch
import torch.distributed as dist

from .exchange import guarded

SIZES = (1 << 18, 1 << 21, 1 << 24)  # bytes: the first that takes long enough to be mostly transfer, else the last
SECONDS = 0.02
REPEATS = 3
_known: weakref.WeakKeyDictionary[dist.ProcessGroup, float] = weakref.WeakKeyDictionary()


def gbit_per_second(group: dist.ProcessGroup) -> float:
    """Of the slowest rank: bits it sends in a ring, over time. A collective call, the first time: of 0.2 to 0.5 s."""
    if group not in _known:
        _known[group] = _measured(group)
    return _known[group]


def _measured(group: dist.ProcessGroup) -> float:
    world = dist.get_world_size(group)
    for size in SIZES:
        best, values = float("inf"), torch.zeros(size // 2, dtype=torch.bfloat16)
        for _ in range(REPEATS):
            with guarded(group):
                dist.barrier(group)
                start = time.perf_counter()
                dist.all_reduce(values, group=group)
                taken = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
                dist.all_reduce(taken, op=dist.ReduceOp.MAX, group=group)
            best = min(best, taken.item())
        if best >= SECONDS:
            break
    return 2 * (world - 1) / world * size * 8e-9 / best
