"""Exchanges between ranks mean the same over connections of our own and by torch's isend and irecv."""

from __future__ import annotations

import os
import time

import pytest
import torch

import megatron_lowbit as lowbit
from megatron_lowbit.collectives import connect, sockets, transfers
from megatron_lowbit.communicator import communicator
from tests.ranks import run_ranks

TRANSPORTS = ["tcp", "torch"]


def _group(transport: str):
    import torch.distributed as dist

    os.environ["LOWBIT_TRANSPORT"] = transport
    communicator(None, lowbit.CommConfig())
    return dist.group.WORLD


def wire(me: int, to: int, number: int) -> torch.Tensor:
    """What rank `me` sends to rank `to`; of some nothing."""
    size = 1000 * ((me + 2 * to + number) % 4)
    return torch.full((size,), 64 * me + 16 * to + number, dtype=torch.uint8)


def _exchanges(rank, world, transport):
    group, peers = _group(transport), list(transfers.others(rank, world))
    kind = sockets.Exchange if transport == "tcp" else transfers.Exchange
    for _ in range(3):
        places = [{peer: torch.zeros_like(wire(peer, rank, number)) for peer in peers} for number in range(5)]
        exchanges = [transfers.exchange(place, group, transfers.SCATTER) for place in places]
        assert all(type(exchange) is kind for exchange in exchanges)
        sending = []
        with transfers.whole(group):
            # Over connections of our own each rank may send in an order of its own; torch matches by order.
            for number in reversed(range(5)) if transport == "tcp" and rank % 2 else range(5):
                sending += exchanges[number].send({peer: wire(rank, peer, number) for peer in peers})
            for number in reversed(range(5)):
                exchanges[number].wait()
            transfers.wait(sending, group)
        for number, place in enumerate(places):
            assert all(torch.equal(place[peer], wire(peer, rank, number)) for peer in peers)
    return transfers._interrupted == {}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world", [2, 4])
def test_exchanges_of_uneven_and_empty_wires(world, transport):
    assert all(run_ranks(world, _exchanges, transport))


def _interrupted(rank, world, transport):
    group, place = _group(transport), torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(KeyboardInterrupt), transfers.whole(group, kept="these"):
        transfers.exchange({1 - rank: place}, group, transfers.SCATTER)
        raise KeyboardInterrupt
    for _ in range(2):
        with pytest.raises(lowbit.RankError, match="interrupted in an earlier .*look at the first error, and restart"):
            transfers.exchange({1 - rank: place}, group, transfers.SCATTER)
    return transfers._interrupted[group]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_after_an_interruption_a_group_has_no_more(transport):
    assert run_ranks(2, _interrupted, transport) == ["these"] * 2


def _other_lengths(rank, world):
    group, place = _group("tcp"), torch.zeros(8, dtype=torch.uint8)
    try:
        with transfers.whole(group):
            exchange = transfers.exchange({1 - rank: place}, group, transfers.SCATTER)
            exchange.send({1 - rank: torch.ones(8 + 4 * rank, dtype=torch.uint8)})
            exchange.wait()
            if rank == 1:  # what it awaited came; the other one has ended
                time.sleep(0.2)
                transfers.exchange({0: place}, group, transfers.SCATTER).wait()
    except lowbit.RankError as error:
        return str(error)


def test_ranks_that_differ_in_lengths_all_end():
    one, other = run_ranks(2, _other_lengths)
    assert one.startswith("rank 1 sent 12 bytes where this rank awaits 8 bytes")
    assert other.startswith("rank 1 lost rank 0 of its group of 2")


def _elsewhere(rank, world):
    """Tensors that are not in this memory go by torch, though the group has connections."""
    import torch.distributed as dist

    group, asked = _group("tcp"), []
    assert connect.mesh(group) is not None
    dist.irecv = lambda wire, **_: asked.append(str(wire.device))
    exchange = transfers.exchange({1 - rank: torch.empty(4, dtype=torch.uint8, device="meta")}, group, 5)
    assert type(exchange) is transfers.Exchange
    return asked


def test_tensors_of_other_devices_go_by_torch():
    assert run_ranks(2, _elsewhere) == [["meta"]] * 2


def test_the_next_rank_comes_first():
    assert [list(transfers.others(me, 4)) for me in (0, 2, 3)] == [[1, 2, 3], [3, 0, 1], [0, 1, 2]]


def test_empty_wires_are_left_out():
    wires = {0: torch.ones(2), 1: torch.ones(0), 2: torch.ones(1)}
    assert list(transfers.filled(wires)) == [0, 2]
