"""How the ranks of a group on CPUs come by connections of their own (sockets.py).

Every rank listens at an address that others can reach, and tells it through the group's store (communicator.py), with a
secret that who calls has to say. Rank r calls those below it and is called by those above. If any of them cannot, none
has connections, and bytes go by torch.distributed; LOWBIT_TRANSPORT=torch wants it so. Nothing is encrypted, as in
gloo; nobody listens once all are connected.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import struct
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress

import torch
import torch.distributed as dist

from ..errors import ConfigError
from .sockets import Mesh

HELLO = struct.Struct("<16sI")  # the secret of who is called, the rank of who calls
SECONDS = 10.0  # to connect in; all ranks are there, as they have just told their addresses
SIOCGIFADDR = 0x8915
LOOPBACK, ANY_PORT = "127.0.0.1", 9
TCP, TORCH = "tcp", "torch"
_meshes: weakref.WeakKeyDictionary[dist.ProcessGroup, Mesh | None] = weakref.WeakKeyDictionary()


def mesh(group: dist.ProcessGroup) -> Mesh | None:
    """The group's connections; None where its bytes go by torch.distributed."""
    return _meshes.get(group)


def keep(group: dist.ProcessGroup, mesh: Mesh | None) -> None:
    _meshes[group] = mesh


def tried(group: dist.ProcessGroup) -> bool:
    """Whether it is known if the group can have connections."""
    return group in _meshes


def transport() -> str:
    """What LOWBIT_TRANSPORT says. Raises ConfigError."""
    name = os.environ.get("LOWBIT_TRANSPORT") or TCP
    if name not in (TCP, TORCH):
        raise ConfigError(f"LOWBIT_TRANSPORT={name!r} is unknown: use {TCP} or {TORCH}, or leave it unset")
    return name


class Listener:
    """Where the other ranks can call this one; `invitation` is JSON-able, None if they cannot."""

    def __init__(self) -> None:
        self._socket, self._secret, self.invitation, self._why = None, secrets.token_bytes(16), None, ""
        try:
            family, address = own_address()
            self._socket = socket.create_server((address, 0), family=family, backlog=1024)
            self.invitation = [*self._socket.getsockname()[:2], self._secret.hex()]
        except OSError as error:
            self._why = str(error)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        if self._socket:
            self._socket.close()

    def connect(self, group: dist.ProcessGroup, invitations: Sequence[list | None]) -> tuple[Mesh | None, str]:
        """invitations: of all ranks. Returns the connections, or why there are none."""
        if None in invitations:
            return None, self._why
        me, connections, deadline = dist.get_rank(group), {}, time.monotonic() + SECONDS
        try:
            _call(connections, me, invitations[:me], deadline)
            self._answer(connections, range(me + 1, len(invitations)), deadline)
            return Mesh(me, connections, _timeout(group)), ""
        except BaseException as error:
            for connection in connections.values():
                connection.close()
            if isinstance(error, OSError):
                return None, str(error)
            raise

    def _answer(self, connections: dict[int, socket.socket], ranks: range, deadline: float) -> None:
        """Be called by these ranks. Others may call too: of who is silent or slow none is waited for alone. Raises
        OSError."""
        missing = set(ranks)
        with selectors.DefaultSelector() as calls:
            self._socket.setblocking(False)
            calls.register(self._socket, selectors.EVENT_READ)
            try:
                while missing:
                    for call, _ in calls.select(_left(deadline)):
                        if call.fileobj is self._socket:
                            self._accept(calls)
                        elif (rank := self._who(call.fileobj, call.data)) is not None:
                            calls.unregister(caller := call.fileobj)
                            if rank in missing:
                                missing.remove(rank)
                                connections[rank] = caller
                            else:
                                caller.close()
            finally:
                for call in calls.get_map().values():
                    if call.fileobj is not self._socket:
                        call.fileobj.close()

    def _accept(self, calls: selectors.BaseSelector) -> None:
        with suppress(BlockingIOError, ConnectionError):  # it has hung up meanwhile
            caller, _ = self._socket.accept()
            caller.setblocking(False)
            calls.register(caller, selectors.EVENT_READ, bytearray())

    def _who(self, caller: socket.socket, said: bytearray) -> int | None:
        """The rank that calls; -1: a stranger; None: it has not said all yet. said: so far, added to."""
        try:
            said += (heard := caller.recv(HELLO.size - len(said)))
        except BlockingIOError:
            return None
        except OSError:
            return -1
        if len(said) < HELLO.size:
            return None if heard else -1
        secret, rank = HELLO.unpack(said)
        return rank if secrets.compare_digest(secret, self._secret) else -1


def _call(connections: dict[int, socket.socket], me: int, invitations: Sequence[list], deadline: float) -> None:
    """Rank r at r-th of these. Raises OSError."""
    for rank, (address, port, secret) in enumerate(invitations):
        connections[rank] = socket.create_connection((address, port), _left(deadline))
        connections[rank].sendall(HELLO.pack(bytes.fromhex(secret), me))


def own_address() -> tuple[socket.AddressFamily, str]:
    """Of the interface that gloo is told to use, else of the one on the way to the group's store; where there is no
    such way, this host's own, as gloo does. Raises OSError for an interface without an address."""
    if names := os.environ.get("GLOO_SOCKET_IFNAME"):
        import fcntl  # not on every system

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            name = names.split(",")[0].encode()[:15]
            answer = fcntl.ioctl(asking, SIOCGIFADDR, struct.pack("256s", name))
        return socket.AF_INET, socket.inet_ntoa(answer[20:24])
    with suppress(OSError):
        for family, kind, _, _, place in socket.getaddrinfo(_store(), ANY_PORT, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind) as towards:  # a name may have addresses of no use here
                towards.connect(place)  # sends nothing, but finds the way
                return family, towards.getsockname()[0]
    return socket.AF_INET, LOOPBACK


def _store() -> str:
    """The host of torch.distributed's store; where it has none, what the launcher says, else this host."""
    store = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        return store.host
    return os.environ.get("MASTER_ADDR") or socket.gethostname()


def _timeout(group: dist.ProcessGroup) -> float:
    """Seconds that a collective of the group may wait for other ranks."""
    with suppress(RuntimeError):  # a group of a backend for another device has none for this one
        options = getattr(group._get_backend(torch.device("cpu")), "options", None)  # a wrapper for debugging has none
        return getattr(options, "_timeout", dist.default_pg_timeout).total_seconds()
    return dist.default_pg_timeout.total_seconds()


def _left(deadline: float) -> float:
    if (left := deadline - time.monotonic()) <= 0:
        raise TimeoutError("the other ranks could not be reached in time")
    return left
