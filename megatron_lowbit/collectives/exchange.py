"""Moving bytes between ranks over torch.distributed, and the buffers they move through."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ..errors import RankError
from . import connect

# How long ranks wait for each other to compare settings, after the first time: one that does not come by then is in
# some other collective.
LATER_SECONDS = 60


class Workspace:
    """Named uint8 buffers that grow to the largest size asked for and are then reused."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device], torch.Tensor] = {}

    def bytes(self, name: str, nbytes: int, device: torch.device) -> torch.Tensor:
        """The first `nbytes` of the buffer, contents undefined."""
        buffer = self._buffers.get((name, device))
        if buffer is None or buffer.numel() < nbytes:
            with torch.inference_mode(False):  # an inference tensor could not be written to outside that mode
                buffer = self._buffers[name, device] = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return buffer[:nbytes]

    def floats(self, name: str, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
        """An fp32 tensor of `shape`, contents undefined."""
        return self.bytes(name, 4 * shape[0] * shape[1], device).view(torch.float32).view(shape)


@contextmanager
def guarded(group: dist.ProcessGroup) -> Iterator[None]:
    """Around a collective of torch: its failure becomes a RankError that says what to do."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"rank {dist.get_rank(group)} lost the other ranks of its group of {dist.get_world_size(group)}: one died, "
            "stalled beyond the group's timeout, or passed another shape or spec (LOWBIT_CHECK=1 compares them call by "
            f"call); look at the other ranks' errors and restart them all ({str(error).splitlines()[0]})"
        ) from error


def all_gather(output: torch.Tensor, piece: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Every rank's `piece` (uint8, of one length on all ranks) -> output, in rank order. Raises RankError."""
    if (mesh := connect.mesh(group)) is not None and output.device.type == "cpu":
        world = dist.get_world_size(group)
        return mesh.all_to_all(output.split(piece.numel()) if piece.numel() else [output] * world, [piece] * world)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    with guarded(group):
        gather(output, piece, group=group)


def all_to_all(
    output: torch.Tensor, pieces: torch.Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup
) -> None:
    """pieces: `sent[r]` bytes for each rank r, in order -> output: `received[r]` bytes from each. Raises RankError."""
    if (mesh := connect.mesh(group)) is not None and output.device.type == "cpu":
        return mesh.all_to_all(output.split(received), pieces.split(sent))
    with guarded(group):
        dist.all_to_all_single(output, pieces, received, sent, group=group)


def compare(facts: dict, group: dist.ProcessGroup, first: bool = False, own: dict | None = None) -> list[dict]:
    """Check that no two ranks of `group` hold different JSON-able `facts`; a rank may hold some that others lack.

    first: a rank may still be loading its model. own: JSON-able too, not compared, but told to all. Returns each
    rank's `own`.

    Goes through the process group's store and not through a collective, because a rank that is in another collective
    meanwhile would hang both. Raises RankError, on every rank that compares, naming two ranks and what each of them
    has, or the rank that has not come to compare in time: the store's timeout at first, LATER_SECONDS afterwards.
    """
    ranks, me = dist.get_process_group_ranks(group), dist.get_rank(group)
    store = dist.distributed_c10d._get_default_store()
    prefix = f"megatron_lowbit/{group.group_name}"
    timeout = store.timeout.total_seconds()
    timeout = timeout if first else min(LATER_SECONDS, timeout)
    round_ = store.add(f"{prefix}/{me}", 1)  # counted in the store, which outlives a group that is made anew
    keys = [f"{prefix}/{round_}/{rank}" for rank in range(len(ranks))]
    store.set(keys[me], json.dumps([facts, own or {}], sort_keys=True))
    deadline, everyone = time.monotonic() + timeout, []
    for rank, key in enumerate(keys):
        try:
            store.wait([key], datetime.timedelta(seconds=max(0.1, deadline - time.monotonic())))
            told = json.loads(store.get(key))
            everyone.append(told if isinstance(told, list) else [told, {}])  # as releases before 3 of the protocol did
        except RuntimeError as error:
            raise RankError(
                f"rank {rank} of the group (global rank {ranks[rank]}) did not come to compare settings within "
                f"{timeout:g} s; this rank has {facts}: call with the same settings on every rank, and look whether "
                "that rank is alive"
            ) from error
    compared = [theirs for theirs, _ in everyone]
    for key in sorted(set().union(*compared)):
        (one, its), *others = [(rank, theirs[key]) for rank, theirs in enumerate(compared) if key in theirs]
        for other, theirs in others:
            if its != theirs:
                _wait_for_readers(store, keys, me)
                raise RankError(
                    f"ranks disagree on {key}: rank {one} has {its!r}, rank {other} has {theirs!r}; start every rank "
                    f"with the same setting (this is rank {me})"
                )
    return [own for _, own in everyone]


def _wait_for_readers(store: dist.Store, keys: list[str], me: int) -> None:
    """Before a rank raises, and perhaps ends with the store in its process, let the others read why."""
    try:
        store.set(f"{keys[me]}/read", "")
        store.wait([f"{key}/read" for key in keys], datetime.timedelta(seconds=5))
    except RuntimeError:
        pass  # somebody is gone already: nothing to wait for
