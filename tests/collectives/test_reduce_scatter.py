"""Reduce-scatter on real ranks: the bits of the simulation and of the definition, every dimension, stride and dtype."""

import itertools

import pytest
import torch
import torch.distributed as dist

import megatron_lowbit as lowbit
from megatron_lowbit.communicator import communicator
from tests.ranks import run_ranks
from tests.tensors import DTYPES, STRIDES, same_bits, sample, tolerance

SPECS = {"int4:g32": 4, "int6:g64:sym/int2:g32": 5, "bf16": 8, "fp16/int2:g32": 10, "fp32": 16}  # and bits of accuracy


def cases(world: int):
    """(shape, dim, dtype, strides) for every combination that `world` ranks can share."""
    shapes = [
        ((2 * world, 96), 0),
        ((world, 3, 33), -3),
        ((3, 2 * world, 33), 1),
        ((2, 5, 40 * world), -1),
        ((7 * world,), 0),
        ((world, 1), 0),
    ]
    for number, ((shape, dim), dtype) in enumerate(itertools.product(shapes, DTYPES)):
        yield shape, dim, dtype, STRIDES[number % len(STRIDES)]


def definition(partials: list[torch.Tensor], spec: str, dim: int) -> list[torch.Tensor]:
    """Chunk by chunk: each rank's goes through the codec, fp32 sums in rank order, one rounding."""
    codec, world = lowbit.codec(spec.split("/")[0]), len(partials)
    results = []
    for rank in range(world):
        total = None
        for x in partials:
            chunk = torch.tensor_split(x, world, dim)[rank]
            value = codec.decode(codec.encode(chunk), chunk.shape, torch.float32)
            total = value if total is None else total + value
        results.append(total.to(partials[0].dtype))
    return results


