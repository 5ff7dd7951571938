"""Counted traffic against what real ranks' telemetry counts, and against formulas written out by hand."""

import os

import pytest
import torch

import megatron_lowbit as lowbit
from megatron_lowbit.errors import ConfigError
from megatron_lowbit.tuning import cost_model, traffic
from tests.ranks import run_ranks

SPECS = ["int4:g32", "int8:g128", "gauss4:g128", "int4:g32/int8:g128", "gauss4:g128:trellis", "nvfp4"]
ROWS, FEATURES = 48, 4096  # so that shards are equal among 2, 3 and 4 ranks


def _sent(rank, world):
    x = torch.randn(ROWS, FEATURES).bfloat16()
    found = {}
    for spec in SPECS:
        for algorithm in ("one-shot", "two-step"):
            lowbit.reset_stats()
            lowbit.all_reduce(x, spec, algorithm=algorithm, min_bytes=0)
            (site,) = lowbit.stats().values()
            assert list(site["paths"]) == [algorithm]
            found[f"{spec} {algorithm}"] = site["bytes_sent"]
    return found


@pytest.mark.parametrize("world", [2, 3, 4])
def test_modelled_bytes_are_those_that_ranks_send(world):
    for found in run_ranks(world, _sent):
        for spec in SPECS:
            for algorithm in ("one-shot", "two-step"):
                way = cost_model.Way.of(spec, algorithm)
                expected = cost_model.bytes_sent(way, 2 * ROWS * FEATURES, world)
                assert found[f"{spec} {algorithm}"] == pytest.approx(expected, rel=2e-3), (spec, algorithm)


def _sent_between_nodes(rank, world):
    os.environ["LOWBIT_NODE"] = str(rank // 2)  # nodes of two ranks
    x, found = torch.randn(ROWS, FEATURES).bfloat16(), {}
    for spec in SPECS:
        for outer in (None, "int3:g32/int8:g64"):
            lowbit.reset_stats()
            lowbit.all_reduce(x, spec, algorithm="hierarchical", outer_spec=outer, min_bytes=0)
            (site,) = lowbit.stats().values()
            assert list(site["paths"]) == ["hierarchical"]
            found[f"{spec} {outer}"] = site["bytes_sent"]
    return found


def test_modelled_bytes_of_nodes_are_those_that_ranks_send():
    for found in run_ranks(4, _sent_between_nodes):
        for spec in SPECS:
            for outer in (None, "int3:g32/int8:g64"):
                way = cost_model.Way.of(spec, "hierarchical", outer)
                expected = cost_model.bytes_sent(way, 2 * ROWS * FEATURES, 4, node=2)
                assert found[f"{spec} {outer}"] == pytest.approx(expected, rel=2e-3), (spec, outer)


def test_hops_by_hand():
    assert traffic.hops("one-shot", 1200, 3) == [traffic.Hop("scatter", 1200, 2, 0, 1200, 3600)]
    assert traffic.hops("two-step", 1200, 3) == [
        traffic.Hop("scatter", 400, 2, 0, 1200, 1200),
        traffic.Hop("gather", 400, 2, 0, 400, 1200),
    ]
    # Two nodes of three ranks: shards of 400, parts of 200.
    assert traffic.hops("hierarchical", 1200, 6, 3) == [
        traffic.Hop("scatter", 400, 2, 0, 1200, 1200),
        traffic.Hop("outer scatter", 200, 0, 1, 400, 400),
        traffic.Hop("outer gather", 200, 0, 1, 200, 0),
        traffic.Hop("outer gather", 400, 2, 0, 0, 1200),
    ]
    assert traffic.ring_bytes(1200, 3) == 1600


def test_flat_algorithms_cross_between_nodes():
    (scatter, gather) = traffic.hops("two-step", 1200, 6, 3)
    assert (scatter.inside, scatter.between) == (gather.inside, gather.between) == (2, 3)
    assert traffic.hops("two-step", 1200, 2, 3)[0].between == 0  # fewer ranks than a node has


@pytest.mark.parametrize("world, node", [(4, None), (4, 4), (4, 3), (4, 1)])
def test_hierarchical_wants_several_equal_nodes(world, node):
    with pytest.raises(ConfigError, match="several equal nodes"):
        traffic.hops("hierarchical", 1200, world, node)


def test_unknown_algorithm():
    with pytest.raises(ConfigError, match="'ring' is not modelled: use one of exact, one-shot"):
        traffic.hops("ring", 1200, 4)
