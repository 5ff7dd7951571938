"""The policy is a pure function of facts that all ranks share."""

import itertools

import pytest

from megatron_lowbit.config import ALGORITHMS, CommConfig
from megatron_lowbit.evaluation.cases import Case
from megatron_lowbit.plan_file import Plan
from megatron_lowbit.policy import CHUNK_BYTES, MIN_BYTES, Decision, bypass, choose, chunks, minimum


def test_over_the_whole_input_space():
    for algorithm, limit, world, nbytes, device, site in itertools.product(
        ALGORITHMS,
        (None, 0, 1000),
        range(1, 9),
        (0, 2, 999, 1000, 1 << 30),
        ("cpu", "cuda", "xpu"),
        ("a.mlp", "a.attention"),
    ):
        config = CommConfig(algorithm=algorithm, min_bytes=limit, sites=("*.mlp",))
        decision = choose(config, site, nbytes, world, device)
        compressed = (
            algorithm != "exact" and world > 1 and site == "a.mlp" and nbytes > 0 and nbytes >= minimum(config, device)
        )
        assert (decision.algorithm != "exact") == compressed
        assert (decision.fallback is None) == (compressed or algorithm == "exact")
        if compressed and algorithm == "auto":
            assert decision.algorithm == ("one-shot" if world == 2 else "two-step")
        elif compressed:
            assert decision.algorithm == algorithm


def test_a_plan_travels_by_the_algorithm_that_it_was_made_for():
    for made, world, expected in (("two-step", 2, "two-step"), ("one-shot", 4, "one-shot"), ("auto", 4, "two-step")):
        plan = Plan({"s": "int8"}, tp=world, algorithm=made)
        config = CommConfig(plan=plan)
        assert choose(config, "s", 1 << 30, world, "cpu").algorithm == expected
        assert Case(CommConfig(plan=plan, min_bytes=0), world).algorithm == expected
        limit = MIN_BYTES["cpu"][0]  # for small messages "auto" is what it was
        assert minimum(config, "cpu") == limit and choose(config, "s", limit - 1, world, "cpu").algorithm == "exact"
    assert choose(CommConfig(algorithm="one-shot", plan=plan), "s", 1 << 30, world, "cpu").algorithm == "one-shot"


@pytest.mark.parametrize("device", MIN_BYTES)
def test_auto_has_a_measured_threshold_and_a_named_algorithm_none(device):
    limit, source = MIN_BYTES[device]
    assert minimum(CommConfig(), device) == limit > 0 and len(source) > 20
    assert minimum(CommConfig(algorithm="two-step"), device) == 0
    assert choose(CommConfig(), "s", limit - 1, 2, device) == Decision("exact", "below min_bytes")
    assert choose(CommConfig(), "s", limit, 2, device).algorithm == "one-shot"


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


def test_larger_messages_have_more_chunks_and_small_ones_one():
    size, source = CHUNK_BYTES["cpu"]
    assert len(source) > 20
    assert [chunks(nbytes, "cpu") for nbytes in (1, size, 2 * size, 16 * size + 1)] == [1, 1, 2, 16]
    assert chunks(1 << 30, "cuda") == 0  # the backend's own collectives: nothing else was measured there
    assert choose(CommConfig(min_bytes=0), "s", 4 * size, 2, "cpu").chunks == 4
    assert choose(CommConfig(algorithm="exact"), "s", 4 * size, 2, "cpu").chunks == 0
