"""The model against times worked out by hand for round numbers, its limits, and what must always hold of it."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lowbit.errors import ConfigError
from megatron_lowbit.tuning import machines
from megatron_lowbit.tuning.cost_model import (
    EXACT,
    LLAMA_3_8B,
    Cost,
    Transformer,
    Way,
    all_reduce,
    bits,
    fastest,
    time_per_token,
    time_to_first_token,
)
from megatron_lowbit.tuning.machines import CodecSpeed, Exact, Host, Link, Machine

BIG = 1e30
MB = 1_000_000
# 100 MB/s, 1 ms an exchange; codecs 1 GB/s and 2 GB/s, 3 ms to start.
PLAIN = Machine("round numbers", "made up", "cuda", Link(100 * MB, 1e-3), CodecSpeed(1e9, 2e9, 3e-3), Exact(5e-3))
INT4 = Way.of("int4:g32", "two-step", chunks=1)  # 5 bits
WAYS = [Way.of("int4:g32", "one-shot"), Way.of("int4:g32/int8:g128", "two-step"), Way.of("gauss4:g128", "two-step")]


def test_exact_by_hand():
    cost = all_reduce(PLAIN, EXACT, 8 * MB, 4)
    assert cost.wire == pytest.approx(2 * 3 / 4 * 8 / 100) and cost.codec == cost.host == 0
    assert cost.total == pytest.approx(0.12 + 5e-3)
    stepwise = replace(PLAIN, exact=Exact(5e-3, 2e-3, 1e-8), host=Host(cores=2))
    cost = all_reduce(stepwise, EXACT, 8 * MB, 4)  # 12 MB, 6 steps, two ranks a core
    assert cost.start == pytest.approx(5e-3 + 2 * 6 * 2e-3) and cost.host == pytest.approx(2 * 12 * MB * 1e-8)
    assert cost.total == pytest.approx(cost.start + 0.24)  # the processor takes longer than the wire


def test_one_shot_by_hand():
    cost = all_reduce(PLAIN, Way.of("int4:g32", "one-shot", chunks=1), 8 * MB, 2)
    assert cost.wire == pytest.approx(8 * 5 / 16 / 100)
    assert cost.codec == pytest.approx(8 / 1000 + 2 * 8 / 2000)
    assert cost.total == pytest.approx(0.025 + 0.016 + 3e-3 + 1e-3)


def test_two_step_by_hand():
    cost = all_reduce(PLAIN, Way.of("int4:g32/int8:g32", "two-step", chunks=1), 8 * MB, 4)
    assert bits(INT4.spec.scatter) == 5 and cost.wire == pytest.approx(3 * 2 * (5 + 9) / 16 / 100)
    assert cost.codec == pytest.approx((8 + 2) / 1000 + 16 / 2000)
    assert cost.start == pytest.approx(3e-3 + 2 * 1e-3)


def test_meshes_send_to_all_at_once():
    mesh = replace(PLAIN, link=replace(PLAIN.link, mesh=True))
    for way in (EXACT, INT4, WAYS[0]):
        assert all_reduce(PLAIN, way, 8 * MB, 4).wire == pytest.approx(3 * all_reduce(mesh, way, 8 * MB, 4).wire)


def test_hierarchical_by_hand():
    nodes = replace(PLAIN, node=2, outer=Link(10 * MB, 7e-3))
    way = Way.of("int4:g32", "hierarchical", "int8:g32", chunks=1)
    cost = all_reduce(nodes, way, 8 * MB, 4)
    inside = 4 * (5 + 9) / 16 / 100  # half of the message with 5 bits, and half with the outer spec's 9
    assert cost.wire == pytest.approx(inside + 2 * 2 * 2 * 9 / 16 / 10)  # both ranks of a node, two hops, 2 MB each
    assert cost.codec == pytest.approx((8 + 4 + 2) / 1000 + (8 + 4 + 8) / 2000)
    assert cost.start == pytest.approx(3e-3 + 2 * 1e-3 + 2 * 7e-3)
    exact = all_reduce(nodes, EXACT, 8 * MB, 4)
    assert exact.wire == pytest.approx(8 / 10)
    assert all_reduce(replace(nodes, device="cpu"), EXACT, 8 * MB, 4).wire == pytest.approx(2 * 3 / 4 * 8 / 10)
    two_step = all_reduce(nodes, INT4, 8 * MB, 4)  # each of a node's two ranks sends 2 MB to two others, twice
    assert two_step.wire == pytest.approx(2 * 2 * 2 * 2 * 5 / 16 / 10) and two_step.total > cost.total / 1.5


def test_outer_spec_is_that_of_the_spec_if_not_given():
    nodes = replace(PLAIN, node=2, outer=Link(10 * MB, 7e-3))
    one, other = Way.of("int4:g32", "hierarchical"), Way.of("int4:g32", "hierarchical", "int4:g32")
    assert all_reduce(nodes, one, 8 * MB, 4) == all_reduce(nodes, other, 8 * MB, 4)


def test_overlap_by_hand():
    assert Cost(wire=3.0, codec=2.0, host=1.0, start=0.5).total == 5.5  # one after the other: 2 + 3
    assert Cost(wire=3.0, codec=2.0, host=1.0, start=0.5, chunks=1000).total == pytest.approx(3.502)
    assert Cost(wire=3.0, codec=2.0, host=1.0, start=0.5, chunks=2).total == 4.5
    assert Cost(wire=1.0, codec=2.0, host=3.0).total == 5.0
    assert "modelled" in str(Cost(wire=1.0))


def test_ranks_that_share_cores_take_turns():
    own = replace(PLAIN, host=Host(None, 1e-3, 1e-8))
    shared = replace(PLAIN, host=Host(2, 1e-3, 1e-8))
    one, two = (all_reduce(machine, INT4, 8 * MB, 4) for machine in (own, shared))
    assert one.host == pytest.approx(6 * 1e-3 + 3 * 2 * 2 * MB * 5 / 16 * 1e-8)  # 3 others, two hops
    assert (two.codec, two.host, two.wire) == pytest.approx((2 * one.codec, 2 * one.host, one.wire))
    chunked = all_reduce(own, replace(INT4, chunks=5), 8 * MB, 4)
    assert chunked.host - one.host == pytest.approx(4 * 6 * 1e-3)


def test_chunks_are_those_of_the_policy():
    machine = machines.shaped(1)
    assert all_reduce(machine, Way.of("int4:g32", "one-shot"), 64 << 20, 2).chunks > 2
    assert all_reduce(machine, Way.of("int4:g32", "one-shot"), 1 << 10, 2).chunks == 1
    assert all_reduce(machines.named("H100 NVLink"), INT4, 64 << 20, 2).chunks == 1


@pytest.mark.parametrize("way", [EXACT, *WAYS])
def test_limits(way):
    fast_links = replace(PLAIN, link=Link(BIG, 0.0), codec=CodecSpeed(1e9, 2e9, 0.0), exact=Exact(0.0))
    cost = all_reduce(fast_links, way, 8 * MB, 4)
    assert cost.total == pytest.approx(cost.codec)
    fast_codecs = replace(PLAIN, link=Link(100 * MB, 0.0), codec=CodecSpeed(BIG, BIG, 0.0), exact=Exact(0.0))
    cost = all_reduce(fast_codecs, way, 8 * MB, 4)
    assert cost.total == pytest.approx(cost.wire)


@pytest.mark.parametrize("machine", machines.described().values(), ids=lambda machine: machine.name)
@pytest.mark.parametrize("way", [EXACT, *WAYS])
def test_nothing_costs_nothing(machine, way):
    assert all_reduce(machine, way, 0, 4).total == all_reduce(machine, way, MB, 1).total == 0


@given(
    st.sampled_from(list(machines.described().values())), st.sampled_from([EXACT, *WAYS]), st.integers(1, 1 << 32),
    st.integers(1, 1 << 32), st.integers(2, 64), st.floats(1.0, 1e6),
)  # fmt: skip
def test_more_takes_longer(machine, way, one, other, world, times):
    small, large = sorted((one, other))
    # One chunk: another number of them may well make a larger message cheaper.
    whole = replace(way, chunks=1)
    less, more = (all_reduce(machine, whole, nbytes, world).total for nbytes in (small, large))
    assert 0 < less <= more * (1 + 1e-12)
    faster = replace(machine, link=replace(machine.link, rate=machine.link.rate * times))
    assert all_reduce(faster, whole, small, world).total <= less * (1 + 1e-12)
    assert all_reduce(machine, whole, 2 * small, world).total <= 2 * less * (1 + 1e-12)


@given(st.sampled_from(WAYS), st.integers(1, 1 << 32), st.integers(2, 64), st.integers(1, 64))
def test_overlap_is_never_worse_than_its_bounds(way, nbytes, world, parts):
    machine = replace(PLAIN, codec=replace(PLAIN.codec, overlap=True))
    cost = all_reduce(machine, replace(way, chunks=parts), nbytes, world)
    assert cost.start + max(cost.wire, cost.codec) <= cost.total * (1 + 1e-12)
    assert cost.total <= (cost.start + cost.wire + cost.codec + cost.host) * (1 + 1e-12)


@pytest.mark.parametrize("nbytes, world", [(-1, 2), (float("nan"), 2), (1, 0)])
def test_bad_input(nbytes, world):
    with pytest.raises(ConfigError, match="give a size from 0 up and at least one rank"):
        all_reduce(PLAIN, INT4, nbytes, world)
    with pytest.raises(ConfigError, match="'ring' is not modelled"):
        all_reduce(PLAIN, Way("ring"), 10, 2)


def test_the_fastest_is_exact_where_nothing_gains():
    assert fastest(replace(PLAIN, exact=Exact(4e-3)), [INT4], 100, 4) is EXACT
    assert fastest(PLAIN, [INT4], 80 * MB, 4) is INT4


def test_time_to_first_token_by_hand():
    machine = replace(PLAIN, flops=1e12, memory=1e10)
    model = Transformer("tiny", parameters=1e9, layers=10, hidden=1000)
    step = time_to_first_token(machine, EXACT, model, tokens=100, world=2, batch=3)
    products, attention = 2 * 1e9 * 300, 10 * 3 * 2 * (2 * 100 * 100 * 1000) / 2  # QK and PV, half is masked
    assert step.compute == pytest.approx((products + attention) / 2 / 1e12)
    assert step.communication == pytest.approx(20 * all_reduce(machine, EXACT, 300 * 1000 * 2, 2).total)
    assert step.total == step.compute + step.communication and step.share == step.communication / step.total
    assert "modelled" in str(step) and "communication" in str(step)
    assert time_to_first_token(machine, EXACT, model, 100, 1).share == 0


def test_time_per_token_by_hand():
    machine = replace(PLAIN, flops=1e12, memory=1e10)
    model = Transformer("tiny", parameters=1e9, layers=10, hidden=1000)
    step = time_per_token(machine, EXACT, model, world=2)
    assert step.compute == pytest.approx(2e9 / 2 / 1e10)  # reading the weights
    assert step.communication == pytest.approx(20 * all_reduce(machine, EXACT, 2000, 2).total)
    assert time_per_token(machine, EXACT, model, 2, batch=1000).compute == pytest.approx(2e9 * 1000 / 2 / 1e12)


def test_unknown_speed_is_an_error():
    for function, what in ((lambda: time_to_first_token(PLAIN, EXACT, LLAMA_3_8B, 9, 2), "flops"),
                           (lambda: time_per_token(PLAIN, EXACT, LLAMA_3_8B, 2), "memory")):  # fmt: skip
        with pytest.raises(ConfigError, match=f"'round numbers' has no {what}"):
            function()


def test_less_communication_gains_what_its_share_allows():
    machine = machines.named("4x L40S, PCIe 4")
    exact, low = (time_to_first_token(machine, way, LLAMA_3_8B, 4096, 4) for way in (EXACT, INT4))
    assert low.compute == exact.compute and 1 < exact.total / low.total < 1 / (1 - exact.share)
