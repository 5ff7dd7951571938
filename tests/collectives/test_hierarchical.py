"""Nodes in nodes: real ranks end with the simulation's bits, and the simulation with those of a few plain lines."""

import itertools
import os
from unittest import mock

import pytest
import torch

import megatron_lowbit as lowbit
from megatron_lowbit import policy
from megatron_lowbit.collectives import hierarchical
from megatron_lowbit.collectives.exchange import Workspace
from megatron_lowbit.collectives.topology import Nodes
from megatron_lowbit.communicator import communicator
from megatron_lowbit.spec import parse
from tests.calibrations import random_calibration
from tests.ranks import run_ranks

SPECS = [
    ("int4:g32", None),
    ("int4:g32/int8:g64", None),
    ("int5:g32/int8:g64", "int3:g32"),
    ("int4:g128/bf16", "gauss3:g128/int6:g32"),
    ("gauss4:g128", "gauss3:g128"),  # one transform from end to end
    ("nvfp4", "gauss2:g128:trellis"),
    ("int4:g64:spike", "fp32"),
    ("mxfp4/int8", "fp8/mxfp8"),
]
CASES = [(spec, outer, shape) for spec, outer in SPECS for shape in ((7, 128), (3, 5, 96))]
CASES += [("int5:g32/int8:g64", "int3:g32", shape) for shape in ((1, 64), (2, 32), (130,), (40, 256))]
LAYOUTS = ["aabb", "abab", "abba", "aaabbb", "abcbca"]
MORE = [pytest.param(names, marks=pytest.mark.slow) for names in ("ababab", "aabbcc", "abbaab")]


def partial(rank: int, shape, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def legs_of(spec, outer):
    outer = parse(outer or spec)
    return [lowbit.codec(str(leg)) for leg in (parse(spec).scatter, outer.scatter, outer.gather)]


def by_hand(partials, spec, outer, names):
    """Whole messages through `encode` and `decode`: cutting them changes nothing, as no group crosses rows.

    For codecs without a transform, which legs might share.
    """
    inside, scatter, gather = legs_of(spec, outer)
    x = partials[0]
    total = torch.zeros(x.shape)
    for number, node in enumerate(dict.fromkeys(names)):
        own = [inside.decode(inside.encode(p), x.shape, torch.float32) for p, n in zip(partials, names) if n == node]
        of_node = own[0]
        for values in own[1:]:
            of_node = of_node + values
        arrived = scatter.decode(scatter.encode(of_node), x.shape, torch.float32)
        total = arrived if number == 0 else total + arrived
    return gather.decode(gather.encode(total), x.shape, x.dtype)


@pytest.mark.parametrize("names", LAYOUTS)
def test_the_simulation_is_what_a_few_lines_give(names):
    for (spec, outer, shape), dtype in itertools.product(CASES, (torch.bfloat16, torch.float32)):
        if "gauss" in f"{spec} {outer}":
            continue
        partials = [partial(rank, shape, dtype) for rank in range(len(names))]
        found = lowbit.simulate.all_reduce(partials, spec, "hierarchical", nodes=list(names), outer_spec=outer)
        assert torch.equal(found, by_hand(partials, spec, outer, names)), (spec, outer, shape, dtype)


def _every_way(rank, world, names):
    import torch.distributed as dist

    group, workspace, nodes, found, sent = dist.group.WORLD, Workspace(), Nodes.of(names), [], []
    for spec, outer, shape in CASES:
        x, legs = partial(rank, shape), hierarchical.Legs(*legs_of(spec, outer))
        in_one_go = hierarchical.in_one_go(x, legs, nodes, group, workspace)
        found.append(in_one_go.result(x))
        for count in (1, 3):
            result, nbytes = hierarchical.in_chunks(x, legs, nodes, count, group, workspace)
            assert torch.equal(result, found[-1]), (spec, outer, shape, count)
            if count == 1:
                sent.append([nbytes, in_one_go.sent])
    return {"found": found, "sent": sent}


@pytest.mark.parametrize("names", [*LAYOUTS, *MORE])
def test_ranks_end_with_the_bits_of_the_simulation_in_chunks_and_in_one_go(names):
    ranks = run_ranks(len(names), _every_way, names)
    results = iter(zip(*(rank["found"] for rank in ranks), strict=True))
    for spec, outer, shape in CASES:
        partials = [partial(rank, shape) for rank in range(len(names))]
        expected = lowbit.simulate.all_reduce(partials, spec, "hierarchical", nodes=list(names), outer_spec=outer)
        assert all(torch.equal(result, expected) for result in next(results)), (spec, outer, shape)


def test_the_error_is_within_three_roundings():
    """Each leg's error is at most half of its steps: those of a rank's groups, of a node's sum's, and of the sum's."""
    partials = [partial(rank, (16, 128), torch.float32) for rank in range(6)]
    found = lowbit.simulate.all_reduce(partials, "int6:g32", "hierarchical", nodes=2, outer_spec="int5:g32")
    exact = torch.stack(partials).sum(0)

    def half_step(x: torch.Tensor, bits: int) -> torch.Tensor:
        groups = x.unflatten(-1, (-1, 32))
        spread = groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)
        return (spread / (2**bits - 1) / 2).expand_as(groups).flatten(-2)

    nodes = [torch.stack(partials[start : start + 3]).sum(0) for start in (0, 3)]
    bound = sum(half_step(x, 6) for x in partials) + sum(half_step(x, 5) for x in nodes) + half_step(exact, 5)
    assert bool(
        ((found - exact).abs() <= 1.25 * bound).all()
    )  # scales are bf16, and sums of decoded values a bit wider
    coarse = lowbit.simulate.all_reduce(partials, "int6:g32", "hierarchical", nodes=2, outer_spec="int2:g32")
    assert (coarse - exact).norm() > 2 * (found - exact).norm()


