"""From rank to rank: over a group's own connections (sockets.py) where it has them, else by torch's isend and irecv.

Hazard: memory is in use until the last transfer ended, so every one is waited for, also sends. After an error some are
not, which a later collective would take for its own. So the group gets no other; `whole` sees to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist

from ..errors import RankError
from . import connect, sockets
from .exchange import guarded

SCATTER, GATHER = 0x10B17, 0x10B18  # tags of our messages in a group, so that they are not taken for its user's
_interrupted: dict[dist.ProcessGroup, object] = {}  # collectives, with what must live on


def exchange(receives: dict[int, torch.Tensor], group: dist.ProcessGroup, tag: int) -> sockets.Exchange | Exchange:
    """What this rank sends to others and receives from them at once; all ranks call it in the same order.

    receives: rank -> where its wire is to be written: uint8, contiguous, maybe empty. Raises RankError where a
    collective of this group was interrupted.
    """
    if (mesh := connect.mesh(group)) is not None and all(wire.is_cpu for wire in receives.values()):
        return mesh.exchange(receives)
    return Exchange(receives, group, tag)


@contextmanager
def whole(group: dist.ProcessGroup, kept: object = None) -> Iterator[None]:
    """Around a collective: if it is interrupted, its group has no more. kept: what torch's transfers may still write
    to; without their works gloo reads nothing more that comes that way."""
    mesh = connect.mesh(group)
    try:
        with mesh.whole() if mesh else nullcontext():
            yield
    except BaseException:
        _interrupted[group] = kept
        raise


class Exchange:
    """By torch.distributed: what this rank sends to others and receives from them at once."""

    def __init__(self, receives: dict[int, torch.Tensor], group: dist.ProcessGroup, tag: int) -> None:
        if group in _interrupted:
            raise RankError(
                f"rank {dist.get_rank(group)} was interrupted in an earlier collective of this group, whose transfers "
                "this one would meet: look at the first error, and restart all ranks"
            )
        self.group, self.tag, self._receives, self._works = group, tag, filled(receives), []
        self._together = in_batches(group)
        if not self._together:
            with guarded(group):
                self._works = [
                    dist.irecv(w, group=group, group_src=rank, tag=tag) for rank, w in self._receives.items()
                ]

    def send(self, sends: dict[int, torch.Tensor]) -> list[dist.Work]:
        """rank -> its wire. Returns what must be waited for before these are written to again."""
        with guarded(self.group):
            if not self._together:
                return [
                    dist.isend(w, group=self.group, group_dst=rank, tag=self.tag) for rank, w in filled(sends).items()
                ]
            pairs = [(dist.isend, sends), (dist.irecv, self._receives)]
            steps = [
                dist.P2POp(way, wire, group=self.group, group_peer=rank)
                for way, wires in pairs
                for rank, wire in filled(wires).items()
            ]
            self._works = dist.batch_isend_irecv(steps) if steps else []
        return []

    def wait(self) -> None:
        """For all that is received; in a batch for what is sent, too."""
        wait(self._works, self.group)


def in_batches(group: dist.ProcessGroup) -> bool:
    """NCCL has no tags and matches transfers by their order: those of an exchange must be one batch."""
    return dist.get_backend(group) == "nccl"


def wait(works: Iterable[dist.Work | sockets.Mesh], group: dist.ProcessGroup) -> None:
    with guarded(group):
        for work in works:
            work.wait()


def filled(wires: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Those that are not empty."""
    return {rank: wire for rank, wire in wires.items() if wire.numel()}


def others(me: int, world: int) -> Sequence[int]:
    """The next rank first: so no rank is everyone's first."""
    return [(me + distance) % world for distance in range(1, world)]
