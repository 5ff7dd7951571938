"""Bytes between the ranks of a group on CPUs, over TCP connections of our own, moved by the rank's own thread.

Gloo moves bytes in a thread of its own, which holds a connection's lock while data comes in: a rank that posts its next
transfer waits until then, for some ms at 1 Gbit/s, and its link idles. Here the kernel's buffers do what that thread
did: what was encoded is handed over and sent while the next chunk is encoded, what arrives waits until it is wanted.

    message   number u64, bytes u64 (little-endian), then so many bytes

Exchanges are numbered, alike on all ranks, as all make the same calls in the same order. So a message is written to
where its exchange wants it, in whatever order they come. One of an exchange that this rank has not come to waits in the
kernel, and holds up its sender. One that no exchange awaits is an error: ranks then differ in shapes or specs.

Hazard: after an error connections are in the middle of a message. So they are closed, which the other ranks see at
once, and the mesh refuses everything afterwards. What is sent must stay as it is until `wait`. For one thread.
"""

from __future__ import annotations

import select
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch

from ..errors import RankError

HEADER = struct.Struct("<QQ")
AT_ONCE = 16  # buffers handed to the kernel in one call
LOW_WATER = 256 << 10  # bytes: a rank that wakes up for every packet takes the processor from those that encode
LONGEST = 2**31 - 1  # ms that poll can wait for
DIFFERENT = (
    "they passed another shape or spec, or made another call (LOWBIT_CHECK=1 compares them call by call); pass the "
    "same on every rank"
)


class Peer:
    """A connection to another rank: what is to be sent, in order, and what is awaited, by number."""

    def __init__(self, rank: int, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.rank, self.connection = rank, connection
        self.sending: deque[memoryview] = deque()
        self.awaited: dict[int, memoryview] = {}
        self._header, self._filled = memoryview(bytearray(HEADER.size)), 0
        self._rest: memoryview | None = None  # of the message whose header was read
        self._number = -1
        self._low_water = 1

    def push(self) -> bool:
        """Hand over what the kernel takes now -> whether it took any. Raises OSError."""
        moved = False
        while self.sending:
            try:
                taken = self.connection.sendmsg(islice(self.sending, AT_ONCE))
            except BlockingIOError:
                break
            moved = True
            while taken and taken >= len(self.sending[0]):
                taken -= len(self.sending.popleft())
            if taken:
                self.sending[0] = self.sending[0][taken:]
        return moved

    def pull(self, numbered: int) -> bool:
        """Take what has come of what is awaited -> whether any has. numbered: how many exchanges there were.

        Raises OSError, and RankError for a message that this rank does not await.
        """
        moved = False
        try:
            while self.awaited:
                while self._filled < HEADER.size:
                    self._filled += self._received(self._header[self._filled :])
                    moved = True
                if self._rest is None and not self._start(numbered):
                    break
                while self._rest:
                    self._rest = self._rest[self._received(self._rest) :]
                    moved = True
                del self.awaited[self._number]
                self._rest, self._filled = None, 0
        except BlockingIOError:
            pass
        return moved

    def _start(self, numbered: int) -> bool:
        """Find the place of the message whose header was read -> whether this rank has come to it."""
        self._number, nbytes = HEADER.unpack(self._header)
        if self._number >= numbered:
            return False
        place = self.awaited.get(self._number)
        if place is None or len(place) != nbytes:
            awaits = "nothing" if place is None else f"{len(place)} bytes"
            raise RankError(f"rank {self.rank} sent {nbytes} bytes where this rank awaits {awaits}: {DIFFERENT}")
        self._rest = place
        return True

    @property
    def passed(self) -> bool:
        """Whether a message that this rank has not come to stands before those that it awaits."""
        return bool(self.awaited) and self._rest is None and self._filled == HEADER.size

    def wake_after(self) -> None:
        """Let a poll of the connection end when the rest of a message has come, or a good part of it."""
        nbytes = min(len(self._rest), LOW_WATER) if self._rest else 1
        if nbytes != self._low_water:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, nbytes)
            self._low_water = nbytes

    def _received(self, buffer: memoryview) -> int:
        if not (count := self.connection.recv_into(buffer)):
            raise ConnectionResetError("it closed the connection")
        return count


