"""All-reduce of ranks in several nodes, where the links between nodes are slower than those inside.

K nodes of L ranks; a rank is the l-th of the k-th node. The message is cut into L shards, each again into K parts.

    inside    encode; shard l goes to its own node's l-th rank, which sums what its node's L ranks sent.
    between   the l-th ranks of all nodes all-reduce shard l in two steps: part k, encoded, goes to node k, which sums
              what the K nodes sent, encodes the sum and sends it to all nodes.
    inside    what came from other nodes is passed on as it is, and everybody decodes the same L K wires.

Passing on means that nothing is quantized a fourth time, and as the wires are those of the slow links, few bytes also
inside. A node sends 2 (K - 1) / K M bytes over its slow link, with two-step it is L times as much. Sums are fp32, of
decoded wires only: a node's ranks in ascending order, then the nodes in theirs. Every rank decodes the same wires, so
every rank ends with the same bits. After BlueConnect (Cho et al., 2019) and ZeRO++ (Wang et al., 2023, section 3.3).

No subgroups: what is sent goes from rank to rank, or by the group's all-to-all with nothing for all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist

from ..codecs import fused
from ..codecs.base import Codec
from . import results
from .all_reduce import Summands, reduce_shard
from .exchange import Workspace, all_to_all
from .layout import Shards, shard
from .pipeline import Chunks, staggered
from .topology import Nodes
from .transfers import GATHER, SCATTER, exchange


@dataclass(frozen=True)
class Legs:
    """What travels: inside a node, and on the two hops between nodes, the last of which is passed on inside."""

    inside: Codec
    scatter: Codec
    gather: Codec

    def cut(self, shape: torch.Size, parts: int) -> Shards:
        return shard(shape, (self.inside, self.scatter, self.gather), parts)


@dataclass(frozen=True)
class Place:
    """A rank among nested nodes. inside: its node's ranks; between: the ranks of its place, node by node."""

    place: int
    node: int
    inside: tuple[int, ...]
    between: tuple[int, ...]

    @classmethod
    def of(cls, rank: int, nodes: Nodes) -> Place:
        node = next(number for number, members in enumerate(nodes.members) if rank in members)
        place = nodes.members[node].index(rank)
        return cls(place, node, nodes.members[node], tuple(members[place] for members in nodes.members))


def in_one_go(x: torch.Tensor, legs: Legs, nodes: Nodes, group: dist.ProcessGroup, workspace: Workspace) -> Summands:
    """x contiguous, not empty. By the group's all-to-all, which all backends have."""
    me = Place.of(dist.get_rank(group), nodes)
    width, depth = len(me.inside), len(me.between)
    parts = legs.cut(x.shape, width * depth)  # shard l is the parts from l K to (l + 1) K
    bounds = parts.bounds[::depth]
    lengths = [legs.inside.wire_nbytes((stop - start, parts.features)) for start, stop in pairwise(bounds)]
    wires = workspace.bytes("send", sum(lengths), x.device)
    fused.encode_shards(legs.inside, parts.of_all(x), bounds, wires)
    received = workspace.bytes("receive", width * lengths[me.place], x.device)
    _exchange(received, wires, [lengths[me.place]] * width, lengths, me.inside, group)
    sent = sum(lengths) - lengths[me.place]

    own = parts.bounds[me.place * depth : (me.place + 1) * depth + 1]
    own = Shards(own[-1] - own[0], parts.features, tuple(bound - own[0] for bound in own))
    lengths = own.wire_nbytes(legs.scatter)
    wires = workspace.bytes("send", sum(lengths), x.device)
    _sum_into_parts(legs, received.view(width, -1), own, wires, workspace)
    received = workspace.bytes("receive", depth * lengths[me.node], x.device)
    _exchange(received, wires, [lengths[me.node]] * depth, lengths, me.between, group)
    sent += sum(lengths) - lengths[me.node]

    slot = max(parts.wire_nbytes(legs.gather))
    summed = workspace.bytes("send", slot, x.device)
    reduce_shard(received.view(depth, -1), own.shape(me.node), legs.scatter, legs.gather, summed, workspace)
    passed = workspace.bytes("receive", depth * slot, x.device)
    _exchange(passed, summed.repeat(depth), [slot] * depth, [slot] * depth, me.between, group)
    gathered, sizes = workspace.bytes("gathered", width * depth * slot, x.device), [depth * slot] * width
    _exchange(gathered, passed.repeat(width), sizes, sizes, me.inside, group)
    sent += (depth - 1) * slot + (width - 1) * depth * slot
    return Summands(gathered.view(width * depth, slot), legs.gather, parts, sent)


