"""Who shares a node."""

import re

import pytest

from megatron_lowbit.collectives.topology import Nodes, host_name, node_name
from megatron_lowbit.errors import ConfigError


def test_ranks_are_grouped_by_their_nodes_names():
    assert Nodes.of(["a", "a", "b", "b"]).members == ((0, 1), (2, 3))
    assert Nodes.of(["b", "a", "b", "a"]).members == ((0, 2), (1, 3))


def test_only_several_equal_nodes_of_several_ranks_are_nested():
    assert Nodes.of("aabb").nested and Nodes.of("abcabc").nested
    for names in ("aaaa", "abcd", "aab", "a"):
        assert not Nodes.of(names).nested
    assert not Nodes.of("aab").equal and Nodes.of("ab").equal


def test_a_node_is_a_host_and_its_network_unless_it_is_named(monkeypatch):
    monkeypatch.delenv("LOWBIT_NODE", raising=False)
    assert node_name() == host_name() and len(node_name()) > 8
    monkeypatch.setenv("LOWBIT_NODE", "left")
    assert node_name() == "left" != host_name()


def test_nodes_are_a_number_of_equal_ones_or_the_ranks_nodes_names():
    assert Nodes.among(4, 1).members == ((0, 1, 2, 3),)
    assert Nodes.among(6, 2).members == ((0, 1, 2), (3, 4, 5))
    assert Nodes.among(4, "abab") == Nodes.among(4, ["x", "y", "x", "y"]) == Nodes.of("abab")
    for nodes in (0, -1, 3, "aab", [], 2.0, None, True):
        with pytest.raises(ConfigError, match=f"nodes is {re.escape(repr(nodes))}"):
            Nodes.among(4, nodes)
