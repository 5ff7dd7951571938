"""Ranks whose codecs differ: what is received is decoded as its sender's, in every collective."""

import pytest
import torch
import torch.distributed as dist

from megatron_lowbit.codecs.base import Codec
from megatron_lowbit.collectives import all_gather, all_reduce, all_to_all, reduce_scatter
from megatron_lowbit.collectives.exchange import Workspace
from tests.ranks import run_ranks


class Keyed(Codec):
    """fp32 values, plus a number that only the sender's codec knows."""

    spec = "keyed"

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def sent_by(self, rank: int) -> Codec:
        return Keyed(rank)

    def granularity(self, features: int) -> int:
        return 4

    def sections(self, rows: int, features: int) -> list[tuple[str, int]]:
        return [("values", 4 * rows * features)]

    def define_encode(self, x: torch.Tensor, wire: torch.Tensor) -> None:
        self.split(wire, *x.shape)["values"].view(torch.float32).copy_(x.flatten() + 1000 * (1 + self.rank))

    def define_reduce(self, wires: torch.Tensor, out: torch.Tensor) -> None:
        senders = range(len(wires)) if len(wires) > 1 else [self.rank]
        out.zero_()
        for sender, wire in zip(senders, wires, strict=True):
            values = self.split(wire, *out.shape)["values"].view(torch.float32)
            out += values.view(out.shape) - 1000 * (1 + sender)


def _every_collective(rank, world):
    x = torch.arange(6 * 5 * world, dtype=torch.float32).view(6 * world, 5) + rank
    codec, group, workspace = Keyed(rank), dist.group.WORLD, Workspace()
    sends, receives = [(rank + 2 * peer) % 5 for peer in range(world)], [(peer + 2 * rank) % 5 for peer in range(world)]
    mine = x[: sum(sends)]
    compressed = [
        all_reduce.one_shot(x, codec, group, workspace).result(x),
        all_reduce.two_step(x, codec, codec, group, workspace).result(x),
        reduce_scatter.reduce_scatter(list(x.chunk(world)), codec, group, workspace)[0],
        all_gather.all_gather(x, 1, codec, group, workspace)[0],
        all_to_all.all_to_all(mine, sends, receives, codec, group, workspace)[0],
    ]
    total, chunk, parts = x.clone(), torch.empty(6, 5), [torch.empty_like(x) for _ in range(world)]
    rows = torch.empty(sum(receives), 5)
    dist.all_reduce(total)
    dist.reduce_scatter_tensor(chunk, x)
    dist.all_gather(parts, x)
    dist.all_to_all_single(rows, mine, receives, sends)
    return [
        torch.equal(a, b) for a, b in zip(compressed, [total, total, chunk, torch.cat(parts, 1), rows], strict=True)
    ]


@pytest.mark.parametrize("world", [2, 3])
def test_wires_are_decoded_as_their_senders(world):
    assert run_ranks(world, _every_collective) == [[True] * 5] * world
