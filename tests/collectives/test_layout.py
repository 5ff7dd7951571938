"""Pieces cover the message exactly; shards differ by one row at most and never cut a group."""

import torch
from hypothesis import given
from hypothesis import strategies as st

import megatron_lowbit as lowbit
from megatron_lowbit.collectives.layout import chunks, rows_exchanged, rows_sent, shard

specs = st.sampled_from(["int4:g32", "int8:g128", "int2:g256", "bf16", "fp32"])


@given(st.lists(st.integers(1, 5), max_size=2), st.integers(1, 600), specs, specs, st.integers(1, 8))
def test_partition(leading, features, scatter, gather, world):
    codecs = (lowbit.codec(scatter), lowbit.codec(gather))
    shape = torch.Size([*leading, features])
    shards = shard(shape, codecs, world)
    assert shards.rows * shards.features == shape.numel()
    sizes = [shards.shape(rank)[0] for rank in range(world)]
    assert sum(sizes) == shards.rows and max(sizes) - min(sizes) <= 1
    x = torch.arange(shape.numel()).view(shape)
    assert torch.equal(torch.cat([shards.of(x, rank).flatten() for rank in range(world)]), x.flatten())
    for codec in codecs:  # a shard's row is a token, or whole groups of one
        assert shards.features == features or (
            features % shards.features == shards.features % codec.granularity(features) == 0
        )


def test_one_token_spreads_over_all_ranks():
    shards = shard(torch.Size([1, 4096]), (lowbit.codec("int4:g32"), lowbit.codec("int8:g128")), 8)
    assert [shards.shape(rank) for rank in range(8)] == [(4, 128)] * 8


@given(st.lists(st.integers(0, 4), min_size=1, max_size=3), st.data(), st.integers(1, 8))
def test_chunks_are_equal_and_in_order(shape, data, world):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    shape[dim] *= world
    x = torch.arange(torch.Size(shape).numel()).view(shape)
    parts = chunks(x, dim, world)
    assert len(parts) == world and len({part.shape for part in parts}) == 1
    assert torch.equal(torch.cat(parts, dim), x)


def test_splits_say_who_gets_which_rows():
    x = torch.zeros(6, 2)
    assert rows_sent(x, None, 3) == [2, 2, 2] and rows_sent(x, (6, 0, 0), 3) == [6, 0, 0]
    assert rows_exchanged(x, None, None, 3, 1) == ([2, 2, 2], [2, 2, 2])
    assert rows_exchanged(x, None, [7, 2, 0], 3, 1) == ([2, 2, 2], [7, 2, 0])
    assert rows_exchanged(x, [1, 0, 5], (9, 9, 5), 3, 2) == ([1, 0, 5], [9, 9, 5])
