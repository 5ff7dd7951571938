"""All-gather on real ranks: the bits of the simulation and of the definition, every dimension, stride and dtype."""

import itertools

import pytest
import torch
import torch.distributed as dist

import megatron_lowbit as lowbit
from megatron_lowbit.communicator import communicator
from tests.ranks import run_ranks
from tests.tensors import DTYPES, STRIDES, same_bits, sample, tolerance

SPECS = {"int4:g32": 4, "int2:g32/int6:g64:sym": 5, "bf16": 8, "int2:g32/fp16": 10, "fp32": 16}  # and bits of accuracy
SHAPES = [((5, 96), 0), ((1, 3, 33), -3), ((3, 2, 33), 1), ((2, 5, 40), -1), ((7,), 0), ((4, 1), 1), ((1, 64), -2)]
CASES = [
    (shape, dim, dtype, STRIDES[number % len(STRIDES)])
    for number, ((shape, dim), dtype) in enumerate(itertools.product(SHAPES, DTYPES))
]


def definition(parts: list[torch.Tensor], spec: str, dim: int) -> torch.Tensor:
    codec = lowbit.codec(spec.split("/")[-1])
    return torch.cat([codec.decode(codec.encode(x), x.shape, x.dtype) for x in parts], dim)


def _session(rank, world):
    results, torchs = [], []
    for shape, dim, dtype, strides in CASES:
        x = sample(rank, shape, dtype, strides)
        before, parts = x.clone(), [torch.empty(shape) for _ in range(world)]
        dist.all_gather(parts, x.float().contiguous())
        torchs.append(torch.cat(parts, dim))
        results += [lowbit.all_gather(x, spec, dim=dim) for spec in SPECS]
        assert torch.equal(x, before), "the input was written to"
    lowbit.reset_stats()
    integers = torch.randint(-9, 9, (2, 5), generator=torch.Generator().manual_seed(rank)).float()
    exact, both = lowbit.all_gather(integers, "fp32"), torch.empty(2 * world, 5)
    dist.all_gather_into_tensor(both, integers)
    lowbit.all_gather(torch.ones(4, 64), "int2:g32/int4:g32")
    empty = [lowbit.all_gather(torch.zeros(shape), "int4:g32", dim=dim) for shape, dim in (((0, 5), 0), ((2, 0), -2))]
    stats = lowbit.stats()
    poisoned = torch.ones(2, 64)
    poisoned[1, 3] = torch.inf if rank == 1 else 1.0
    return {
        "results": results,
        "torch": torchs,
        "integers": [exact, both],
        "empty": empty,
        "stats": stats,
        "poisoned": [lowbit.all_gather(poisoned, spec) for spec in ("int4:g32", "int8:g64:sym", "fp32")],
        "changing": [lowbit.all_gather(x, "int5:g32", dim=dim) for x, dim in _changing(rank)],
        "refused": list(_refused()),
    }


def _changing(rank):
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        shape = tuple(int(n) for n in torch.randint(0, 40, (2,), generator=generator))
        yield sample(100 * rank + step, shape, torch.bfloat16), step % 2


def _refused():
    x = torch.zeros(2, 3)
    for bad, dim in (
        (x, 2),
        (x, -3),
        (x, 0.0),
        (torch.tensor(1.0), 0),
        (x.double(), 0),
        (x.clone().requires_grad_(), 0),
        (None, 0),
    ):
        try:
            lowbit.all_gather(bad, "int4:g32", dim=dim)
        except lowbit.ConfigError as error:
            yield str(error)


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request):
    return run_ranks(request.param, _session)


def test_ranks_hold_what_the_definition_and_the_simulation_say(ranks):
    world = len(ranks)
    results = [iter(rank["results"]) for rank in ranks]
    for number, (shape, dim, dtype, strides) in enumerate(CASES):
        parts = [sample(rank, shape, dtype, strides) for rank in range(world)]
        for spec, bits in SPECS.items():
            simulated, defined = lowbit.simulate.all_gather(parts, spec, dim=dim), definition(parts, spec, dim)
            error = max(tolerance(x, bits) for x in parts)
            for rank in range(world):
                result, case = next(results[rank]), (shape, dim, dtype, strides, spec)
                assert result.is_contiguous() and same_bits(result, simulated) and same_bits(result, defined), case
                assert torch.allclose(result.float(), ranks[rank]["torch"][number], rtol=0, atol=error), case


