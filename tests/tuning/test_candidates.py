"""The list of what is compared: written out, and the same whenever it is asked for."""

import pytest

from megatron_lowbit.collectives.topology import Nodes
from megatron_lowbit.tuning import candidates as module
from megatron_lowbit.tuning.candidates import SIZES, candidates

ONE, TWO, UNEVEN = (Nodes.of(names) for names in ("aaaa", "aabb", "aaab"))


@pytest.fixture(autouse=True)
def algorithms(monkeypatch):
    monkeypatch.setattr(module, "ALGORITHMS", ("auto", "one-shot", "two-step", "hierarchical", "exact"))


@pytest.mark.parametrize(
    "nodes, device, nbytes, expected",
    [
        (ONE, "cpu", 16384, "exact one-shot/1 two-step/1"),
        (TWO, "cpu", 16384, "exact one-shot/1 two-step/1 hierarchical/1"),
        (UNEVEN, "cpu", 1 << 20, "exact one-shot/1 two-step/1"),
        (ONE, "cpu", 4 << 20, "exact one-shot/1 one-shot/4 two-step/1 two-step/4"),
        (ONE, "cpu", 64 << 20, "exact one-shot/1 one-shot/16 one-shot/64 two-step/1 two-step/16 two-step/64"),
        (TWO, "cuda", 64 << 20, "exact one-shot/0 two-step/0 hierarchical/0"),
    ],
)
def test_exact_first_and_then_what_the_nodes_allow(nodes, device, nbytes, expected):
    assert [str(one) for one in candidates(nodes, device, nbytes)] == expected.split()
    assert candidates(nodes, device, nbytes) == candidates(nodes, device, nbytes)


def test_sizes_are_those_of_decoding_up_to_those_of_long_prompts():
    assert SIZES[0] == 16 << 10 and SIZES[-1] == 64 << 20 and list(SIZES) == sorted(SIZES)
