"""All-reduce in chunks, so that encoding, the network, summing and decoding overlap; bit for bit the unchunked result.

A chunk is some rows of every shard, with a wire of its own. As no quantization group crosses rows, and a sum's order is
that of the ranks, where a message is cut changes nothing. Chunks go from rank to rank directly (isend, irecv): each
pair's bytes cross the link once, with no collective waiting for the slowest pair.

    step      0         1         2         3         4
    scatter   encode 0  encode 1  encode 2  …                    sent at once
    reduce                        sum 0     sum 1     …          AHEAD steps later: by then it is there
    gather                                            decode 0   as much later

Hazard: buffers of the workspace are in use until the last transfer ended, so every transfer is waited for, also sends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..codecs import fused
from ..codecs.base import Codec
from .exchange import Workspace, guarded
from .layout import Shards, shard

AHEAD = 2  # chunks on their way while an earlier one is waited for
TAG = 0x10B17  # of our messages in a group, so that they are not taken for its user's


@dataclass(frozen=True)
class Chunks:
    """Rows of each shard in `count` parts, the same number for all shards; some may be empty."""

    shards: Shards
    count: int

    def rows(self, rank: int, chunk: int) -> slice:
        start, stop = self.shards.bounds[rank], self.shards.bounds[rank + 1]
        cut = [start + (stop - start) * index // self.count for index in (chunk, chunk + 1)]
        return slice(*cut)

    def shape(self, rank: int, chunk: int) -> tuple[int, int]:
        rows = self.rows(rank, chunk)
        return rows.stop - rows.start, self.shards.features

    def nbytes(self, codec: Codec, rank: int) -> list[int]:
        """Of rank's wires, chunk by chunk."""
        return [codec.wire_nbytes(self.shape(rank, chunk)) for chunk in range(self.count)]


class Transfers:
    """Sends and receives of this rank that have not been waited for.

    Hazard: each is a call of its own, as gloo takes them. NCCL would want those of a step in one batch.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.sent, self._sends = group, 0, []

    def start(self, sends: dict[int, torch.Tensor], receives: dict[int, torch.Tensor]) -> list[dist.Work]:
        """rank -> uint8, maybe empty, contiguous. Returns the receives, to be waited for."""
        self.sent += sum(wire.numel() for wire in sends.values())
        with guarded(self.group):
            works = [
                dist.irecv(wire, group=self.group, group_src=rank, tag=TAG)
                for rank, wire in receives.items()
                if wire.numel()
            ]
            self._sends += [
                dist.isend(wire, group=self.group, group_dst=rank, tag=TAG)
                for rank, wire in sends.items()
                if wire.numel()
            ]
        return works

    def wait(self, works: Sequence[dist.Work]) -> None:
        with guarded(self.group):
            for work in works:
                work.wait()

    def finish(self) -> None:
        self.wait(self._sends)
        self._sends.clear()


def one_shot(
    x: torch.Tensor, codec: Codec, count: int, group: dist.ProcessGroup, workspace: Workspace
) -> tuple[torch.Tensor, int]:
    """x contiguous, not empty -> (its sum over the group, bytes sent)."""
    world, me, transfers = dist.get_world_size(group), dist.get_rank(group), Transfers(group)
    chunks = Chunks(shard(x.shape, (codec,), 1), count)
    out = torch.empty_like(x)
    source, target = chunks.shards.of_all(x), chunks.shards.of_all(out)
    sizes = chunks.nbytes(codec, 0)
    wires = workspace.bytes("receive", world * sum(sizes), x.device).split([world * size for size in sizes])
    works = {}

    def scatter(chunk: int) -> None:
        if sizes[chunk]:
            received = wires[chunk].view(world, -1)
            codec.encode_rows(source[chunks.rows(0, chunk)], received[me])
            others = {rank: received[rank] for rank in _others(me, world)}
            works[chunk] = transfers.start(dict.fromkeys(others, received[me]), others)

    def reduce(chunk: int) -> None:
        if sizes[chunk]:
            transfers.wait(works.pop(chunk))
            codec.reduce_rows(wires[chunk].view(world, -1), target[chunks.rows(0, chunk)])

    _run(count, (scatter, reduce))
    transfers.finish()
    return out, transfers.sent


def two_step(
    x: torch.Tensor, scatter: Codec, gather: Codec, count: int, group: dist.ProcessGroup, workspace: Workspace
) -> tuple[torch.Tensor, int]:
    """As `one_shot`, with one codec per hop."""
    world, me, transfers = dist.get_world_size(group), dist.get_rank(group), Transfers(group)
    chunks, out = Chunks(shard(x.shape, (scatter, gather), world), count), torch.empty_like(x)
    source, target = chunks.shards.of_all(x), chunks.shards.of_all(out)
    everyone, others = range(world), _others(me, world)
    sent = {rank: _split(workspace, f"send {rank}", chunks.nbytes(scatter, rank), x.device) for rank in others}
    own = chunks.nbytes(scatter, me)
    received = workspace.bytes("receive", world * sum(own), x.device).split([world * size for size in own])
    summed = {rank: _split(workspace, f"sum {rank}", chunks.nbytes(gather, rank), x.device) for rank in everyone}
    works = {}

    def start(chunk: int) -> None:
        wires = received[chunk].view(world, own[chunk])
        sends = {rank: sent[rank][chunk] for rank in others}
        for rank, wire in (sends | {me: wires[me]}).items():
            if wire.numel():
                scatter.encode_rows(source[chunks.rows(rank, chunk)], wire)
        works["scatter", chunk] = transfers.start(sends, {rank: wires[rank] for rank in others})

    def reduce(chunk: int) -> None:
        transfers.wait(works.pop(("scatter", chunk)))
        wires, wire, shape = received[chunk].view(world, own[chunk]), summed[me][chunk], chunks.shape(me, chunk)
        if wire.numel():
            scratch = lambda: workspace.floats("sum", shape, x.device)  # noqa: E731
            fused.reduce_encode(scatter, wires, gather, shape, wire, scratch)
        receives = {rank: summed[rank][chunk] for rank in others}
        works["gather", chunk] = transfers.start(dict.fromkeys(others, wire), receives)

    def decode(chunk: int) -> None:
        transfers.wait(works.pop(("gather", chunk)))
        for rank in everyone:
            if (wire := summed[rank][chunk]).numel():
                gather.sent_by(rank).reduce_rows(wire.view(1, -1), target[chunks.rows(rank, chunk)])

    _run(count, (start, reduce, decode))
    transfers.finish()
    return out, transfers.sent


def _run(count: int, stages: Sequence[Callable[[int], None]]) -> None:
    """Each stage of each chunk, AHEAD chunks behind the stage before."""
    for step in range(count + AHEAD * (len(stages) - 1)):
        for number, stage in enumerate(stages):
            if 0 <= (chunk := step - AHEAD * number) < count:
                stage(chunk)


def _others(me: int, world: int) -> list[int]:
    """The next rank first: so no rank is everyone's first."""
    return [(me + distance) % world for distance in range(1, world)]


def _split(workspace: Workspace, name: str, sizes: list[int], device: torch.device) -> Sequence[torch.Tensor]:
    return workspace.bytes(name, sum(sizes), device).split(sizes)