def test_integers_in_fp32_arrive_as_they_are(ranks):
    for rank in ranks:
        assert torch.equal(*rank["integers"])


def test_calls_and_bytes_are_counted(ranks):
    world = len(ranks)
    for rank in ranks:
        assert [list(x.shape) for x in rank["empty"]] == [[0, 5], [2 * world, 0]]
        assert rank["stats"]["all_gather"] == {
            "calls": 4,
            "values": 10 + 256,
            "bytes_sent": (world - 1) * (48 + 160),  # 10 values of fp32, and 8 bytes up to the next 16; 5 bits a value
            "bytes_bf16": 2 * (world - 1) * (10 + 256),
            "paths": {"all-gather": 2, "exact": 2},
            "backends": {"numba": 2},
            "fallbacks": {"empty message": 2},
        }


def test_infinity_reaches_every_rank_as_non_finite_and_stays_where_it_was(ranks):
    for rank in ranks:
        for y in rank["poisoned"]:
            assert not y[3, 3].isfinite() and y[:3].isfinite().all()
        assert rank["poisoned"][0][3, :32].isnan().all() and rank["poisoned"][0][3, 32:].isfinite().all()


def test_changing_and_empty_shapes(ranks):
    inputs = [_changing(rank) for rank in range(len(ranks))]
    for step, calls in enumerate(zip(*inputs, strict=True)):
        simulated = lowbit.simulate.all_gather([x for x, _ in calls], "int5:g32", dim=calls[0][1])
        assert all(same_bits(rank["changing"][step], simulated) for rank in ranks)


def test_bad_input_is_refused_with_value_and_remedy(ranks):
    expected = [
        "dim is 2, and x has shape (2, 3): give a whole number from -2 to 1",
        "dim is -3",
        "dim is 0.0",
        "x has shape (), and no dimension to work along: pass x.reshape(1)",
        "dtype float64",
        "requires grad",
        "got NoneType",
    ]
    for rank in ranks:
        assert len(rank["refused"]) == len(expected)
        assert all(part in message for part, message in zip(expected, rank["refused"], strict=True))


def _subgroups(rank, world):
    three, alone = dist.new_group([0, 2, 3]), dist.new_group([1])
    x = sample(rank, (6, 96), torch.bfloat16, "transposed")
    everyone = lowbit.all_gather(x, "int4:g32", dim=1)
    lowbit.reset_stats()
    part = lowbit.all_gather(x, "int4:g32", group=alone if rank == 1 else three)
    stats = lowbit.stats()["all_gather"]
    exact = communicator(None, lowbit.CommConfig("int2:g32", "exact")).all_gather(x, -1, site="b")
    return [everyone, part, [stats["paths"], stats["fallbacks"], stats["bytes_bf16"]], exact, lowbit.stats()["b"]]


def test_subgroups_a_group_of_one_and_exact():
    ranks = run_ranks(4, _subgroups)
    parts = [sample(rank, (6, 96), torch.bfloat16) for rank in range(4)]
    for rank, (everyone, part, stats, exact, counted) in enumerate(ranks):
        assert same_bits(everyone, lowbit.simulate.all_gather(parts, "int4:g32", dim=1))
        if rank == 1:
            assert torch.equal(part, parts[1]) and stats == [{"exact": 1}, {"world of one rank": 1}, 0]
        else:
            assert same_bits(part, lowbit.simulate.all_gather([parts[r] for r in (0, 2, 3)], "int4:g32"))
            assert stats == [{"all-gather": 1}, {}, 2 * 2 * 6 * 96]
        assert torch.equal(exact, torch.cat(parts, 1))
        assert counted["paths"] == {"exact": 1} and counted["fallbacks"] == {}
        assert counted["bytes_sent"] == counted["bytes_bf16"] == 3 * 6 * 96 * 2
