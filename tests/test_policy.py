"""The policy is a pure function of facts that all ranks share."""

import itertools
from dataclasses import replace

import pytest

from megatron_lowbit.collectives.topology import Nodes
from megatron_lowbit.config import ALGORITHMS, CommConfig
from megatron_lowbit.errors import ConfigError
from megatron_lowbit.evaluation.cases import Case
from megatron_lowbit.links import EXACT_MOST, EXACT_UNIT, LINKS, NEVER, UNKNOWN, named
from megatron_lowbit.plan_file import Plan
from megatron_lowbit.policy import Decision, Facts, bypass, choose, chunks, gated
from tests.calibrations import random_calibration
from tests.tuned_tables import table

PLACES = [(device, link.name) for device, kinds in LINKS.items() for link in kinds] + [("xpu", UNKNOWN)]


def smallest(algorithm, limit, spec, world, device, link):
    """Written out: the bytes from which a message is compressed."""
    if limit is not None:
        return limit
    if algorithm != "auto":
        return 0
    kind = next(kind for kind in LINKS.get(device, LINKS["cpu"]) if kind.name == link)
    column = 2 if "trellis" in spec else 1
    row = [row for row in kind.worth if row[0] <= max(2, world)][-1]
    return max(kind.eligible, row[column])


def test_over_the_whole_input_space():
    for algorithm, limit, world, spec, (device, link), site, paired in itertools.product(
        ALGORITHMS,
        (None, 0, 1000),
        range(1, 9),
        ("int4:g32", "gauss4:g128:trellis", "int8/gauss4:trellis"),
        PLACES,
        ("a.mlp", "a.attention"),
        (False, True),
    ):
        config = CommConfig(spec, algorithm=algorithm, min_bytes=limit, sites=("*.mlp",))
        size = 2 - world % 2  # of a node
        nodes = Nodes.of([rank // size for rank in range(world)]) if paired else None
        nested = paired and size == 2 and world > 2
        facts = Facts(world, device, link, nodes)
        least = smallest(algorithm, limit, spec, world, device, link)
        for nbytes in {0, 2, 999, 1000, least - 1, least, 1 << 30}:
            decision = choose(config, site, nbytes, facts)
            assert decision == choose(config, site, nbytes, Facts(world, device, link, nodes))
            compressed = algorithm != "exact" and world > 1 and site == "a.mlp" and nbytes > 0 and nbytes >= least
            assert (decision.algorithm != "exact") == compressed
            assert (decision.fallback is None) == (compressed or algorithm == "exact")
            if compressed and algorithm == "auto":
                assert decision.algorithm == ("hierarchical" if nested else "one-shot" if world == 2 else "two-step")
            elif compressed:
                assert decision.algorithm == ("two-step" if algorithm == "hierarchical" and not nested else algorithm)


@pytest.mark.parametrize(
    "names, nested, equal",
    [("aaaa", False, True), ("abcd", False, True), ("aabb", True, True), ("abab", True, True), ("aaab", False, False),
     ("ab", False, True), ("aa", False, True), ("aaabbb", True, True), ("aabbc", False, False)],
)  # fmt: skip
def test_nodes_in_nodes_are_reduced_hierarchically(names, nested, equal):
    facts = Facts(len(names), nodes=Nodes.of(names))
    flat = "one-shot" if len(names) == 2 else "two-step"
    size, of = 1 << 30, lambda config: choose(config, "s", 1 << 30, facts).algorithm
    assert of(CommConfig("int4:g32")) == ("hierarchical" if nested else flat)
    assert of(CommConfig("int4:g32", "two-step")) == "two-step"
    assert choose(CommConfig("int4:g32", sites="other"), "s", size, facts).algorithm == "exact"
    assert of(CommConfig("int4:g32", plan=None, outer_spec="int3")) == ("hierarchical" if nested else flat)
    plan = Plan({"s": "int8"}, tp=len(names), algorithm="two-step")
    assert of(CommConfig(plan=plan)) == "two-step"
    if not equal:
        sizes = {"aaab": "3, 1", "aabbc": "2, 2, 1"}[names]
        for config in (CommConfig("int4:g32", "hierarchical"), CommConfig(plan=plan, algorithm="hierarchical")):
            with pytest.raises(ConfigError, match=f"as many ranks each, and these have {sizes}: .*'two-step'"):
                of(config)
        return
    assert of(CommConfig("int4:g32", "hierarchical")) == ("hierarchical" if nested else "two-step")
    assert of(CommConfig(plan=plan, algorithm="hierarchical")) == ("hierarchical" if nested else "two-step")


def test_auto_is_hierarchical_only_if_every_spec_can_travel_so():
    facts = Facts(4, nodes=Nodes.of("aabb"))
    calibration = random_calibration(["s", "t"], 4, 128, "1/64")
    for spec, expected in (("selective4", "two-step"), ("int4:outliers=1/64", "hierarchical")):
        config = CommConfig(spec, calibration=calibration)
        assert choose(config, "s", 1 << 30, facts).algorithm == expected
    plan = Plan({"s": "int8", "t": "selective4"}, tp=4)
    assert choose(CommConfig(plan=plan, calibration=calibration), "s", 1 << 30, facts).algorithm == "two-step"


def test_two_thresholds_and_each_has_its_reason():
    config = CommConfig("int4:g32")
    fast = named("cpu", "fast")
    assert 0 < fast.eligible < fast.worth_from(config.legs_at(None), 2) < NEVER
    facts = Facts(2, "cpu", "fast")
    assert choose(config, "s", fast.eligible - 1, facts) == Decision("exact", "below min_bytes")
    assert choose(config, "s", fast.eligible, facts) == Decision("exact", "link too fast for the codec")
    assert choose(config, "s", fast.worth_from(config.legs_at(None), 2), facts).algorithm == "one-shot"
    assert not gated(CommConfig(min_bytes=0)) and not gated(CommConfig(algorithm="one-shot")) and gated(config)


def test_a_plan_travels_by_the_algorithm_that_it_was_made_for():
    for made, world, expected in (("two-step", 2, "two-step"), ("one-shot", 4, "one-shot"), ("auto", 4, "two-step")):
        plan = Plan({"s": "int8"}, tp=world, algorithm=made)
        config, facts = CommConfig(plan=plan), Facts(world)
        assert choose(config, "s", 1 << 30, facts).algorithm == expected
        assert Case(CommConfig(plan=plan, min_bytes=0), world).algorithm == expected
        limit = named("cpu", UNKNOWN).eligible  # for small messages "auto" is what it was
        assert choose(config, "s", limit - 1, facts).algorithm == "exact"
    assert choose(CommConfig(algorithm="one-shot", plan=plan), "s", 1 << 30, facts).algorithm == "one-shot"


@pytest.mark.parametrize(
    "config, site, world, empty, decision",
    [
        (CommConfig(), "a", 2, False, None),
        (CommConfig(min_bytes=1 << 40), "a", 2, False, None),  # sizes differ between the ranks of an all-to-all
        (CommConfig(algorithm="exact"), "a", 2, False, Decision("exact")),
        (CommConfig(), "a", 1, True, Decision("exact", "world of one rank")),
        (CommConfig(sites="b"), "a", 2, True, Decision("exact", "site not selected")),
        (CommConfig(), "a", 2, True, Decision("exact", "empty message")),
    ],
)
def test_reasons_that_hold_whatever_the_size(config, site, world, empty, decision):
    assert bypass(config, site, world, empty) == decision


@pytest.mark.parametrize("world", (2, 3, 4))
def test_larger_messages_have_more_chunks_and_small_ones_one(world):
    for link in LINKS["cpu"]:
        unit, facts = link.unit[world > 2], Facts(world, "cpu", link.name)
        assert [chunks(nbytes, facts) for nbytes in (1, unit, 4 * unit, 16 * unit + 1)] == [1, 1, 2, 4]
        assert choose(CommConfig(min_bytes=0), "s", 16 * unit, facts).chunks == 4
        assert choose(CommConfig(min_bytes=0), "s", 16 * unit, replace(facts, world=8)).chunks <= 4
        assert choose(CommConfig(algorithm="exact"), "s", 16 * unit, facts).chunks == 0
    nested = Facts(4, nodes=Nodes.of("aabb"))
    found = [choose(CommConfig("int4:g32", name), "s", 32 << 20, nested) for name in ("two-step", "hierarchical")]
    assert [decision.chunks for decision in found] == [8, 4]  # which has twice as many exchanges
    assert chunks(1 << 30, Facts(world, "cuda")) == 0  # the backend's own collectives: nothing else was measured there


def test_a_tuned_table_decides_in_place_of_thresholds_over_the_whole_input_space():
    tuned = table({16384: "exact", 65536: "one-shot/1", 1 << 20: "two-step/2"})

    def expected(config, nbytes, dtype, without):
        """Written out; `without`: what is decided without a table."""
        if config.algorithm != "auto" or config.min_bytes is not None or nbytes == 0:
            return without
        if config.spec != "int4:g32" or dtype != "bf16":
            return without
        if nbytes < 65536:
            return Decision("exact", "exact is faster (tuned)")
        return Decision("one-shot", None, round(nbytes / 65536)) if nbytes < 1 << 20 else Decision(
            "two-step", None, round(2 * nbytes / (1 << 20))
        )  # fmt: skip

    for algorithm, limit, world, spec, dtype, (device, link), nbytes in itertools.product(
        ALGORITHMS, (None, 0, 1000), (2, 3, 8), ("int4:g32", "int8:g128"), ("bf16", "fp16", "fp32"), PLACES,
        (0, 2, 16383, 16384, 65535, 65536, 1 << 20, 64 << 20),
    ):  # fmt: skip
        config, facts = CommConfig(spec, algorithm=algorithm, min_bytes=limit), Facts(world, device, link)
        without = choose(config, "s", nbytes, facts, dtype)
        found = choose(config, "s", nbytes, replace(facts, tuned=tuned), dtype)
        assert found == expected(config, nbytes, dtype, without)
    config = CommConfig(sites=("a",))
    assert choose(config, "b", 1 << 20, Facts(2, tuned=tuned)) == Decision("exact", "site not selected")
    assert choose(config, "a", 1 << 20, Facts(1, tuned=tuned)) == Decision("exact", "world of one rank")


def test_of_a_plan_a_tuned_table_may_choose_its_own_algorithm_or_exact():
    tuned = table({65536: "one-shot/1", 1 << 20: "two-step/2"})
    for made, algorithms in (("one-shot", ["one-shot", "exact"]), ("two-step", ["exact", "two-step"])):
        facts = Facts(2, tuned=tuned)
        config = CommConfig(plan=Plan({"s": "int4:g32", "t": "exact", "u": "int8:g128"}, tp=2, algorithm=made))
        assert [choose(config, "s", nbytes, facts).algorithm for nbytes in (65536, 1 << 20)] == algorithms
        assert choose(config, "t", 1 << 20, facts) == Decision("exact", "exact in the plan")
        assert choose(config, "u", 1 << 20, facts).algorithm == made  # the table lacks it: sizes decide


def test_an_outer_spec_was_not_measured():
    config, facts = CommConfig("int4:g32", outer_spec="int2:g32"), Facts(4, nodes=Nodes.of("aabb"))
    tuned = replace(facts, tuned=table({4096: "two-step/2"}))
    for nbytes in (4096, 1 << 20):
        assert choose(config, "s", nbytes, tuned) == choose(config, "s", nbytes, facts)
    assert choose(config, "s", 1 << 20, tuned).algorithm == "hierarchical"


def test_a_calibration_of_one_leg_may_travel_one_shot_only():
    config = CommConfig("selective4", calibration=random_calibration(["s"], 2, 64, "1/64", sums=False))
    facts = Facts(2, tuned=table({65536: "one-shot/1", 1 << 20: "two-step/2"}, spec="selective4"))
    assert [choose(config, "s", nbytes, facts).algorithm for nbytes in (65536, 1 << 20)] == ["one-shot", "exact"]


def test_how_exact_messages_travel_over_the_whole_input_space():
    def way(algorithm, limit, world, paired, nbytes, link):
        """Written out."""
        if algorithm != "auto" or limit is not None or world == 1 or nbytes == 0:
            return ""
        once, most = (EXACT_MOST, 0) if world == 2 else link.direct
        if nbytes <= once:
            return "one-shot"
        return "" if nbytes > most or (paired and world in (4, 8)) else "two-step"  # pairs share their uplinks

    found = set()
    for algorithm, limit, world, site, paired, dtype, link in itertools.product(
        ALGORITHMS, (None, 0, 1000), (1, 2, 3, 4, 8), ("a.mlp", "a.attention"), (False, True), ("bf16", "fp32"),
        LINKS["cpu"],
    ):  # fmt: skip
        config = CommConfig("int4:g32", algorithm=algorithm, min_bytes=limit, sites=("*.mlp",))
        nodes = Nodes.of([rank // 2 for rank in range(world)]) if paired and world % 2 == 0 else None
        facts, (once, most) = Facts(world, "cpu", link.name, nodes), link.direct
        sizes = {
            0,
            2,
            999,
            1000,
            once,
            once + 1,
            most,
            most + 1,
            EXACT_MOST + 1,
            link.eligible - 1,
            link.eligible,
            5 << 20,
        }
        for nbytes in sizes | {1 << 30}:
            torchs = choose(config, site, nbytes, facts, dtype)
            ours = choose(config, site, nbytes, replace(facts, direct=True), dtype)
            assert torchs.way == "" and (ours.algorithm, ours.fallback) == (torchs.algorithm, torchs.fallback)
            if ours.algorithm != "exact":
                assert ours == torchs  # what is compressed is not decided here
                continue
            assert torchs == Decision("exact", torchs.fallback) and torchs.chunks == 0
            assert ours.way == way(algorithm, limit, world, paired, nbytes, link)
            parts = max(1, round((nbytes / EXACT_UNIT) ** 0.5)) if world == 2 else 1
            assert ours.chunks == (parts if ours.way else 0)
            found.add((ours.way, ours.fallback))
    reasons = {"below min_bytes", "link too fast for the codec", "site not selected"}
    assert found >= {(way, reason) for way in ("one-shot", "two-step") for reason in reasons} | {("", None)}


def test_what_a_plan_or_a_tuned_table_leaves_exact_goes_the_same_way():
    facts = Facts(2, tuned=table({16384: "exact", 65536: "one-shot/1"}), direct=True)
    exact = Decision("exact", "exact is faster (tuned)", 1, "one-shot")
    assert choose(CommConfig("int4:g32"), "s", 16384, facts) == exact
    config = CommConfig(plan=Plan({"s": "exact", "t": "int8"}, tp=2))
    assert choose(config, "s", 9 * EXACT_UNIT, facts) == Decision("exact", "exact in the plan", 3, "one-shot")
    for nbytes, way in ((32 << 10, "one-shot"), ((32 << 10) + 1, "two-step")):
        assert choose(config, "t", nbytes, Facts(3, direct=True)).way == way
    assert choose(CommConfig(algorithm="exact"), "s", 1 << 20, facts) == Decision("exact")
