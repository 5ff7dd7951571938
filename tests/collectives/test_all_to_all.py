"""All-to-all on real ranks: the bits of the simulation and of the definition; even, uneven and one-sided splits."""

import itertools

import pytest
import torch
import torch.distributed as dist

import megatron_lowbit as lowbit
from megatron_lowbit.communicator import communicator
from tests.ranks import run_ranks
from tests.tensors import DTYPES, STRIDES, same_bits, sample, tolerance

SPECS = {"int4:g32": 4, "int6:g64:sym/int2:g32": 5, "bf16": 8, "fp16/int2:g32": 10, "fp32": 16}  # and bits of accuracy


def matrices(world: int) -> list[list[list[int]]]:
    """[sender][receiver] -> rows."""
    each, generator = range(world), torch.Generator().manual_seed(world)
    return [
        torch.randint(0, 5, (world, world), generator=generator).tolist(),
        [[s + 1] * world for s in each],
        [[0] * world if s == 0 else [3] * world for s in each],  # one sends nothing, and receives
        [[0 if r == 1 else 2 + s for r in each] for s in each],  # one receives nothing, and sends
        [[s + r if r != s else 0 for r in each] for s in each],  # nobody keeps anything
        [[0] * world for _ in each],
    ]


def cases(world: int):
    """(rows from whom to whom, trailing shape, dtype, strides)."""
    kinds = itertools.product(matrices(world), [(96,), (2, 33), (), (1,)])
    for number, (rows, trailing) in enumerate(kinds):
        yield rows, trailing, DTYPES[number % 3], STRIDES[number % len(STRIDES)]


def received(rows: list[list[int]], rank: int) -> list[int]:
    return [sent[rank] for sent in rows]


def uneven(world: int) -> list[list[int]]:
    """Everyone sends one row to each rank, but to the last one as many as the sender's number says, and one more."""
    return [[1] * (world - 1) + [1 + sender] for sender in range(world)]


def definition(inputs: list[torch.Tensor], spec: str, rows: list[list[int]]) -> list[torch.Tensor]:
    codec, world = lowbit.codec(spec.split("/")[0]), len(inputs)
    pieces = [x.split(sent) for x, sent in zip(inputs, rows, strict=True)]
    return [
        torch.cat([codec.decode(codec.encode(p[rank]), p[rank].shape, p[rank].dtype) for p in pieces])
        for rank in range(world)
    ]


def _session(rank, world):
    results, torchs = [], []
    for rows, trailing, dtype, strides in cases(world):
        x = sample(rank, (sum(rows[rank]), *trailing), dtype, strides)
        before, own = x.clone(), torch.empty(sum(received(rows, rank)), *trailing)
        dist.all_to_all_single(own, x.float().contiguous(), received(rows, rank), rows[rank])
        torchs.append(own)
        for spec in SPECS:
            results.append(
                lowbit.all_to_all(x, spec, output_splits=received(rows, rank), input_splits=tuple(rows[rank]))
            )
        assert torch.equal(x, before), "the input was written to"
    x = sample(rank, (2 * world, 3, 64), torch.float32)
    ragged = sample(rank, (world * (rank + 1), 64), torch.float32)
    lowbit.reset_stats()
    integers = torch.randint(-9, 9, (world, 5), generator=torch.Generator().manual_seed(rank)).float()
    exact, own = lowbit.all_to_all(integers, "fp32"), torch.empty(world, 5)
    dist.all_to_all_single(own, integers)
    rows = uneven(world)
    lowbit.all_to_all(torch.ones(sum(rows[rank]), 64), "int4:g32", None, received(rows, rank), rows[rank])
    nothing = lowbit.all_to_all(torch.zeros(0, 7), "int4:g32")
    empty = lowbit.all_to_all(torch.zeros(2 * world, 0), "int4:g32")
    stats = lowbit.stats()
    poisoned = torch.ones(2 * world, 64)
    poisoned[1, 3] = torch.nan if rank == 1 else 1.0
    return {
        "results": results,
        "torch": torchs,
        "even": lowbit.all_to_all(x, "int4:g32"),
        "evenly sent": lowbit.all_to_all(ragged, "int4:g32", output_splits=[*range(1, world + 1)]),
        "integers": [exact, own],
        "empty": [nothing, empty],
        "stats": stats,
        "poisoned": [lowbit.all_to_all(poisoned, spec) for spec in ("int4:g32", "int8:g64:sym", "fp32")],
        "changing": [
            lowbit.all_to_all(x, "int5:g32", output_splits=received(rows, rank), input_splits=rows[rank])
            for x, rows in _changing(rank, world)
        ],
        "refused": list(_refused(rank, world)),
    }


