"""Who shares a node."""

from megatron_lowbit.collectives.topology import Nodes, host_name, node_name


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
