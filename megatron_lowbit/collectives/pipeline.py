"""All-reduce in chunks, so that encoding, the network, summing and decoding overlap; bit for bit the unchunked result.

A chunk is some rows of every shard, with a wire of its own. As no quantization group crosses rows, and a sum's order is
that of the ranks, where a message is cut changes nothing. Chunks go from rank to rank directly (transfers.py): each
pair's bytes cross the link once, with no collective waiting for the slowest pair.

    step      0         1         2         3         4
    scatter   encode 0  encode 1  encode 2  …                    sent at once
    reduce                        sum 0     sum 1     …          AHEAD steps later: by then it is there
    gather                                            decode 0   as much later

All receives are posted before anything is sent: a sender of gloo waits for word that its receiver is ready, and that
word would stand in line behind the data that goes the same way. The first chunk and the last are half as large: the
network idles while the first is encoded, and the processor until the last has come.

Hazard: buffers of the workspace are in use until the last transfer ended, so every transfer is waited for, also sends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..codecs import fused
from ..codecs.base import Codec
from . import results
from .exchange import Workspace
from .layout import Shards, shard
from .transfers import GATHER, SCATTER, exchange, filled, others, wait, whole

AHEAD = 2  # chunks on their way while an earlier one is waited for


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


def one_shot(
    x: torch.Tensor, codec: Codec, count: int, group: dist.ProcessGroup, workspace: Workspace
) -> tuple[torch.Tensor, int]:
    """x contiguous, not empty -> (its sum over the group, bytes sent)."""
    world, me = dist.get_world_size(group), dist.get_rank(group)
    chunks, out, peers = Chunks(shard(x.shape, (codec,), 1), count), results.empty_like(x), others(me, world)
    source, target = chunks.shards.of_all(x), chunks.shards.of_all(out)
    sizes = chunks.nbytes(codec, 0)
    received = [
        wires.view(world, size)
        for wires, size in zip(_split(workspace, "receive", [world * size for size in sizes], x.device), sizes)
    ]
    exchanges = [exchange({rank: wires[rank] for rank in peers}, group, SCATTER) for wires in received]
    sending = []

    def scatter(chunk: int) -> None:
        own = received[chunk][me]
        if sizes[chunk]:
            codec.encode_rows(source[chunks.rows(0, chunk)], own)
        sending.extend(exchanges[chunk].send(dict.fromkeys(peers, own)))

    def reduce(chunk: int) -> None:
        exchanges[chunk].wait()
        if sizes[chunk]:
            codec.reduce_rows(received[chunk], target[chunks.rows(0, chunk)])

    staggered(count, (scatter, reduce), sending, group)
    return out, len(peers) * sum(sizes)


def two_step(
    x: torch.Tensor, scatter: Codec, gather: Codec, count: int, group: dist.ProcessGroup, workspace: Workspace
) -> tuple[torch.Tensor, int]:
    """As `one_shot`, with one codec per hop."""
    world, me = dist.get_world_size(group), dist.get_rank(group)
    chunks, out = Chunks(shard(x.shape, (scatter, gather), world), count), results.empty_like(x)
    source, target = chunks.shards.of_all(x), chunks.shards.of_all(out)
    everyone, peers = range(world), others(me, world)
    sent = {rank: _split(workspace, f"send {rank}", chunks.nbytes(scatter, rank), x.device) for rank in peers}
    own = chunks.nbytes(scatter, me)
    received = [
        wires.view(world, size)
        for wires, size in zip(_split(workspace, "receive", [world * size for size in own], x.device), own)
    ]
    summed = {rank: _split(workspace, f"sum {rank}", chunks.nbytes(gather, rank), x.device) for rank in everyone}
    scatters = [exchange({rank: wires[rank] for rank in peers}, group, SCATTER) for wires in received]
    gathers = [exchange({rank: summed[rank][chunk] for rank in peers}, group, GATHER) for chunk in range(count)]
    sending = []

    def start(chunk: int) -> None:
        sends = {rank: sent[rank][chunk] for rank in peers}
        for rank, wire in filled(sends | {me: received[chunk][me]}).items():
            scatter.encode_rows(source[chunks.rows(rank, chunk)], wire)
        sending.extend(scatters[chunk].send(sends))

    def reduce(chunk: int) -> None:
        scatters[chunk].wait()
        wire, shape = summed[me][chunk], chunks.shape(me, chunk)
        if wire.numel():
            scratch = lambda: workspace.floats("sum", shape, x.device)  # noqa: E731
            fused.reduce_encode(scatter, received[chunk], gather, shape, wire, scratch)
        sending.extend(gathers[chunk].send(dict.fromkeys(peers, wire)))

    def decode(chunk: int) -> None:
        gathers[chunk].wait()
        for rank, wire in filled({rank: summed[rank][chunk] for rank in everyone}).items():
            gather.sent_by(rank).reduce_rows(wire.view(1, -1), target[chunks.rows(rank, chunk)])

    staggered(count, (start, reduce, decode), sending, group)
    bytes_sent = sum(sum(chunks.nbytes(scatter, rank)) for rank in peers) + len(peers) * sum(chunks.nbytes(gather, me))
    return out, bytes_sent


def staggered(
    count: int, stages: Sequence[Callable[[int], None]], sending: Sequence[dist.Work], group: dist.ProcessGroup
) -> None:
    """Each stage of each chunk, AHEAD chunks behind the stage before it; then wait for what the stages added to
    `sending`."""
    with whole(group, kept=(stages, sending)):
        for step in range(count + AHEAD * (len(stages) - 1)):
            for number, stage in enumerate(stages):
                if 0 <= (chunk := step - AHEAD * number) < count:
                    stage(chunk)
        wait(sending, group)


def _split(workspace: Workspace, name: str, sizes: list[int], device: torch.device) -> Sequence[torch.Tensor]:
    return workspace.bytes(name, sum(sizes), device).split(sizes)