def _session(rank, world):
    results, torchs = [], []
    for shape, dim, dtype, strides in cases(world):
        x = sample(rank, shape, dtype, strides)
        before, moved = x.clone(), x.float().movedim(dim, 0).contiguous()
        own = moved.new_empty((moved.shape[0] // world, *moved.shape[1:]))
        dist.reduce_scatter_tensor(own, moved)
        torchs.append(own.movedim(0, dim))
        results += [lowbit.reduce_scatter(x, spec, dim=dim) for spec in SPECS]
        assert torch.equal(x, before), "the input was written to"
    lowbit.reset_stats()
    integers = torch.randint(-9, 9, (2 * world, 5), generator=torch.Generator().manual_seed(rank)).float()
    exact, own = lowbit.reduce_scatter(integers, "fp32"), torch.empty(2, 5)
    dist.reduce_scatter_tensor(own, integers)
    lowbit.reduce_scatter(torch.ones(4 * world, 64), "int4:g32")
    empty = [
        lowbit.reduce_scatter(torch.zeros(shape), "int4:g32", dim=dim) for shape, dim in (((0, 5), 0), ((world, 0), 0))
    ]
    stats = lowbit.stats()
    poisoned = torch.ones(2 * world, 64)
    poisoned[1, 3] = torch.nan if rank == 1 else 1.0
    return {
        "results": results,
        "torch": torchs,
        "integers": [exact, own],
        "empty": empty,
        "stats": stats,
        "poisoned": [lowbit.reduce_scatter(poisoned, spec) for spec in ("int4:g32", "int8:g64:sym", "fp32")],
        "changing": [lowbit.reduce_scatter(x, "int5:g32", dim=dim) for x, dim in _changing(rank, world)],
        "refused": list(_refused(world)),
    }


def _changing(rank, world):
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        tokens, features = (int(n) for n in torch.randint(0, 20, (2,), generator=generator))
        yield sample(100 * rank + step, (tokens * world, features * world), torch.bfloat16), step % 2


def _refused(world):
    x = torch.zeros(2 * world, 3)
    for bad, dim in (
        (torch.zeros(2 * world + 1, 3), 0),
        (x, 2),
        (x, -3),
        (x, "0"),
        (x, True),
        (torch.tensor(1.0), 0),
        (x.double(), 0),
        (x.long(), 0),
        (x.clone().requires_grad_(), 0),
        ([1.0], 0),
    ):
        try:
            lowbit.reduce_scatter(bad, "int4:g32", dim=dim)
        except lowbit.ConfigError as error:
            yield str(error)


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request):
    return run_ranks(request.param, _session)


def test_ranks_hold_what_the_definition_and_the_simulation_say(ranks):
    world = len(ranks)
    results = [iter(rank["results"]) for rank in ranks]
    for number, (shape, dim, dtype, strides) in enumerate(cases(world)):
        partials = [sample(rank, shape, dtype, strides) for rank in range(world)]
        for spec, bits in SPECS.items():
            simulated = lowbit.simulate.reduce_scatter(partials, spec, dim=dim)
            defined = definition(partials, spec, dim)
            error = sum(tolerance(x, bits) for x in partials)
            for rank in range(world):
                result, case = next(results[rank]), (shape, dim, dtype, strides, spec)
                assert result.is_contiguous() and same_bits(result, simulated[rank]), case
                assert same_bits(result, defined[rank]), case
                assert torch.allclose(result.float(), ranks[rank]["torch"][number], rtol=0, atol=error), case


def test_integers_in_fp32_are_summed_exactly(ranks):
    for rank in ranks:
        assert torch.equal(*rank["integers"])


def test_calls_and_bytes_are_counted(ranks):
    world = len(ranks)
    wire = lowbit.codec("int4:g32").wire_nbytes((4, 64))
    assert wire == 160
    for rank in ranks:
        assert [list(x.shape) for x in rank["empty"]] == [[0, 5], [1, 0]]
        assert rank["stats"]["reduce_scatter"] == {
            "calls": 4,
            "values": 10 * world + 256 * world,
            "bytes_sent": (world - 1) * (48 + wire),  # 10 values of fp32, and 8 bytes up to the next 16
            "bytes_bf16": 2 * (world - 1) * (10 + 256),
            "paths": {"reduce-scatter": 2, "exact": 2},
            "backends": {"numba": 2},
            "fallbacks": {"empty message": 2},
        }


def test_nan_stays_and_stays_where_it_was(ranks):
    first, *others = [rank["poisoned"] for rank in ranks]
    for y in first:
        assert y[1, 3].isnan() and y[0].isfinite().all()
    assert first[0][1, :32].isnan().all() and first[0][1, 32:].isfinite().all()  # its group, and no other
    assert all(y.isfinite().all() for other in others for y in other)


def test_changing_and_empty_shapes(ranks):
    world = len(ranks)
    inputs = [_changing(rank, world) for rank in range(world)]
    for step, calls in enumerate(zip(*inputs, strict=True)):
        simulated = lowbit.simulate.reduce_scatter([x for x, _ in calls], "int5:g32", dim=calls[0][1])
        assert all(same_bits(rank["changing"][step], y) for rank, y in zip(ranks, simulated, strict=True))


def test_bad_input_is_refused_with_value_and_remedy(ranks):
    world = len(ranks)
    expected = [
        f"size {2 * world + 1} along dim 0, which {world} ranks cannot share equally: pad it to {3 * world}",
        f"dim is 2, and x has shape ({2 * world}, 3): give a whole number from -2 to 1",
        "dim is -3",
        "dim is '0'",
        "dim is True",
        "x has shape (), and no dimension to work along: pass x.reshape(1)",
        "dtype float64",
        "dtype int64",
        "requires grad",
        "got list",
    ]
    for rank in ranks:
        assert len(rank["refused"]) == len(expected)
        assert all(part in message for part, message in zip(expected, rank["refused"], strict=True))


def _subgroups(rank, world):
    odd, alone = dist.new_group([0, 2, 3]), dist.new_group([1])
    x = sample(rank, (6, 96), torch.bfloat16)
    everyone = lowbit.reduce_scatter(x, "int4:g32", dim=1)
    lowbit.reset_stats()
    part = lowbit.reduce_scatter(x, "int4:g32", group=alone if rank == 1 else odd)
    stats = lowbit.stats()["reduce_scatter"]
    exact = communicator(None, lowbit.CommConfig("int2:g32", sites="a")).reduce_scatter(x, -1, site="b")
    return [everyone, part, [stats["paths"], stats["fallbacks"], stats["bytes_bf16"]], exact, lowbit.stats()["b"]]


def test_subgroups_a_group_of_one_and_a_site_not_selected():
    ranks = run_ranks(4, _subgroups)
    partials = [sample(rank, (6, 96), torch.bfloat16) for rank in range(4)]
    for rank, expected in enumerate(lowbit.simulate.reduce_scatter(partials, "int4:g32", dim=1)):
        assert same_bits(ranks[rank][0], expected)
    members = [0, 2, 3]
    for rank, expected in zip(
        members, lowbit.simulate.reduce_scatter([partials[r] for r in members], "int4:g32"), strict=True
    ):
        assert same_bits(ranks[rank][1], expected)
        assert ranks[rank][2] == [{"reduce-scatter": 1}, {}, 2 * 2 * 2 * 96]
    assert torch.equal(ranks[1][1], partials[1]) and ranks[1][2] == [{"exact": 1}, {"world of one rank": 1}, 0]
    for rank, expected in enumerate(lowbit.simulate.reduce_scatter(partials, "bf16", dim=1)):
        stats = ranks[rank][4]
        assert same_bits(ranks[rank][3], expected)
        assert stats["paths"] == {"exact": 1} and stats["fallbacks"] == {"site not selected": 1}
        assert stats["bytes_sent"] == stats["bytes_bf16"] == 3 * 6 * 24 * 2