def in_chunks(
    x: torch.Tensor, legs: Legs, nodes: Nodes, count: int, group: dist.ProcessGroup, workspace: Workspace
) -> tuple[torch.Tensor, int]:
    """x contiguous, not empty -> (its sum over the group, bytes sent). The steps of `count` chunks overlap."""
    work = _Chunked(x, legs, Place.of(dist.get_rank(group), nodes), count, group, workspace)
    stages = work.scatter, work.sum_inside, work.sum_between, work.pass_on, work.decode
    staggered(count, stages, work.sending, group)
    return work.out, work.nbytes


class _Chunked:
    """One all-reduce. A chunk is some rows of every shard; these rows, and not the whole shard's, are cut into parts.

    Wires by place, then chunk: `sent` inside the node, `sums` at the end. By chunk: `received` inside the node, by
    place; `between` for the nodes, one behind the other; `arrived` from the nodes.
    """

    def __init__(
        self, x: torch.Tensor, legs: Legs, me: Place, count: int, group: dist.ProcessGroup, workspace: Workspace
    ) -> None:
        self.x, self.legs, self.me, self.workspace, self.sending, self.nbytes = x, legs, me, workspace, [], 0
        width, depth = len(me.inside), len(me.between)
        self.chunks, self.out = Chunks(legs.cut(x.shape, width), count), results.empty_like(x)
        self.source, self.target = (self.chunks.shards.of_all(tensor) for tensor in (x, self.out))
        self.places = [(me.place + distance) % width for distance in range(1, width)]  # the next first
        self.nodes = [(me.node + distance) % depth for distance in range(1, depth)]
        self.parts = [[self._parts(place, chunk) for chunk in range(count)] for place in range(width)]
        nbytes = self.chunks.nbytes
        self.sent = {place: self._wires(f"send {place}", nbytes(legs.inside, place)) for place in self.places}
        self.received = self._received("receive", width, nbytes(legs.inside, me.place))
        own = [parts.wire_nbytes(legs.scatter) for parts in self.parts[me.place]]
        self.between = self._wires("between", [sum(sizes) for sizes in own])
        self.arrived = self._received("arrived", depth, [sizes[me.node] for sizes in own])
        self.sums = [
            self._wires(f"sum {place}", [sum(parts.wire_nbytes(legs.gather)) for parts in self.parts[place]])
            for place in range(width)
        ]
        inside = lambda wires: {me.inside[place]: wires[place] for place in self.places}  # noqa: E731
        between = lambda wires: {me.between[node]: wires[node] for node in self.nodes}  # noqa: E731
        self.exchanges = [
            (
                exchange(inside(self.received[chunk]), group, SCATTER),
                exchange(between(self.arrived[chunk]), group, SCATTER),
                exchange(between(self._sums(me.place, chunk)), group, GATHER),
                exchange(inside([sums[chunk] for sums in self.sums]), group, GATHER),
            )
            for chunk in range(count)
        ]

    def scatter(self, chunk: int) -> None:
        wires, me = self.received[chunk], self.me
        sends = {place: self.sent[place][chunk] for place in self.places}
        for place, wire in (sends | {me.place: wires[me.place]}).items():
            if wire.numel():
                self.legs.inside.encode_rows(self.source[self.chunks.rows(place, chunk)], wire)
        self._send(chunk, 0, {me.inside[place]: wire for place, wire in sends.items()})

    def sum_inside(self, chunk: int) -> None:
        self.exchanges[chunk][0].wait()
        me, parts = self.me, self.parts[self.me.place][chunk]
        _sum_into_parts(self.legs, self.received[chunk], parts, self.between[chunk], self.workspace)
        sends = self.between[chunk].split(parts.wire_nbytes(self.legs.scatter))
        self.arrived[chunk][me.node].copy_(sends[me.node])
        self._send(chunk, 1, {me.between[node]: sends[node] for node in self.nodes})

    def sum_between(self, chunk: int) -> None:
        self.exchanges[chunk][1].wait()
        legs, me = self.legs, self.me
        own, shape = self._sums(me.place, chunk)[me.node], self.parts[me.place][chunk].shape(me.node)
        reduce_shard(self.arrived[chunk], shape, legs.scatter, legs.gather, own, self.workspace)
        self._send(chunk, 2, {me.between[node]: own for node in self.nodes})

    def pass_on(self, chunk: int) -> None:
        self.exchanges[chunk][2].wait()
        wires = self.sums[self.me.place][chunk]
        self._send(chunk, 3, {self.me.inside[place]: wires for place in self.places})

    def decode(self, chunk: int) -> None:
        self.exchanges[chunk][3].wait()
        for place, parts in enumerate(parts[chunk] for parts in self.parts):
            target = self.target[self.chunks.rows(place, chunk)]
            for wire, (start, stop) in zip(self._sums(place, chunk), pairwise(parts.bounds)):
                if wire.numel():
                    self.legs.gather.reduce_rows(wire.view(1, -1), target[start:stop])

    def _parts(self, place: int, chunk: int) -> Shards:
        (rows, features), depth = self.chunks.shape(place, chunk), len(self.me.between)
        return Shards(rows, features, tuple(rows * node // depth for node in range(depth + 1)))

    def _sums(self, place: int, chunk: int) -> Sequence[torch.Tensor]:
        """The wires of the parts' sums, node by node."""
        return self.sums[place][chunk].split(self.parts[place][chunk].wire_nbytes(self.legs.gather))

    def _wires(self, name: str, sizes: list[int]) -> Sequence[torch.Tensor]:
        return self.workspace.bytes(name, sum(sizes), self.x.device).split(sizes)

    def _received(self, name: str, count: int, sizes: list[int]) -> list[torch.Tensor]:
        """uint8 [count, size] for each size."""
        wires = self._wires(name, [count * size for size in sizes])
        return [chunk.view(count, size) for chunk, size in zip(wires, sizes)]

    def _send(self, chunk: int, step: int, wires: dict[int, torch.Tensor]) -> None:
        """wires: by rank."""
        self.nbytes += sum(wire.numel() for wire in wires.values())
        self.sending += self.exchanges[chunk][step].send(wires)


def _sum_into_parts(legs: Legs, wires: torch.Tensor, parts: Shards, out: torch.Tensor, workspace: Workspace) -> None:
    """wires uint8 [ranks, bytes] of a node's shard -> those of its sum's parts, one behind the other."""
    if parts.rows:
        scratch = workspace.floats("sum", (parts.rows, parts.features), out.device)
        fused.reduce_encode_shards(legs.inside, wires, legs.scatter, parts.bounds, out, scratch)


def _exchange(
    output: torch.Tensor,
    wires: torch.Tensor,
    received: list[int],
    sent: list[int],
    ranks: tuple[int, ...],
    group: dist.ProcessGroup,
) -> None:
    """All-to-all among `ranks`, of which `sent` and `received` are in the order, with nothing for the others."""
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    moved = order != list(range(len(ranks)))  # nodes are in the order of their first ranks, others may cross
    pieces = torch.cat([wires.split(sent)[index] for index in order]) if moved else wires
    arrived = torch.empty_like(output) if moved else output
    splits = [[0] * dist.get_world_size(group) for _ in range(2)]
    for index, rank in enumerate(ranks):
        splits[0][rank], splits[1][rank] = received[index], sent[index]
    all_to_all(arrived, pieces, *splits, group)
    if moved:
        for index, piece in zip(order, arrived.split([received[index] for index in order])):
            output.split(received)[index].copy_(piece)
