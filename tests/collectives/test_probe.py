"""The rate of a group's links is one number, the same for all ranks, and decides what a message has to gain."""

import os

import torch
import torch.distributed as dist

import megatron_lowbit as lowbit
from megatron_lowbit import links
from megatron_lowbit.collectives import probe, topology
from megatron_lowbit.communicator import communicator
from tests.ranks import run_ranks


def _rates(rank, world):
    group = dist.group.WORLD
    first, again = probe.gbit_per_second(group), probe.gbit_per_second(group)
    return [first, again]


def test_all_ranks_have_the_same_rate_and_measure_once():
    results = run_ranks(3, _rates)
    assert all(first == again == results[0][0] > 0 for first, again in results)


def _links(rank, world, names, forced):
    if names:
        topology.host_name = lambda: names[rank]  # in this rank's process only
    if forced:
        os.environ["LOWBIT_LINK"] = forced
    found = [
        communicator(None, lowbit.CommConfig(**o)).facts.link for o in ({}, {"min_bytes": 0}, {"algorithm": "exact"})
    ]
    x = torch.ones(1024, 1024, dtype=torch.bfloat16)
    lowbit.all_reduce(x, "gauss4:g128:trellis")
    return [*found, dict(lowbit.stats()["all_reduce"]["fallbacks"])]


def test_ranks_on_several_hosts_measure_and_those_of_one_do_not():
    assert run_ranks(2, _links, None, "")[0][:3] == [links.UNKNOWN] * 3
    several = run_ranks(2, _links, ("a", "b"), "")
    assert several[0] == several[1]
    assert several[0][0] in [link.name for link in links.LINKS["cpu"]] and several[0][0] != links.UNKNOWN
    assert several[0][:3] == [several[0][0], several[0][0], links.UNKNOWN]  # what is exact need not know


def test_a_fast_link_keeps_a_slow_codec_from_being_used():
    for result in run_ranks(2, _links, None, "fast"):
        assert result[0] == "fast" and result[3] == {"link too fast for the codec": 1}
    assert run_ranks(2, _links, None, "slow")[0][3] == {}