def _changing(rank, world):
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        rows = torch.randint(0, 4, (world, world), generator=generator).tolist()
        features = int(torch.randint(0, 70, (1,), generator=generator))
        yield sample(100 * rank + step, (sum(rows[rank]), features), torch.bfloat16), rows


def _refused(rank, world):
    x, even = torch.zeros(2 * world, 3), [2] * world
    for bad, output_splits, input_splits in (
        (torch.zeros(2 * world + 1, 3), None, None),
        (x, even, [2] * (world - 1) + [3]),
        (x, even, [2] * (world + 1)),
        (x, [2] * (world - 1), even),
        (x, even, [-1, 5] + [2] * (world - 2)),
        (x, [2.0] * world, even),
        (x, even, torch.tensor(even)),
        (x, [True] * world, even),
        (x, even, []),
        (x, None, even),
        (x, [3] * world, even),
        (torch.tensor(1.0), None, None),
        (torch.tensor(1.0), even, even),
        (x.long(), None, None),
        (x.clone().requires_grad_(), None, None),
        ("x", None, None),
    ):
        try:
            lowbit.all_to_all(bad, "int4:g32", output_splits=output_splits, input_splits=input_splits)
        except lowbit.ConfigError as error:
            yield str(error)


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request):
    return run_ranks(request.param, _session)


def test_ranks_hold_what_the_definition_and_the_simulation_say(ranks):
    world = len(ranks)
    results = [iter(rank["results"]) for rank in ranks]
    for number, (rows, trailing, dtype, strides) in enumerate(cases(world)):
        inputs = [sample(rank, (sum(rows[rank]), *trailing), dtype, strides) for rank in range(world)]
        for spec, bits in SPECS.items():
            simulated, defined = lowbit.simulate.all_to_all(inputs, spec, rows), definition(inputs, spec, rows)
            error = max(tolerance(x, bits) for x in inputs)
            for rank in range(world):
                result, case = next(results[rank]), (rows, trailing, dtype, strides, spec)
                assert result.is_contiguous() and same_bits(result, simulated[rank]), case
                assert same_bits(result, defined[rank]), case
                assert torch.allclose(result.float(), ranks[rank]["torch"][number], rtol=0, atol=error), case


def test_without_splits_all_pieces_are_equal(ranks):
    world = len(ranks)
    inputs = [sample(rank, (2 * world, 3, 64), torch.float32) for rank in range(world)]
    for rank, y in zip(ranks, lowbit.simulate.all_to_all(inputs, "int4:g32"), strict=True):
        assert same_bits(rank["even"], y)


def test_without_input_splits_x_is_cut_equally(ranks):
    world = len(ranks)
    inputs = [sample(rank, (world * (rank + 1), 64), torch.float32) for rank in range(world)]
    for rank, y in zip(ranks, lowbit.simulate.all_to_all(inputs, "int4:g32"), strict=True):
        assert same_bits(rank["evenly sent"], y) and y.shape == (sum(range(1, world + 1)), 64)


def test_integers_in_fp32_arrive_as_they_are(ranks):
    for rank in ranks:
        assert torch.equal(*rank["integers"])


def test_calls_and_bytes_are_counted(ranks):
    world, codec = len(ranks), lowbit.codec("int4:g32")
    for rank, result in enumerate(ranks):
        others = [rows for peer, rows in enumerate(uneven(world)[rank]) if peer != rank]
        assert [list(x.shape) for x in result["empty"]] == [[0, 7], [2 * world, 0]]
        assert result["stats"]["all_to_all"] == {
            "calls": 4,
            "values": 5 * world + 64 * (world + rank),
            "bytes_sent": (world - 1) * 32 + sum(codec.wire_nbytes((rows, 64)) for rows in others),
            "bytes_bf16": 2 * 5 * (world - 1) + 2 * 64 * sum(others),
            "paths": {"all-to-all": 3, "exact": 1},  # that this rank has nothing to send, the others do not know
            "backends": {"numba": 3},
            "fallbacks": {"empty message": 1},
        }
    assert codec.wire_nbytes((1, 64)) == 64


