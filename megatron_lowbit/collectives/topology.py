"""Which ranks of a group share a node: told by LOWBIT_NODE, else by the host and the network namespace of a process."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError


@dataclass(frozen=True)
class Nodes:
    """members: the group's ranks, node by node, each in ascending order; nodes in the order of their first ranks."""

    members: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, names: Sequence[object]) -> Nodes:
        """names: of each rank's node."""
        return cls(
            tuple(tuple(rank for rank, name in enumerate(names) if name == node) for node in dict.fromkeys(names))
        )

    @classmethod
    def among(cls, world: int, nodes: int | Sequence[object]) -> Nodes:
        """nodes: how many equal ones `world` ranks are in, the first ranks in the first; or the name of each rank's.

        Raises ConfigError.
        """
        if type(nodes) is int:
            if nodes < 1 or world % nodes:
                raise ConfigError(f"nodes is {nodes}, and {world} ranks cannot be on so many equally: give a divisor")
            nodes = [rank * nodes // world for rank in range(world)]
        if not isinstance(nodes, Sequence) or len(nodes) != world:
            raise ConfigError(
                f"nodes is {nodes!r}: give the number of nodes, or for each of the {world} ranks the name of its node"
            )
        return cls.of(nodes)

    @property
    def sizes(self) -> str:
        """For messages."""
        return ", ".join(str(len(node)) for node in self.members)

    @property
    def equal(self) -> bool:
        """Whether all have as many ranks."""
        return len({len(node) for node in self.members}) == 1

    @property
    def nested(self) -> bool:
        """Whether there are several, equal ones, of several ranks: what a hierarchical algorithm needs."""
        return len(self.members) > 1 and self.equal and len(self.members[0]) > 1


def node_name() -> str:
    """Of the node this process runs on, unlike any other's."""
    return os.environ.get("LOWBIT_NODE") or host_name()


def host_name() -> str:
    """Of the host and the network this process uses: containers with a network of their own are hosts too."""
    return f"{_host()} {_network()}"


def _host() -> str:
    """Hosts may bear one name; what they were booted as is theirs alone."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _network() -> int:
    try:
        return os.stat("/proc/self/ns/net").st_ino
    except OSError:
        return 0