def _as_users_call_it(rank, world, names, chunks):
    os.environ["LOWBIT_NODE"] = names[rank]
    x, found, options = partial(rank, (96, 128)), {}, {"algorithm": "hierarchical", "min_bytes": 0}
    with mock.patch.object(policy, "chunks", lambda *_: chunks):
        for name, spec, outer in (("one", "int4:g32", None), ("two", "int5:g32/int8:g32", "int3:g32")):
            lowbit.reset_stats()
            found[name] = lowbit.all_reduce(x, spec, outer_spec=outer, **options)
            found[name + " stats"] = lowbit.stats()["all_reduce"]
        lowbit.reset_stats()
        found["auto"] = lowbit.all_reduce(x, "int4:g32", min_bytes=0)
        found["broken"] = lowbit.all_reduce(broken(rank), "int4:g32", **options)
        found["empty"] = lowbit.all_reduce(x[:0], "int4:g32", **options)
        residual, weight = partial(10, (96, 128)), partial(11, (128,))
        found["normed"] = list(lowbit.all_reduce_add_rmsnorm(x, residual, weight, "int4:g32", **options))
    found["stats"] = lowbit.stats()["all_reduce"]
    return found


def broken(rank):
    x = partial(rank, (96, 128))
    if rank == 1:
        x[3, 5], x[20, 100] = torch.nan, torch.inf
    return x


@pytest.mark.parametrize("names, chunks", [("aabb", 0), ("abab", 3), ("abbaba", 1)])
def test_a_communicator_finds_the_nodes_and_takes_the_way(names, chunks):
    ranks, world = run_ranks(len(names), _as_users_call_it, names, chunks), len(names)
    partials = [partial(rank, (96, 128)) for rank in range(world)]
    simulated = lambda x, spec, outer=None: lowbit.simulate.all_reduce(  # noqa: E731
        x, spec, "hierarchical", nodes=list(names), outer_spec=outer
    )
    one = simulated(partials, "int4:g32")
    spoilt = simulated([broken(rank) for rank in range(world)], "int4:g32")
    assert spoilt[3, 5].isnan() and not spoilt[20, 100].isfinite() and spoilt[4].isfinite().all()
    shard, part = 96 * 128 // (world // 2), 96 * 128 // world  # values; two nodes
    for found in ranks:
        assert torch.equal(found["one"], one) and torch.equal(found["auto"], one)
        assert torch.equal(found["two"], simulated(partials, "int5:g32/int8:g32", "int3:g32"))
        assert torch.equal(found["broken"].view(torch.int16), spoilt.view(torch.int16))  # NaNs too
        assert found["empty"].shape == (0, 128)
        summed = (one.float() + partial(10, (96, 128)).float()).bfloat16()
        assert torch.equal(found["normed"][1], summed)
        assert torch.equal(found["normed"][0], ranks[0]["normed"][0])
        assert found["stats"]["paths"] == {"hierarchical": 3, "exact": 1}
        assert found["one stats"]["paths"] == found["two stats"]["paths"] == {"hierarchical": 1}
        # Inside: all shards but the own. Between: a part each way. Inside again: two parts, to all others.
        others = world // 2 - 1
        sent = (others * shard + 2 * part + others * 2 * part) * 5 // 8
        assert found["one stats"]["bytes_sent"] == pytest.approx(sent, rel=0.02)  # sections are aligned
        sent = (others * shard * 6 + (2 * part + others * 2 * part) * 4) // 8
        assert found["two stats"]["bytes_sent"] == pytest.approx(sent, rel=0.02)


