"""What a case is said to send is what ranks send."""

import os

import pytest
import torch

import megatron_lowbit as lowbit
from megatron_lowbit.communicator import Communicator
from megatron_lowbit.errors import ConfigError
from megatron_lowbit.evaluation.cases import Case
from megatron_lowbit.plan_file import Plan
from tests.ranks import run_ranks

FEATURES = {"layers.0.attention": 64, "layers.0.mlp": 256}
TOKENS = 1024
SPECS = [("int4:g32", "one-shot"), ("int4:g32/int8:g128", "two-step"), ("gauss4:g128:trellis", "two-step")]


def config(spec: str, algorithm: str, tp: int) -> lowbit.CommConfig:
    if spec == "plan":
        plan = Plan({"layers.0.attention": "exact", "layers.0.mlp": "int3:g32/int6:g32"}, tp, algorithm)
        return lowbit.CommConfig(plan=plan, min_bytes=0)
    return lowbit.CommConfig(spec, algorithm, 0)


def sent(rank: int, world: int) -> list[float]:
    found = []
    for spec, algorithm in [*SPECS, ("plan", "two-step"), ("plan", "one-shot")]:
        lowbit.reset_stats()
        communicator = Communicator(None, config(spec, algorithm, world))
        for site, features in FEATURES.items():
            communicator.all_reduce(torch.randn(TOKENS, features, dtype=torch.bfloat16), site)
        found.append(sum(site["bytes_sent"] for site in lowbit.stats().values()) / TOKENS)
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_bytes_are_those_that_ranks_count(world):
    [counted, *_] = run_ranks(world, sent)
    for (spec, algorithm), own in zip([*SPECS, ("plan", "two-step"), ("plan", "one-shot")], counted, strict=True):
        case = Case(config(spec, algorithm, world), world)
        assert case.algorithm == algorithm
        assert case.bytes_per_token(FEATURES) == pytest.approx(own, rel=0.01), (spec, algorithm)


def sent_between_nodes(rank: int, world: int) -> list[float]:
    os.environ["LOWBIT_NODE"] = str(rank * 2 // world)
    found = []
    for outer in (None, "int3:g32/int6:g32"):
        lowbit.reset_stats()
        communicator = Communicator(None, lowbit.CommConfig("int4:g32/int8:g128", "auto", 0, outer_spec=outer))
        for site, features in FEATURES.items():
            communicator.all_reduce(torch.randn(TOKENS, features, dtype=torch.bfloat16), site)
        found.append(sum(site["bytes_sent"] for site in lowbit.stats().values()) / TOKENS)
    return found


@pytest.mark.parametrize("world", [4, 6])
def test_bytes_of_ranks_on_two_nodes(world):
    [counted, *_] = run_ranks(world, sent_between_nodes)
    for outer, own in zip((None, "int3:g32/int6:g32"), counted, strict=True):
        case = Case(lowbit.CommConfig("int4:g32/int8:g128", "auto", 0, outer_spec=outer), world, nodes=2)
        assert case.algorithm == "hierarchical" and case.hierarchy == {"nodes": 2, "outer_spec": outer}
        assert case.bytes_per_token(FEATURES) == pytest.approx(own, rel=0.01)


def test_nodes_make_a_case_only_if_it_is_hierarchical():
    config = lowbit.CommConfig("int4:g32", "two-step", 0)
    assert Case(config, 4, 2).key == Case(config, 4).key and Case(config, 4, 2).hierarchy["nodes"] is None
    nested = [Case(lowbit.CommConfig("int4:g32", "auto", 0, outer_spec=outer), 8, nodes)
              for nodes in (1, 2, 4) for outer in (None, "int3")]  # fmt: skip
    assert [case.algorithm for case in nested] == ["two-step"] * 2 + ["hierarchical"] * 4
    assert len({case.key for case in nested}) == 5
    with pytest.raises(ConfigError, match="nodes is 3, and 4 ranks cannot be on so many equally"):
        Case(config, 4, 3)


def test_refuses_what_is_no_case():
    with pytest.raises(ConfigError, match="TP is 1: give 2 or more"):
        Case(lowbit.CommConfig("int4", min_bytes=0), 1)
    with pytest.raises(ConfigError, match="min_bytes is None: give 0"):
        Case(lowbit.CommConfig("int4"), 2)
    with pytest.raises(ConfigError, match="was made for TP 4"):
        Case(config("plan", "two-step", 4), 2)


def test_whatever_changes_results_changes_the_key():
    cases = [
        Case(config(spec, algorithm, tp), tp)
        for spec, algorithm in [*SPECS, ("plan", "two-step"), ("plan", "one-shot")]
        for tp in (2, 4)
    ]
    cases += [Case(lowbit.CommConfig("int4:g32", "one-shot", 0, sites=sites), 2) for sites in (("a",), ("b",))]
    assert len({case.key for case in cases}) == len(cases)
    assert Case(lowbit.CommConfig("int4:g32", "auto", 0), 2).key == cases[0].key
