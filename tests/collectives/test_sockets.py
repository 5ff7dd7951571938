"""Messages over TCP connections of one process: every rank of a mesh is here, some in threads of their own."""

from __future__ import annotations

import gc
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lowbit.collectives.sockets import AT_ONCE, HEADER, Mesh
from megatron_lowbit.errors import RankError

PATIENCE = 30.0  # seconds; only where something is broken does a test wait so long


def pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    one.settimeout(PATIENCE)
    return one, other


def one_rank(seconds: float = PATIENCE) -> tuple[Mesh, socket.socket]:
    """Rank 0 of two, and what rank 1 would hold."""
    far, near = pair()
    far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Mesh(0, {1: near}, seconds), far


def all_ranks(world: int, seconds: float = PATIENCE) -> list[Mesh]:
    ends: list[dict[int, socket.socket]] = [{} for _ in range(world)]
    for one in range(world):
        for other in range(one):
            ends[one][other], ends[other][one] = pair()
    return [Mesh(rank, connections, seconds) for rank, connections in enumerate(ends)]


def in_threads(*functions) -> list:
    """Results, or the errors raised."""

    def run(function):
        try:
            return function()
        except BaseException as error:
            return error

    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result(PATIENCE) for future in [pool.submit(run, function) for function in functions]]


def values(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def blank(nbytes: int) -> torch.Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8)


def message(number: int, wire: torch.Tensor) -> bytes:
    """Written out: the format."""
    return number.to_bytes(8, "little") + wire.numel().to_bytes(8, "little") + wire.numpy().tobytes()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_messages_in_any_order_cut_at_any_byte_find_their_places(data):
    sizes = data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=6))
    wires = [values(size, number) for number, size in enumerate(sizes)]
    order = data.draw(st.permutations([number for number, size in enumerate(sizes) if size]))
    stream = b"".join(message(number, wires[number]) for number in order)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    mesh, far = one_rank()
    places = [blank(size) for size in sizes]
    exchanges = [mesh.exchange({1: place}) for place in places]
    for start, stop in zip([0, *cuts], [*cuts, len(stream)]):
        far.sendall(stream[start:stop])
        mesh.progress()
    for exchange in data.draw(st.permutations(exchanges)):
        exchange.wait()
    assert all(torch.equal(place, wire) for place, wire in zip(places, wires))
    assert not mesh.progress()
    mesh.close()
    far.close()


def test_every_single_byte_by_itself():
    mesh, far = one_rank()
    wires, places = [values(5, 1), values(3, 2)], [blank(5), blank(3)]
    exchanges = [mesh.exchange({1: place}) for place in places]
    for byte in message(1, wires[1]) + message(0, wires[0]):
        far.sendall(bytes([byte]))
        mesh.progress()
    for exchange in exchanges:
        exchange.wait()
    assert all(map(torch.equal, places, wires))
    far.close()


def test_what_is_sent_is_as_documented_in_more_buffers_than_go_at_once():
    mesh, far = one_rank()
    mesh._peers[1].connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    wires = [values(size, size) for size in (40_000, 0, 1, 17, 3000) * (2 * AT_ONCE)]
    for wire in wires:
        exchange = mesh.exchange({1: blank(0)})
        assert exchange.send({1: wire}) == [mesh]
        exchange.wait()
    assert len(mesh._peers[1].sending) > 2 * AT_ONCE  # nobody reads yet
    expected = b"".join(message(number, wire) for number, wire in enumerate(wires) if wire.numel())
    received = bytearray()

    def read():
        while len(received) < len(expected):
            received.extend(far.recv(1 << 16))

    assert in_threads(read, mesh.wait) == [None, None]
    assert received == expected and HEADER.size == 16
    far.close()


def test_a_message_of_an_exchange_not_posted_yet_waits():
    mesh, far = one_rank()
    wires, places = [values(9, 1), values(7, 2), values(5, 3)], [blank(9), blank(7), blank(5)]
    first = mesh.exchange({1: places[0]})
    far.sendall(message(2, wires[2]) + message(0, wires[0]) + message(1, wires[1]))
    for _ in range(3):
        mesh.progress()
        assert not places[0].any()
    rest = [mesh.exchange({1: place}) for place in places[1:]]
    for exchange in (first, *rest):
        exchange.wait()
    assert all(map(torch.equal, places, wires))
    far.close()


