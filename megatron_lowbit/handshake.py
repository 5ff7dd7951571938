"""What the ranks of a group find out about each other before their first collective, and then all know alike.

They compare versions and settings, tell each other where they run, connect (collectives/connect.py), measure their
links where those are between hosts (collectives/probe.py), and hear from rank 0 what was tuned for such a group.
"""

from __future__ import annotations

import warnings
import weakref
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist

from . import links, policy, tuned_lookup
from .codecs import backend
from .collectives import connect, exchange, probe, topology
from .config import CommConfig
from .tuned_table import Key

PROTOCOL = 4  # of the wire formats, of how messages are cut into shards and chunks, and of how these travel
_compared: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()


def meet(group: dist.ProcessGroup, config: CommConfig) -> policy.Facts:
    """A collective call. Raises RankError naming both sides if two ranks disagree, ConfigError for nodes that do not
    fit the algorithm and for variables of the environment that are not understood."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    device = "cuda" if str(dist.get_backend(group)) == "nccl" else "cpu"  # a group of both serves CPU tensors too
    forced = links.from_environment(device)
    tuned = tuned_lookup.source(config.tuned_table) if policy.gated(config) else tuned_lookup.NONE
    settings = _settings(config, device)
    settings |= {"link": forced and forced.name, "tuned": tuned, "transport": connect.transport()}
    own = {"node": topology.node_name(), "host": topology.host_name()}
    connects = device == "cpu" and world > 1 and config.algorithm != "exact" and not connect.tried(group)
    with connect.Listener() if connects and settings["transport"] == connect.TCP else nullcontext() as listener:
        own["invitation"] = listener and listener.invitation
        everyone = exchange.compare(settings, group, group not in _compared, own)
        _compared.add(group)
        if listener:
            _connect(group, listener, [own["invitation"] for own in everyone])
    facts = policy.Facts(world, device, nodes=topology.Nodes.of([own["node"] for own in everyone]))
    policy.algorithm(config, world, facts.nodes)  # says at once if nodes do not fit it
    facts = replace(facts, direct=connect.mesh(group) is not None)
    if forced:
        facts = replace(facts, link=forced.name)
    elif device == "cpu" and len({own["host"] for own in everyone}) > 1 and config.algorithm != "exact":
        facts = replace(facts, link=links.reaching(probe.gbit_per_second(group)).name)
    if tuned != tuned_lookup.NONE and world > 1:
        told = tuned_lookup.told(config.tuned_table, key(group, facts)) if rank == 0 else {}
        facts = replace(facts, tuned=tuned_lookup.heard(exchange.compare({}, group, own=told)[0]))
    return facts


def key(group: dist.ProcessGroup, facts: policy.Facts) -> Key:
    """What a tuned table of the group is made for, as this rank sees it."""
    nodes, device = tuple(map(len, facts.nodes.members)), torch.device(facts.device)
    name = group._get_backend(device).name()  # a group without a named one has one for each device
    if facts.device == "cpu" and facts.world > 1 and not facts.direct:
        name += "-torch"  # takes other times than over the ranks' own connections
    return tuned_lookup.key_of(device, facts.world, nodes, name, PROTOCOL)


def _settings(config: CommConfig, device: str) -> dict:
    """What must be alike on all ranks."""
    from . import __version__

    return {
        "version": __version__,
        "protocol": PROTOCOL,
        "spec": config.spec,
        "algorithm": policy.wanted(config),
        "size gate": "on" if policy.gated(config) else "off",  # also off if what a plan wants is named
        "outer_spec": config.outer_spec,
        "min_bytes": config.min_bytes,
        "sites": config.sites and list(config.sites),
        "calibration": config.calibration_digest,
        "plan": config.plan_digest,
        "tuned table": config.tuned_digest,
        "backend": backend.of(torch.device(device)),
    }


def _connect(group: dist.ProcessGroup, listener: connect.Listener, invitations: list) -> None:
    """The group's own connections, on every rank or on none."""
    mesh, why = listener.connect(group, invitations)
    reasons = [own["why"] for own in exchange.compare({}, group, own={"why": why})]
    if lost := [f"rank {rank}: {why}" for rank, why in enumerate(reasons) if why]:
        mesh = mesh and mesh.close()
        if dist.get_rank(group) == 0:
            warnings.warn(
                "the ranks cannot reach each other directly, so bytes go by torch.distributed, which is slower: name "
                "the right interface with GLOO_SOCKET_IFNAME, open the ports between the hosts, or say "
                f"LOWBIT_TRANSPORT=torch ({'; '.join(lost)})",
                stacklevel=6,
            )
    connect.keep(group, mesh)
