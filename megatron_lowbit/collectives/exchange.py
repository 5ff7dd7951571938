"""Moving bytes between ranks over torch.distributed, and the buffers they move through."""

from __future__ import annotations

import datetime
import json
import time

import torch
import torch.distributed as dist

from ..errors import RankError


class Workspace:
    """Named uint8 buffers that grow to the largest size asked for and are then reused."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device], torch.Tensor] = {}

    def bytes(self, name: str, nbytes: int, device: torch.device) -> torch.Tensor:
        """The first `nbytes` of the buffer, contents undefined."""
        buffer = self._buffers.get((name, device))
        if buffer is None or buffer.numel() < nbytes:
            buffer = self._buffers[name, device] = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return buffer[:nbytes]

    def floats(self, name: str, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
        """An fp32 tensor of `shape`, contents undefined."""
        return self.bytes(name, 4 * shape[0] * shape[1], device).view(torch.float32).view(shape)


def all_gather(output: torch.Tensor, piece: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Every rank's `piece` (uint8, of one length on all ranks) -> output, in rank order."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    gather(output, piece, group=group)


def all_to_all(
    output: torch.Tensor, pieces: torch.Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup
) -> None:
    """pieces: `sent[r]` bytes for each rank r, in order -> output: `received[r]` bytes from each."""
    dist.all_to_all_single(output, pieces, received, sent, group=group)


def compare(facts: dict, group: dist.ProcessGroup, round_: int, timeout: float) -> None:
    """Check that all ranks of `group` hold the same JSON-able `facts`. `round_` counts the comparisons of this group.

    Goes through the process group's store and not through a collective, because a rank that is in another collective
    meanwhile would hang both. Raises RankError, on every rank that compares, naming two ranks and what each of them
    has, or the rank that has not come to compare within `timeout` seconds.
    """
    ranks, me = dist.get_process_group_ranks(group), dist.get_rank(group)
    store = dist.distributed_c10d._get_default_store()
    keys = [f"megatron_lowbit/{group.group_name}/{round_}/{rank}" for rank in range(len(ranks))]
    store.set(keys[me], json.dumps(facts, sort_keys=True))
    deadline, everyone = time.monotonic() + timeout, []
    for rank, key in enumerate(keys):
        try:
            store.wait([key], datetime.timedelta(seconds=max(0.1, deadline - time.monotonic())))
        except RuntimeError as error:
            raise RankError(
                f"rank {rank} of the group (global rank {ranks[rank]}) did not come to compare settings within "
                f"{timeout:g} s; this rank has {facts}: call with the same settings on every rank, and look whether "
                "that rank is alive"
            ) from error
        everyone.append(json.loads(store.get(key)))
    for other, theirs in enumerate(everyone):
        for key in sorted(everyone[0].keys() | theirs.keys()):
            if everyone[0].get(key) != theirs.get(key):
                raise RankError(
                    f"ranks disagree on {key}: rank 0 has {everyone[0].get(key)!r}, rank {other} has "
                    f"{theirs.get(key)!r}; start every rank with the same setting (this is rank {me})"
                )
