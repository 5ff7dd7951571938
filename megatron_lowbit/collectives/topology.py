"""Which ranks of a group share a node: told by LOWBIT_NODE, else by the host and the network namespace of a process."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Nodes:
    """members: the group's ranks, node by node, each in ascending order; nodes in the order of their first ranks."""

    members: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, names: Sequence[str]) -> Nodes:
        """names: of each rank's node."""
        return cls(
            tuple(tuple(rank for rank, name in enumerate(names) if name == node) for node in dict.fromkeys(names))
        )

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
