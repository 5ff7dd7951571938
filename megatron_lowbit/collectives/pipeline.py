"""All-reduce in chunks, so that encoding, the network, summing and decoding overlap; bit for bit the unchunked result.

A chunk is some rows of every shard, with a wire of its own. As no quantization group crosses rows, and a sum's order is
that of the ranks, where a message is cut changes nothing. Chunks go from rank to rank directly (isend, irecv): each
pair's bytes cross the link once, with no collective waiting for the slowest pair.

    step      0         1         2         3         4
    scatter   encode 0  encode 1  encode 2  …                    sent at once
    reduce                        sum 0     sum 1     …          AHEAD steps later: by then it is there
    gather                                            decode 0   as much later

All receives are posted before anything is sent: a sender of gloo waits for word that its receiver is ready, and that
word would stand in line behind the data that goes the same way. The first chunk and the last are half as large: the
network idles while the first is encoded, and the processor until the last has come. Where ranks have no processors
to spare, it is as well that they wait now and then: gloo's threads move the bytes meanwhile.

Hazard: buffers of the workspace are in use until the last transfer ended, so every transfer is waited for, also sends.
After an error some are not, which a later all-reduce would take for its own: so the group gets no other,
and keeps these: where a transfer's work is gone, gloo reads nothing more that comes that way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..codecs import fused
from ..codecs.base import Codec
from ..errors import RankError
from .exchange import Workspace, guarded
from .layout import Shards, shard

AHEAD = 2  # chunks on their way while an earlier one is waited for
_interrupted: dict[dist.ProcessGroup, object] = {}  # all-reduces, with what must live on
SCATTER, GATHER = 0x10B17, 0x10B18  # tags of our messages in a group, so that they are not taken for its user's


@dataclass(frozen=True)
class Chunks:
    """Rows of each shard in `count` parts: the first and the last half as large as the others, some maybe empty."""

    shards: Shards
    count: int

    def rows(self, rank: int, chunk: int) -> slice:
        start, stop = self.shards.bounds[rank], self.shards.bounds[rank + 1]
        if self.count == 1:
            return slice(start, stop)
        whole = 2 * self.count - 2  # in halves of a chunk; the first and the last have one
        cut = [min(max(2 * index - 1, 0), whole) for index in (chunk, chunk + 1)]
        return slice(*(start + (stop - start) * halves // whole for halves in cut))

    def shape(self, rank: int, chunk: int) -> tuple[int, int]:
        rows = self.rows(rank, chunk)
        return rows.stop - rows.start, self.shards.features

    def nbytes(self, codec: Codec, rank: int) -> list[int]:
        """Of rank's wires, chunk by chunk."""
        return [codec.wire_nbytes(self.shape(rank, chunk)) for chunk in range(self.count)]


class Exchange:
    """What this rank sends to others and receives from them at once. Wires are uint8, contiguous, maybe empty."""

    def __init__(self, receives: dict[int, torch.Tensor], group: dist.ProcessGroup, tag: int) -> None:
        """receives: rank -> where its wire is to be written. Raises RankError where `staggered` was interrupted."""
        if group in _interrupted:
            raise RankError(
                f"rank {dist.get_rank(group)} was interrupted in an earlier all-reduce of this group, whose transfers "
                "this one would meet: look at the first error, and restart all ranks"
            )
        self.group, self.tag, self._receives, self._works = group, tag, _filled(receives), []
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
                    dist.isend(w, group=self.group, group_dst=rank, tag=self.tag) for rank, w in _filled(sends).items()
                ]
            pairs = [(dist.isend, sends), (dist.irecv, self._receives)]
            steps = [
                dist.P2POp(way, wire, group=self.group, group_peer=rank)
                for way, wires in pairs
                for rank, wire in _filled(wires).items()
            ]
            self._works = dist.batch_isend_irecv(steps) if steps else []
        return []

    def wait(self) -> None:
        """For all that is received; in a batch for what is sent, too."""
        wait(self._works, self.group)


def in_batches(group: dist.ProcessGroup) -> bool:
    """NCCL has no tags and matches transfers by their order: those of an exchange must be one batch."""
    return dist.get_backend(group) == "nccl"


def wait(works: Sequence[dist.Work], group: dist.ProcessGroup) -> None:
    with guarded(group):
        for work in works:
            work.wait()