def test_a_rank_that_skipped_an_exchange_is_an_error_and_no_endless_wait():
    mesh, far = one_rank(seconds=3600)
    exchange = mesh.exchange({1: blank(4)})
    far.sendall(message(1, values(4)))
    (error,) = in_threads(exchange.wait)
    assert isinstance(error, RankError) and "rank 1 went on to a later exchange, and never sent" in str(error)
    assert "LOWBIT_CHECK=1" in str(error)
    far.close()


@pytest.mark.parametrize(
    "awaited, sent, said",
    [(8, 12, "rank 1 sent 12 bytes where this rank awaits 8 bytes"), (8, 4, "sent 4 bytes where .* awaits 8 bytes"),
     (0, 4, "rank 1 sent 4 bytes where this rank awaits nothing")],
)  # fmt: skip
def test_another_length_than_awaited(awaited, sent, said):
    mesh, far = one_rank()
    place = blank(awaited)
    mesh.exchange({1: place})
    far.sendall(message(0, values(sent) | 1))
    with pytest.raises(RankError, match=said + ".*another shape or spec"), mesh.whole():
        mesh.exchange({1: blank(4)}).wait()
    assert not place.any()
    far.close()


def test_a_message_that_came_before_is_not_taken_again():
    mesh, far = one_rank()
    place = blank(4)
    exchange = mesh.exchange({1: place})
    far.sendall(message(0, values(4)) * 2)
    exchange.wait()
    with pytest.raises(RankError, match="sent 4 bytes where this rank awaits nothing"):
        mesh.exchange({1: blank(4)}).wait()
    far.close()


def test_much_at_once_each_way_among_three_ranks():
    nbytes, world = 32 << 20, 3
    meshes = all_ranks(world)
    wires = [[torch.full((nbytes,), 16 * me + to, dtype=torch.uint8) for to in range(world)] for me in range(world)]
    places = [[torch.empty(nbytes, dtype=torch.uint8) for _ in range(world)] for _ in range(world)]
    calls = [lambda me=me: meshes[me].all_to_all(places[me], wires[me]) for me in range(world)]
    for _ in range(2):
        assert in_threads(*calls) == [None] * world
        for me in range(world):
            assert [int(place[0]) for place in places[me]] == [16 * rank + me for rank in range(world)]
            assert all(bool((place == place[0]).all()) for place in places[me])
            places[me] = [place.zero_() for place in places[me]]


def test_uneven_and_empty_pieces():
    world = 4
    meshes = all_ranks(world)
    size = lambda me, to: (me * to) % 3 * 1000  # noqa: E731
    wires = [[values(size(me, to), 10 * me + to) for to in range(world)] for me in range(world)]
    places = [[blank(size(rank, me)) for rank in range(world)] for me in range(world)]
    calls = [lambda me=me: meshes[me].all_to_all(places[me], wires[me]) for me in range(world)]
    for _ in range(3):
        assert in_threads(*calls) == [None] * world
    assert all(torch.equal(places[me][rank], wires[rank][me]) for me in range(world) for rank in range(world))


@pytest.mark.parametrize("sent", [0, 7, 20])
def test_a_rank_that_closes_is_noticed_at_once(sent):
    mesh, far = one_rank(seconds=3600)
    far.sendall(message(0, values(100))[:sent])
    far.close()
    (error,) = in_threads(lambda: mesh.all_to_all([blank(1), blank(100)], [blank(1), blank(10)]))
    assert isinstance(error, RankError)
    assert str(error).startswith("rank 0 lost rank 1 of its group of 2: it died, was interrupted, or met an error")


def test_one_ranks_error_ends_all():
    meshes = all_ranks(3, seconds=3600)

    def fails():
        with meshes[1].whole():
            raise MemoryError("on rank 1")

    def waits(me):
        return lambda: meshes[me].all_to_all([blank(9)] * 3, [blank(9)] * 3)

    one, failed, other = in_threads(waits(0), fails, waits(2))
    assert isinstance(failed, MemoryError) and isinstance(one, RankError) and isinstance(other, RankError)
    assert str(one).startswith("rank 0 lost rank ") and str(other).startswith("rank 2 lost rank ")