class Mesh:
    """Connections to all other ranks of a group. seconds: without a byte moved until the others count as lost."""

    def __init__(self, rank: int, connections: dict[int, socket.socket], seconds: float) -> None:
        self.rank, self.seconds, self._numbered, self._closed, self._peers = rank, seconds, 0, "", {}
        self._peers |= {other: Peer(other, connection) for other, connection in connections.items()}

    def exchange(self, receives: dict[int, torch.Tensor]) -> Exchange:
        """receives: rank -> where what it sends is to be written: uint8 [bytes], contiguous, maybe empty. Raises
        RankError."""
        if self._closed:
            raise RankError(
                f"rank {self.rank} was interrupted in an earlier collective of this group, and has closed its "
                f"connections: look at the first error, and restart all ranks ({self._closed})"
            )
        number, self._numbered = self._numbered, self._numbered + 1
        for rank, place in receives.items():
            if place.numel():
                self._peers[rank].awaited[number] = memoryview(place.numpy())
        return Exchange(self, number, [self._peers[rank] for rank in receives])

    def all_to_all(self, places: Sequence[torch.Tensor], wires: Sequence[torch.Tensor]) -> None:
        """By rank: wires[r], uint8, goes to rank r, and what comes from there to places[r]. Raises RankError."""
        with self.whole():
            others = list(self._peers)
            exchange = self.exchange({rank: places[rank] for rank in others})
            exchange.send({rank: wires[rank] for rank in others})
            places[self.rank].copy_(wires[self.rank])
            exchange.wait()
            self.wait()

    def send(self, number: int, sends: dict[int, torch.Tensor]) -> None:
        """rank -> wire, as an exchange. Raises RankError."""
        for rank, wire in sends.items():
            if wire.numel():
                self._peers[rank].sending += (memoryview(HEADER.pack(number, wire.numel())), memoryview(wire.numpy()))
        self.progress()

    def wait(self) -> None:
        """Until the kernel has all that was sent. Raises RankError."""
        self.until(lambda: not any(peer.sending for peer in self._peers.values()))

    def until(self, done: Callable[[], bool]) -> None:
        """Move bytes until then. Raises RankError."""
        while not done():
            if not self.progress():
                self._sleep()

    def progress(self) -> bool:
        """Move what can be moved at once -> whether any was. Raises RankError."""
        moved = False
        for peer in self._peers.values():
            try:
                moved |= peer.push() | peer.pull(self._numbered)
            except OSError as error:
                raise RankError(
                    f"rank {self.rank} lost rank {peer.rank} of its group of {len(self._peers) + 1}: it died, was "
                    "interrupted, or met an error of its own; look at the other ranks' errors and restart them all "
                    f"({error})"
                ) from error
        return moved

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Around a collective: interrupted, it is the last, also for the other ranks."""
        try:
            yield
        except BaseException as error:
            self._closed = self._closed or str(error) or type(error).__name__
            self.close()
            raise

    def close(self) -> None:
        for peer in self._peers.values():
            peer.connection.close()
            peer.sending.clear()
            peer.awaited.clear()

    __del__ = close  # the process group is gone

    def _sleep(self) -> None:
        """Until something can be moved. Raises RankError."""
        poll = select.poll()
        for peer in self._peers.values():
            if peer.passed:  # for ever, as all of a collective is awaited before any of it is waited for
                raise RankError(
                    f"rank {peer.rank} went on to a later exchange, and never sent what rank {self.rank} awaits of an "
                    f"earlier one: {DIFFERENT}"
                )
            peer.wake_after()
            if events := (select.POLLIN if peer.awaited else 0) | (select.POLLOUT if peer.sending else 0):
                poll.register(peer.connection, events)
        if not poll.poll(min(1e3 * self.seconds, LONGEST)):
            late = [str(peer.rank) for peer in self._peers.values() if peer.awaited or peer.sending]
            raise RankError(
                f"rank {self.rank} waited {self.seconds:g} s for rank {', '.join(late)}, which stalled or is in "
                "another call: look at what it does, or give the process group a longer timeout"
            )


class Exchange:
    """What this rank sends to others and receives from them at once."""

    def __init__(self, mesh: Mesh, number: int, peers: Sequence[Peer]) -> None:
        self._mesh, self._number, self._peers = mesh, number, peers

    def send(self, sends: dict[int, torch.Tensor]) -> list[Mesh]:
        """rank -> its wire. Returns what must be waited for before these are written to again."""
        self._mesh.send(self._number, sends)
        return [self._mesh]

    def wait(self) -> None:
        """For all that is received."""
        self._mesh.until(lambda: not any(self._number in peer.awaited for peer in self._peers))