def _in_a_subgroup(rank, world):
    import torch.distributed as dist

    os.environ["LOWBIT_NODE"] = "abcabc"[rank]
    group = dist.new_group([1, 2, 4, 5])  # of nodes b, c, b, c
    if rank in (0, 3):
        return {}
    result = lowbit.all_reduce(partial(rank, (5, 96)), "int4:g32", group, "hierarchical")
    return {"result": result, "paths": lowbit.stats()["all_reduce"]["paths"]}


def test_a_subgroup_has_the_nodes_of_its_own_ranks():
    ranks = run_ranks(6, _in_a_subgroup)
    partials = [partial(rank, (5, 96)) for rank in (1, 2, 4, 5)]
    expected = lowbit.simulate.all_reduce(partials, "int4:g32", "hierarchical", nodes="bcbc")
    assert not torch.equal(expected, lowbit.simulate.all_reduce(partials, "int4:g32", "hierarchical", nodes="bbcc"))
    for rank in (1, 2, 4, 5):
        assert torch.equal(ranks[rank]["result"], expected) and ranks[rank]["paths"] == {"hierarchical": 1}


def _with_outliers(rank, world):
    os.environ["LOWBIT_NODE"] = "aabb"[rank]
    config = lowbit.CommConfig("int4:outliers=1/16", "hierarchical", 0, calibration=random_calibration(["s"], 4, 128))
    results = []
    for chunks in (0, 2):
        with mock.patch.object(policy, "chunks", lambda *_, chunks=chunks: chunks):
            results.append(communicator(None, config).all_reduce(partial(rank, (9, 128)), "s"))
    return {"results": results, "paths": lowbit.stats()["s"]["paths"]}


def test_outliers_stay_split_off_all_the_way():
    ranks, partials = run_ranks(4, _with_outliers), [partial(rank, (9, 128)) for rank in range(4)]
    calibration = random_calibration(["s"], 4, 128)
    spec, options = "int4:outliers=1/16", {"nodes": 2, "calibration": calibration, "site": "s"}
    expected = lowbit.simulate.all_reduce(partials, spec, "hierarchical", **options)
    for rank in ranks:
        assert all(torch.equal(result, expected) for result in rank["results"])
        assert rank["paths"] == {"hierarchical": 2}


def _refused(rank, world):
    os.environ["LOWBIT_NODE"] = "aaab"[rank]
    with pytest.raises(lowbit.ConfigError, match=r"as many ranks each, and these have 3, 1: start as many on each"):
        lowbit.all_reduce(partial(rank, (4, 64)), "int4:g32", algorithm="hierarchical")
    flat = lowbit.all_reduce(partial(rank, (4, 64)), "int4:g32", min_bytes=0)
    os.environ["LOWBIT_NODE"] = "aabb"[rank]
    with pytest.raises(lowbit.RankError, match="ranks disagree on outer_spec: rank 0 has 'int3:g32', rank 1 has None"):
        lowbit.all_reduce(partial(rank, (4, 64)), "int4:g32", outer_spec="int3" if rank == 0 else None)
    return {"flat": flat, "paths": lowbit.stats()["all_reduce"]["paths"]}


def test_unequal_nodes_and_other_specs_are_refused_on_every_rank():
    expected = lowbit.simulate.all_reduce([partial(rank, (4, 64)) for rank in range(4)], "int4:g32", "two-step")
    for rank in run_ranks(4, _refused):
        assert torch.equal(rank["flat"], expected) and rank["paths"] == {"two-step": 1}
