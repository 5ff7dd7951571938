"""The simulation against an independent composition of encode and decode, token by token."""

import pytest
import torch

import megatron_lowbit as lowbit


def through(spec, x):
    codec = lowbit.codec(spec)
    return codec.decode(codec.encode(x), x.shape, torch.float32)


@pytest.mark.parametrize("world", [2, 3, 5, 8])
@pytest.mark.parametrize("features", [32, 96, 100, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_against_the_definition(world, features, dtype):
    partials = [torch.randn(4, features, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(world)]
    total = through("int4:g32", partials[0])
    for partial in partials[1:]:
        total = total + through("int4:g32", partial)
    assert torch.equal(lowbit.simulate.all_reduce(partials, "int4:g32", "one-shot"), total.to(dtype))
    both = lowbit.simulate.all_reduce(partials, "int4:g32/int8:g32", "two-step")
    assert torch.equal(both, through("int8:g32", total).to(dtype))
    exact = lowbit.simulate.all_reduce(partials, "int4:g32", "exact")
    assert torch.allclose(exact.float(), torch.stack(partials).float().sum(0), atol=0.1)


@pytest.mark.parametrize("algorithm", ["one-shot", "two-step"])
def test_a_token_does_not_depend_on_its_batch(algorithm):
    partials = [torch.randn(6, 96, generator=torch.Generator().manual_seed(r)) for r in range(3)]
    together = lowbit.simulate.all_reduce(partials, "int4:g32/int6:g32", algorithm)
    for token in range(6):
        alone = lowbit.simulate.all_reduce([p[token : token + 1] for p in partials], "int4:g32/int6:g32", algorithm)
        assert torch.equal(alone[0], together[token])


def test_auto_follows_the_policy():
    partials = [torch.randn(4, 64, generator=torch.Generator().manual_seed(r)) for r in range(3)]
    for count, algorithm in ((2, "one-shot"), (3, "two-step")):
        assert torch.equal(
            lowbit.simulate.all_reduce(partials[:count], "int4:g32", "auto"),
            lowbit.simulate.all_reduce(partials[:count], "int4:g32", algorithm),
        )
    assert torch.equal(lowbit.simulate.all_reduce(partials[:1], "int4:g32"), partials[0])


DIMS = [((10, 64), 0), ((3, 10, 33), 1), ((2, 3, 320), -1), ((70,), 0)]


@pytest.mark.parametrize("world", [2, 5])
@pytest.mark.parametrize("shape, dim", DIMS)
def test_reduce_scatter_sums_chunks_in_rank_order(world, shape, dim):
    partials = [torch.randn(shape, generator=torch.Generator().manual_seed(r)).half() for r in range(world)]
    results = lowbit.simulate.reduce_scatter(partials, "int4:g32/int8:g32", dim=dim)
    for rank, result in enumerate(results):
        first, *others = [through("int4:g32", x.chunk(world, dim)[rank]) for x in partials]
        for other in others:
            first = first + other
        assert result.dtype == torch.float16 and torch.equal(result, first.half())


@pytest.mark.parametrize("shape, dim", DIMS)
def test_all_gather_uses_the_gather_leg(shape, dim):
    parts = [torch.randn(shape, generator=torch.Generator().manual_seed(r)) for r in range(3)]
    expected = torch.cat([through("int8:g32", x) for x in parts], dim)
    assert torch.equal(lowbit.simulate.all_gather(parts, "int4:g32/int8:g32", dim=dim), expected)
    assert torch.equal(lowbit.simulate.all_gather(parts, "int8:g32", dim), expected)


def test_all_to_all_keeps_rank_order_and_cuts_as_asked():
    splits = [[1, 0, 4], [0, 0, 0], [2, 3, 1]]
    inputs = [torch.randn(sum(s), 2, 40, generator=torch.Generator().manual_seed(r)) for r, s in enumerate(splits)]
    results = lowbit.simulate.all_to_all(inputs, "int4:g32/int8:g32", splits)
    assert torch.equal(results[0], through("int4:g32", torch.cat([inputs[0][:1], inputs[2][:2]])))
    assert torch.equal(results[1], through("int4:g32", inputs[2][2:5]))
    assert torch.equal(results[2], through("int4:g32", torch.cat([inputs[0][1:], inputs[2][5:]])))
    even = lowbit.simulate.all_to_all([torch.full((4, 32), float(r)) for r in range(2)], "int4:g32")
    assert all(torch.equal(y, torch.tensor([0.0, 0.0, 1.0, 1.0])[:, None].expand(4, 32)) for y in even)


def test_one_rank_and_empty_tensors():
    x = torch.randn(4, 3)
    for result in (
        *lowbit.simulate.reduce_scatter([x], "int2:g32"),
        lowbit.simulate.all_gather([x], "int2:g32"),
        *lowbit.simulate.all_to_all([x], "int2:g32", [[4]]),
    ):
        assert torch.equal(result, x) and result.data_ptr() != x.data_ptr()
    empty = [torch.zeros(4, 0)] * 2
    assert [y.shape for y in lowbit.simulate.reduce_scatter(empty, "int4:g32")] == [(2, 0)] * 2
    assert lowbit.simulate.all_gather(empty, "int4:g32", dim=1).shape == (4, 0)
    assert [y.shape for y in lowbit.simulate.all_to_all(empty, "int4:g32", [[4, 0], [1, 3]])] == [(5, 0), (3, 0)]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: s.reduce_scatter([torch.zeros(3, 4)] * 2, "int4"), "size 3 along dim 0, which 2 ranks cannot share"),
        (lambda s: s.reduce_scatter([torch.zeros(4)] * 2, "int4", dim=1), "dim is 1"),
        (lambda s: s.reduce_scatter([torch.zeros(4), torch.zeros(6)], "int4"), "pass partial sums of one shape and"),
        (lambda s: s.all_gather([torch.tensor(1.0)] * 2, "int4"), "no dimension to work along"),
        (lambda s: s.all_gather([torch.zeros(4).long()], "int4"), "dtype int64"),
        (lambda s: s.all_gather([], "int4"), "expected tensors, got list"),
        (
            lambda s: s.all_to_all([torch.zeros(4, 2), torch.zeros(4, 3)], "int4"),
            "pass tensors of one shape behind dim 0",
        ),
        (lambda s: s.all_to_all([torch.zeros(3)] * 2, "int4"), "cannot share equally"),
        (lambda s: s.all_to_all([torch.zeros(3)] * 2, "int4", [[1, 2]]), "give a list of 2 lists, one per rank"),
        (lambda s: s.all_to_all([torch.zeros(3)] * 2, "int4", [[1, 2], [3, 1]]), "4 in all, but x has size 3"),
        (lambda s: s.all_to_all([torch.zeros(3)] * 2, "int4", [[1, 2], [4, -1]]), "whole numbers from 0 up"),
        (lambda s: s.all_gather([torch.zeros(3)], "int4/int4/int4"), "3 legs"),
    ],
)
def test_bad_input_of_the_other_collectives(call, message):
    with pytest.raises(lowbit.ConfigError, match=message):
        call(lowbit.simulate)


@pytest.mark.parametrize(
    "partials, message",
    [
        ([], "expected partial sums"),
        ([torch.zeros(2, dtype=torch.int32)], "dtype int32"),
        (3, "expected partial sums, got int"),
        ([torch.zeros(2), torch.zeros(3)], "rank 1 has shape"),
        ([torch.zeros(2), torch.zeros(2).half()], "rank 1 has shape"),
    ],
)
def test_bad_input(partials, message):
    with pytest.raises(lowbit.ConfigError, match=message):
        lowbit.simulate.all_reduce(partials, "int4:g32")