def one_shot(
    x: torch.Tensor, codec: Codec, count: int, group: dist.ProcessGroup, workspace: Workspace
) -> tuple[torch.Tensor, int]:
    """x contiguous, not empty -> (its sum over the group, bytes sent)."""
    world, me = dist.get_world_size(group), dist.get_rank(group)
    chunks, out, others = Chunks(shard(x.shape, (codec,), 1), count), torch.empty_like(x), _others(me, world)
    source, target = chunks.shards.of_all(x), chunks.shards.of_all(out)
    sizes = chunks.nbytes(codec, 0)
    received = [
        wires.view(world, size)
        for wires, size in zip(_split(workspace, "receive", [world * size for size in sizes], x.device), sizes)
    ]
    exchanges = [Exchange({rank: wires[rank] for rank in others}, group, SCATTER) for wires in received]
    sending = []

    def scatter(chunk: int) -> None:
        own = received[chunk][me]
        if sizes[chunk]:
            codec.encode_rows(source[chunks.rows(0, chunk)], own)
        sending.extend(exchanges[chunk].send(dict.fromkeys(others, own)))

    def reduce(chunk: int) -> None:
        exchanges[chunk].wait()
        if sizes[chunk]:
            codec.reduce_rows(received[chunk], target[chunks.rows(0, chunk)])

    staggered(count, (scatter, reduce), sending, group)
    return out, len(others) * sum(sizes)


def two_step(
    x: torch.Tensor, scatter: Codec, gather: Codec, count: int, group: dist.ProcessGroup, workspace: Workspace
) -> tuple[torch.Tensor, int]:
    """As `one_shot`, with one codec per hop."""
    world, me = dist.get_world_size(group), dist.get_rank(group)
    chunks, out = Chunks(shard(x.shape, (scatter, gather), world), count), torch.empty_like(x)
    source, target = chunks.shards.of_all(x), chunks.shards.of_all(out)
    everyone, others = range(world), _others(me, world)
    sent = {rank: _split(workspace, f"send {rank}", chunks.nbytes(scatter, rank), x.device) for rank in others}
    own = chunks.nbytes(scatter, me)
    received = [
        wires.view(world, size)
        for wires, size in zip(_split(workspace, "receive", [world * size for size in own], x.device), own)
    ]
    summed = {rank: _split(workspace, f"sum {rank}", chunks.nbytes(gather, rank), x.device) for rank in everyone}
    scatters = [Exchange({rank: wires[rank] for rank in others}, group, SCATTER) for wires in received]
    gathers = [Exchange({rank: summed[rank][chunk] for rank in others}, group, GATHER) for chunk in range(count)]
    sending = []

    def start(chunk: int) -> None:
        sends = {rank: sent[rank][chunk] for rank in others}
        for rank, wire in _filled(sends | {me: received[chunk][me]}).items():
            scatter.encode_rows(source[chunks.rows(rank, chunk)], wire)
        sending.extend(scatters[chunk].send(sends))

    def reduce(chunk: int) -> None:
        scatters[chunk].wait()
        wire, shape = summed[me][chunk], chunks.shape(me, chunk)
        if wire.numel():
            scratch = lambda: workspace.floats("sum", shape, x.device)  # noqa: E731
            fused.reduce_encode(scatter, received[chunk], gather, shape, wire, scratch)
        sending.extend(gathers[chunk].send(dict.fromkeys(others, wire)))

    def decode(chunk: int) -> None:
        gathers[chunk].wait()
        for rank, wire in _filled({rank: summed[rank][chunk] for rank in everyone}).items():
            gather.sent_by(rank).reduce_rows(wire.view(1, -1), target[chunks.rows(rank, chunk)])

    staggered(count, (start, reduce, decode), sending, group)
    bytes_sent = sum(sum(chunks.nbytes(scatter, rank)) for rank in others) + len(others) * sum(
        chunks.nbytes(gather, me)
    )
    return out, bytes_sent


def staggered(
    count: int, stages: Sequence[Callable[[int], None]], sending: Sequence[dist.Work], group: dist.ProcessGroup
) -> None:
    """Each stage of each chunk, AHEAD chunks behind the stage before it; then wait for what the stages added to
    `sending`."""
    try:
        for step in range(count + AHEAD * (len(stages) - 1)):
            for number, stage in enumerate(stages):
                if 0 <= (chunk := step - AHEAD * number) < count:
                    stage(chunk)
        wait(sending, group)
    except BaseException:
        _interrupted[group] = stages, sending  # a transfer whose work is gone blocks gloo's connection for good
        raise


def _others(me: int, world: int) -> list[int]:
    """The next rank first: so no rank is everyone's first."""
    return [(me + distance) % world for distance in range(1, world)]


def _filled(wires: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    return {rank: wire for rank, wire in wires.items() if wire.numel()}


def _split(workspace: Workspace, name: str, sizes: list[int], device: torch.device) -> Sequence[torch.Tensor]:
    return workspace.bytes(name, sum(sizes), device).split(sizes)