def test_a_rank_that_stalls_is_named():
    ends = {rank: pair() for rank in (1, 2, 3)}
    mesh = Mesh(0, {rank: near for rank, (_, near) in ends.items()}, 0.2)
    for rank in (1, 3):
        ends[rank][0].sendall(message(0, values(6)))
    with pytest.raises(RankError, match=r"rank 0 waited 0.2 s for rank 2, which stalled.*longer timeout"):
        mesh.exchange({rank: blank(6) for rank in ends}).wait()
    for far, _ in ends.values():
        far.close()


def test_a_rank_that_takes_nothing_is_named():
    mesh, far = one_rank(seconds=0.2)
    mesh.exchange({}).send({1: blank(64 << 20)})
    with pytest.raises(RankError, match="rank 0 waited 0.2 s for rank 1"):
        mesh.wait()
    far.close()


def test_a_timeout_longer_than_the_kernel_can_wait():
    mesh, far = one_rank(seconds=400 * 24 * 3600.0)
    place = blank(6)
    later = threading.Timer(0.1, lambda: far.sendall(message(0, values(6))))
    later.start()
    mesh.exchange({1: place}).wait()
    later.join()
    assert torch.equal(place, values(6))
    far.close()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), ValueError("a reason"), SystemExit()])
def test_after_an_interruption_everything_is_closed_and_refused(interruption):
    mesh, far = one_rank()
    with pytest.raises(type(interruption)), mesh.whole():
        mesh.exchange({1: blank(4)})
        raise interruption
    assert far.recv(1) == b""
    reason = str(interruption) or type(interruption).__name__
    for _ in range(2):
        for call in (lambda: mesh.exchange({1: blank(4)}), lambda: mesh.all_to_all([blank(1)] * 2, [blank(1)] * 2)):
            with pytest.raises(RankError, match=f"look at the first error, and restart all ranks \\({reason}\\)"):
                call()
    far.close()


def test_tensors_that_the_kernel_cannot_write_to_are_an_error():
    mesh, far = one_rank()
    with pytest.raises(BufferError), mesh.whole():
        mesh.exchange({1: blank(4)}).send({1: blank(8)[::2]})
    assert far.recv(1) == b""
    far.close()


def test_tensors_of_inference_mode():
    mesh, far = one_rank()
    with torch.inference_mode():
        place, wire = blank(4), values(4)
        exchange = mesh.exchange({1: place})
        exchange.send({1: wire})
        far.sendall(message(0, wire))
    exchange.wait()
    assert torch.equal(place, wire) and far.recv(20, socket.MSG_WAITALL) == message(0, wire)
    far.close()


def test_a_mesh_that_nobody_holds_closes_its_connections():
    mesh, far = one_rank()
    exchange = mesh.exchange({1: blank(4)})
    exchange.send({1: values(4)})
    far.recv(20, socket.MSG_WAITALL)
    del mesh, exchange
    gc.collect()
    assert far.recv(1) == b""
    far.close()


@pytest.mark.filterwarnings("error")
def test_a_connection_that_failed_before_the_mesh_was_made():
    far, near = pair()
    near.close()
    with pytest.raises(OSError):
        Mesh(0, {1: near}, 1.0)
    gc.collect()  # of an error in __del__ pytest makes a warning
    far.close()


AT_EXIT = """
import socket
from megatron_lowbit.collectives.sockets import Mesh
server = socket.create_server(("127.0.0.1", 0))
one, other = socket.create_connection(server.getsockname()), server.accept()[0]
server.close()
kept = [Mesh(0, {1: one}, 1.0), Mesh(1, {0: other}, 1.0)]
kept.append(kept)
"""


def test_the_interpreters_end_is_quiet():
    ended = subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", "-c", AT_EXIT], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0 and "socket" not in ended.stderr and "__del__" not in ended.stderr, ended.stderr
