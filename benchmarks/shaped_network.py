"""Hosts on one machine, joined by links of a chosen rate: network namespaces, bridges, veth pairs and `tc tbf`.

Each host is a namespace with one interface, limited in both directions, as a network card is. The hosts of a node share
a bridge; bridges of several nodes are joined by uplinks with a rate of their own. Bridges live in a namespace of their
own too, so deleting the namespaces removes everything, whatever ended the program.

Hazard: names are made from the process id; what an earlier program that was killed by SIGKILL left behind is found by
its process being gone, and removed first.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from common import lowbit

PREFIX = "lowbit"
BURST = 64 << 10  # bytes that pass at once, at least
BURST_SECONDS = 0.5e-3  # and at least what the rate is in this time: with 64 KiB 5 Gbit/s reached 2.3, with 256 KiB 4.7
HEADERS = 4 << 10  # more than a packet's: tbf cuts a packet larger than its burst into frames, on the CPU
QUEUE_MS = 50


class NetworkError(Exception):
    """Why there is no shaped network here."""


@dataclass(frozen=True)
class Host:
    """command: what to put in front of a program so that it runs there."""

    name: str
    address: str
    interface: str
    node: int

    @property
    def command(self) -> tuple[str, ...]:
        return "ip", "netns", "exec", self.name


def check() -> None:
    """Raises NetworkError naming what is missing."""
    if os.geteuid() != 0:
        raise NetworkError("network namespaces need root")
    for tool in ("ip", "tc"):
        if not shutil.which(tool):
            raise NetworkError(f"there is no {tool}: install iproute2")
    trial = f"{PREFIX}-{os.getpid()}-t"
    made = subprocess.run(["ip", "netns", "add", trial], capture_output=True, text=True)
    if made.returncode:
        raise NetworkError(f"network namespaces cannot be made here ({made.stderr.strip()})")
    subprocess.run(["ip", "netns", "del", trial], check=False)


@contextmanager
def shaped_network(
    nodes: Sequence[int],
    rate_gbit: float,
    outer_gbit: float | None = None,
    delay_ms: float = 0.0,
    burst: int = BURST,
) -> Iterator[list[Host]]:
    """Hosts, node by node. nodes: how many hosts each has. rate_gbit: of each host's link. outer_gbit: of each node's
    uplink, if there are several. delay_ms: added to each packet a host sends. burst: bytes that pass at once, at least.

    Raises NetworkError. Removes everything on leaving, also on SIGTERM and Ctrl-C.
    """
    check()
    _remove_leftovers()
    own = f"{PREFIX}-{os.getpid()}"
    switch, hosts, made = f"{own}-s", [], []
    with _stopped_by_sigterm():
        try:
            _namespace(switch, made)
            _ip(switch, "link", "add", "core", "type", "bridge")
            _ip(switch, "link", "set", "core", "up")
            for node, count in enumerate(nodes):
                bridge = "core"
                if len(nodes) > 1:
                    bridge = f"node{node}"
                    _ip(switch, "link", "add", bridge, "type", "bridge")
                    _ip(switch, "link", "set", bridge, "up")
                    _veth(switch, f"up{node}", bridge, f"down{node}", "core")
                    for end in (f"up{node}", f"down{node}"):
                        _shape(switch, end, outer_gbit or rate_gbit, burst)
                for _ in range(count):
                    number = len(hosts)
                    host = Host(f"{own}-{number}", f"10.77.{node}.{number + 1}", "eth0", node)
                    _namespace(host.name, made)
                    _ip(
                        switch,
                        "link",
                        "add",
                        f"port{number}",
                        "type",
                        "veth",
                        "peer",
                        "name",
                        "eth0",
                        "netns",
                        host.name,
                    )
                    _ip(switch, "link", "set", f"port{number}", "master", bridge, "up")
                    _ip(host.name, "addr", "add", f"{host.address}/16", "dev", "eth0")
                    _ip(host.name, "link", "set", "eth0", "gso_max_size", str(burst - HEADERS), "up")
                    _ip(host.name, "link", "set", "lo", "up")
                    _shape(switch, f"port{number}", rate_gbit, burst)
                    _shape(host.name, "eth0", rate_gbit, burst, delay_ms)
                    hosts.append(host)
            yield hosts
        finally:
            with _unstoppable():
                for name in reversed(made):
                    _delete(name)


@contextmanager
def _handled(handler: Callable | signal.Handlers, *numbers: signal.Signals) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, its in before.items():
            signal.signal(number, its)


def _stopped_by_sigterm() -> AbstractContextManager[None]:
    """As by Ctrl-C: what is to be removed is removed."""
    return _handled(signal.default_int_handler, signal.SIGTERM)


def _unstoppable() -> AbstractContextManager[None]:
    """A second Ctrl-C does not end what tidies up, nor the tools it starts."""
    return _handled(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM)


def _namespace(name: str, made: list[str]) -> None:
    made.append(name)
    _run("ip", "netns", "add", name)


def _veth(namespace: str, one: str, its_bridge: str, other: str, others_bridge: str) -> None:
    _ip(namespace, "link", "add", one, "type", "veth", "peer", "name", other)
    _ip(namespace, "link", "set", one, "master", its_bridge, "up")
    _ip(namespace, "link", "set", other, "master", others_bridge, "up")


def _shape(namespace: str, interface: str, rate_gbit: float, burst: int, delay_ms: float = 0.0) -> None:
    rate, burst = f"{round(rate_gbit * 1e6)}kbit", max(burst, round(rate_gbit * 1e9 / 8 * BURST_SECONDS))
    tc = ("ip", "netns", "exec", namespace, "tc", "qdisc", "add", "dev", interface)
    _run(*tc, "root", "handle", "1:", "tbf", "rate", rate, "burst", str(burst), "latency", f"{QUEUE_MS}ms")
    if delay_ms:
        _run(*tc, "parent", "1:1", "handle", "10:", "netem", "delay", f"{delay_ms}ms", "limit", "100000")


def _ip(namespace: str, *command: str) -> None:
    _run("ip", "-n", namespace, *command)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NetworkError(f"{' '.join(command)} failed: {done.stderr.strip()}")


def _delete(name: str) -> None:
    for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
        try:
            os.kill(int(pid), signal.SIGKILL)  # a rank that hangs would keep the namespace alive
        except ProcessLookupError:
            pass
    subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _remove_leftovers() -> None:
    for line in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.splitlines():
        name = line.split()[0] if line.split() else ""
        found = re.fullmatch(rf"{PREFIX}-(\d+)-\w+", name)
        if found and not Path(f"/proc/{found[1]}").exists():
            _delete(name)


def run_ranks(hosts: Sequence[Host] | int, program: Sequence[str], seconds: float) -> str:
    """Start one rank of a program on each host, and wait -> what rank 0 printed. An int: so many ranks on loopback.

    Each finds RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and LOWBIT_NODE. Kills all of them if one fails, if the time
    is over, on SIGTERM or on Ctrl-C. Raises NetworkError with the end of what a failed rank said.
    """
    here = [Host("", "127.0.0.1", "lo", 0)] * hosts if isinstance(hosts, int) else hosts
    ranks, logs, port = [], [], _free_port(here[0])
    with _stopped_by_sigterm():
        try:
            for rank, host in enumerate(here):
                facts = {
                    "RANK": rank, "WORLD_SIZE": len(here), "MASTER_ADDR": here[0].address, "MASTER_PORT": port,
                    "GLOO_SOCKET_IFNAME": host.interface, "LOWBIT_NODE": host.node, "TORCH_CPP_LOG_LEVEL": "ERROR",
                    "OMP_NUM_THREADS": 1, "NUMBA_NUM_THREADS": 1,
                    "LOWBIT_TUNED": os.environ.get("LOWBIT_TUNED", "none"),  # not what this user tuned for another link
                }  # fmt: skip
                logs.append([tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")])
                command = [*(host.command if host.name else ()), sys.executable, *program]
                environment = os.environ | {name: str(value) for name, value in facts.items()}
                ranks.append(subprocess.Popen(command, env=environment, stdout=logs[-1][0], stderr=logs[-1][1]))
            _wait(ranks, logs, seconds)
            logs[0][0].seek(0)
            return logs[0][0].read()
        finally:
            with _unstoppable():
                for rank in ranks:
                    rank.kill()
                    rank.wait()
                for log in logs:
                    for file in log:
                        file.close()


def _wait(ranks: Sequence[subprocess.Popen], logs: Sequence[Sequence], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    codes = [None]
    while None in codes and not any(codes):
        if time.monotonic() > deadline:
            raise NetworkError(f"the ranks were not done within {seconds:.0f} s: measure fewer or smaller messages")
        time.sleep(0.05)
        codes = [rank.poll() for rank in ranks]
    if failed := [number for number, code in enumerate(codes) if code]:
        logs[failed[0]][1].seek(0)
        raise NetworkError(f"rank {failed[0]} failed: {logs[failed[0]][1].read()[-2000:].strip()}")


def _free_port(host: Host) -> int:
    """One that nobody listens on; in a namespace of one's own any does."""
    if host.name:
        return 29500
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def exit_code(benchmark: Callable[[], int]) -> int:
    """Of a benchmark that may fail for reasons its user can mend, or be stopped; those are said in a line."""
    try:
        return benchmark()
    except (lowbit.LowBitError, NetworkError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 1
