"""Chunks change nothing: real ranks, the same bits as in one go and as the simulation, however a message is cut."""

import pytest
import torch

import megatron_lowbit as lowbit
from megatron_lowbit.collectives import all_reduce, connect, pipeline, transfers
from megatron_lowbit.collectives.exchange import Workspace
from megatron_lowbit.collectives.layout import shard
from megatron_lowbit.communicator import communicator
from megatron_lowbit.spec import parse
from tests.ranks import run_ranks

SPECS = [
    "int4:g32",
    "int5:g32/int8:g64",
    "gauss4:g128",
    "gauss3:g256",
    "nvfp4",
    "int4:g64:spike",
    "gauss2:g128:trellis",
]
SHAPES = [(1, 64), (7, 128), (40, 256), (3, 5, 96)]
COUNTS = (1, 2, 3, 8, 50)  # also more chunks than rows


def partial(rank: int, shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).bfloat16()


def _every_count(rank, world, transport):
    import torch.distributed as dist

    if transport == "tcp":
        communicator(None, lowbit.CommConfig())
    assert (connect.mesh(dist.group.WORLD) is not None) == (transport == "tcp")
    group, workspace, found, sent = dist.group.WORLD, Workspace(), [], []
    for spec in SPECS:
        codecs = [lowbit.codec(str(leg)) for leg in (parse(spec).scatter, parse(spec).gather)]
        for shape in SHAPES:
            x = partial(rank, shape)
            for name, legs in (("one_shot", codecs[:1]), ("two_step", codecs)):
                in_one_go = getattr(all_reduce, name)(x, *legs, group, workspace)
                found.append(in_one_go.result(x))
                for count in COUNTS:
                    result, nbytes = getattr(pipeline, name)(x, *legs, count, group, workspace)
                    assert torch.equal(result, found[-1]), (spec, shape, name, count)
                    if count == 1:
                        sent.append([nbytes, in_one_go.sent])
    return {"found": found, "sent": sent}


@pytest.mark.parametrize("world, transport", [(2, "tcp"), (3, "tcp"), (4, "tcp"), (3, "torch")])
def test_any_number_of_chunks_gives_the_bits_of_the_simulation(world, transport):
    ranks = run_ranks(world, _every_count, transport)
    results = iter(zip(*(rank["found"] for rank in ranks), strict=True))
    for spec in SPECS:
        for shape in SHAPES:
            partials = [partial(rank, shape) for rank in range(world)]
            for algorithm in ("one-shot", "two-step"):
                expected = lowbit.simulate.all_reduce(partials, spec, algorithm)
                assert all(torch.equal(result, expected) for result in next(results)), (spec, shape, algorithm)
    for nbytes, in_one_go in ranks[0]["sent"]:
        assert 0 < nbytes <= in_one_go  # all-gather wants one length of all ranks, transfers do not


def _in_batches(rank, world):
    import torch.distributed as dist

    transfers.in_batches = lambda group: True  # as on NCCL; in this rank's process only
    x, codec, calls, batch = partial(rank, (40, 256)), lowbit.codec("int4:g32"), [], dist.batch_isend_irecv
    dist.batch_isend_irecv = lambda steps: calls.append(len(steps)) or batch(steps)
    one, _ = pipeline.one_shot(x, codec, 3, dist.group.WORLD, Workspace())
    two, _ = pipeline.two_step(x, codec, codec, 3, dist.group.WORLD, Workspace())
    return {"one-shot": one, "two-step": two, "calls": calls}


def test_transfers_in_batches_as_nccl_needs_them_give_the_same_bits():
    partials = [partial(rank, (40, 256)) for rank in range(3)]
    for rank in run_ranks(3, _in_batches):
        assert rank["calls"] == [4] * 9  # two sends and two receives: three chunks once, and twice three
        for algorithm in ("one-shot", "two-step"):
            assert torch.equal(rank[algorithm], lowbit.simulate.all_reduce(partials, "int4:g32", algorithm))


def _large(rank, world):
    lowbit.reset_stats()
    x = partial(rank, (1100, 8192))
    result = lowbit.all_reduce(x, "int4:g32", min_bytes=0)
    return {"result": result, "paths": lowbit.stats()["all_reduce"]["paths"]}


def test_a_large_message_takes_the_way_that_users_get():
    ranks = run_ranks(2, _large)
    expected = lowbit.simulate.all_reduce([partial(rank, (1100, 8192)) for rank in range(2)], "int4:g32", "one-shot")
    for rank in ranks:
        assert torch.equal(rank["result"], expected) and rank["paths"] == {"one-shot": 1}


def test_chunks_cover_every_shard_once():
    codec = lowbit.codec("int4:g32")
    for rows, world, count in ((1, 3, 4), (17, 4, 5), (64, 2, 64)):
        shards = shard((rows, 96), (codec,), world)
        chunks = pipeline.Chunks(shards, count)
        taken = [row for rank in range(world) for chunk in range(count) for row in _range(chunks.rows(rank, chunk))]
        assert taken == list(range(shards.rows))


def test_the_first_chunk_and_the_last_are_half_as_large():
    chunks = pipeline.Chunks(shard((120, 96), (lowbit.codec("int4:g32"),), 1), 4)
    rows = [chunks.shape(0, chunk)[0] * chunks.shards.features for chunk in range(4)]
    assert rows == [20 * 96, 40 * 96, 40 * 96, 20 * 96]


def _range(rows: slice) -> range:
    return range(rows.start, rows.stop)


class _Interrupted(Exception):
    """Stands for Ctrl-C, or memory that ran out."""


def _is_interrupted(rank, world, transport):
    import torch.distributed as dist

    class Stops:
        """int4 that fails when the third chunk is encoded."""

        def __init__(self):
            self.codec, self.left = lowbit.codec("int4:g32"), 2

        def __getattr__(self, name):
            return getattr(self.codec, name)

        def encode_rows(self, *given):
            self.left -= 1
            if self.left < 0:
                raise _Interrupted
            self.codec.encode_rows(*given)

    x, messages = partial(rank, (40, 256)), []
    group, other = dist.group.WORLD, dist.new_group([0, 1])
    if transport == "tcp":
        for each in (group, other):
            communicator(each, lowbit.CommConfig())
    with pytest.raises((_Interrupted, lowbit.RankError)):  # or the other one's end is seen first
        pipeline.one_shot(x, Stops(), 8, group, Workspace())
    for _ in range(2):
        try:  # another communicator of this group, as it were
            pipeline.one_shot(x, lowbit.codec("int4:g32"), 8, group, Workspace())
        except lowbit.RankError as error:
            messages.append(str(error))
    fine, _ = pipeline.one_shot(x, lowbit.codec("int4:g32"), 8, other, Workspace())
    total = torch.ones(3)
    dist.all_reduce(total)  # what is still under way is in nobody's way
    return {"messages": messages, "fine": fine, "total": total}


@pytest.mark.parametrize("transport", ["tcp", "torch"])
def test_a_group_that_was_interrupted_is_refused_at_once_and_others_are_not(transport):
    expected = lowbit.simulate.all_reduce([partial(rank, (40, 256)) for rank in range(2)], "int4:g32", "one-shot")
    for rank, found in enumerate(run_ranks(2, _is_interrupted, transport, timeout=30)):
        assert len(found["messages"]) == 2
        assert all(f"rank {rank} was interrupted in an earlier collective" in text for text in found["messages"])
        assert torch.equal(found["fine"], expected) and torch.equal(found["total"], torch.full((3,), 2.0))