def test_nan_stays_and_stays_where_it_was(ranks):
    for rank, result in enumerate(ranks):
        for y in result["poisoned"]:
            if rank == 0:  # row 1 of rank 1's
                assert y[3, 3].isnan()
                y[3] = 0
            assert y.isfinite().all()


def test_changing_and_empty_shapes(ranks):
    for step, calls in enumerate(zip(*(_changing(rank, len(ranks)) for rank in range(len(ranks))), strict=True)):
        simulated = lowbit.simulate.all_to_all([x for x, _ in calls], "int5:g32", input_splits=calls[0][1])
        assert all(same_bits(rank["changing"][step], y) for rank, y in zip(ranks, simulated, strict=True))


def test_bad_input_is_refused_with_value_and_remedy(ranks):
    world = len(ranks)
    for rank, result in enumerate(ranks):
        own = f"rank {rank} sends itself 2 rows (input_splits) but expects 3 (output_splits): give one number for both"
        expected = [
            f"size {2 * world + 1} along dim 0, which {world} ranks cannot share equally: pad it to {3 * world}",
            f"{2 * world + 1} in all, but x has size {2 * world} along dim 0: give splits that sum up to it",
            f"input_splits is {[2] * (world + 1)}, {world + 1} numbers for {world} ranks: give one per rank",
            f"output_splits is {[2] * (world - 1)}, {world - 1} numbers for {world} ranks: give one per rank",
            "input_splits is [-1, 5",
            "output_splits is [2.0, 2.0",
            "input_splits is Tensor: give a list",
            "output_splits is [True, True",
            "input_splits is [], 0 numbers",
            "without output_splits: give both, as ranks know only their own",
            own,
            "x has shape (), and no dimension to work along: pass x.reshape(1)",
            "x has shape ()",
            "dtype int64",
            "requires grad",
            "got str",
        ]
        assert len(result["refused"]) == len(expected)
        assert all(part in message for part, message in zip(expected, result["refused"], strict=True))


def _subgroups(rank, world):
    three, alone = dist.new_group([0, 2, 3]), dist.new_group([1])
    x = sample(rank, (12, 96), torch.bfloat16)
    everyone = lowbit.all_to_all(x, "int4:g32")
    lowbit.reset_stats()
    part = lowbit.all_to_all(x, "int4:g32", group=alone if rank == 1 else three)
    stats = lowbit.stats()["all_to_all"]
    exact = communicator(None, lowbit.CommConfig("int2:g32", sites="a")).all_to_all(x, site="b")
    return [everyone, part, [stats["paths"], stats["fallbacks"], stats["bytes_bf16"]], exact, lowbit.stats()["b"]]


def test_subgroups_a_group_of_one_and_a_site_not_selected():
    ranks = run_ranks(4, _subgroups)
    inputs = [sample(rank, (12, 96), torch.bfloat16) for rank in range(4)]
    members = lowbit.simulate.all_to_all([inputs[r] for r in (0, 2, 3)], "int4:g32")
    for rank, (everyone, part, stats, exact, counted) in enumerate(ranks):
        assert same_bits(everyone, lowbit.simulate.all_to_all(inputs, "int4:g32")[rank])
        if rank == 1:
            assert torch.equal(part, inputs[1]) and stats == [{"exact": 1}, {"world of one rank": 1}, 0]
        else:
            assert same_bits(part, members[(0, 2, 3).index(rank)])
            assert stats == [{"all-to-all": 1}, {}, 2 * 8 * 96]
        assert torch.equal(exact, torch.cat([x[3 * rank : 3 * rank + 3] for x in inputs]))
        assert counted["paths"] == {"exact": 1} and counted["fallbacks"] == {"site not selected": 1}
        assert counted["bytes_sent"] == counted["bytes_bf16"] == 2 * 9 * 96
