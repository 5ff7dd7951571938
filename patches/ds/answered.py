"""Collectives in the middle of DeepSpeed's forwards: answered by us while one of ours runs.

DeepSpeed calls them as attributes of `deepspeed.comm`, so the attribute is what is replaced, for one forward.

Hazard: it is the process's, not a thread's, so two threads must not run such layers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import deepspeed.comm
import torch
import torch.distributed as dist

from megatron_lowbit.communicator import communicator
from megatron_lowbit.config import CommConfig
from megatron_lowbit.errors import ModelError


@contextmanager
def answered(name: str, answer: Callable) -> Iterator[None]:
    """`deepspeed.comm.NAME` is `answer` while it lasts."""
    original = getattr(deepspeed.comm, name)
    setattr(deepspeed.comm, name, answer)
    try:
        yield
    finally:
        setattr(deepspeed.comm, name, original)


class Sums:
    """In place of `deepspeed.comm.all_reduce`: the sums that one forward is known to make, a site for each."""

    def __init__(self, config: CommConfig, sites: Sequence[str]) -> None:
        self._config, self._sites, self._made = config, sites, 0

    def __call__(
        self, tensor: torch.Tensor, op: object = dist.ReduceOp.SUM, group: dist.ProcessGroup | None = None, **_
    ) -> None:
        """Sum `tensor`, in place as DeepSpeed does."""
        if self._made == len(self._sites):
            self._differs("more sums")
        self._made += 1
        tensor.copy_(communicator(group, self._config).all_reduce(tensor, self._sites[self._made - 1]))

    def verify(self) -> None:
        """Raise ModelError unless there were as many sums as sites."""
        if self._made < len(self._sites):
            self._differs("fewer sums")

    def _differs(self, what: str) -> None:
        raise ModelError(
            f"a layer of this DeepSpeed makes {what} than {', '.join(self._sites)}: it is not one of 0.16 to 0.19, "
            "whose layers this patch knows; disable it for this model"
        )
