"""How ranks come by connections: strangers, addresses, ranks that cannot, and what is left behind."""

from __future__ import annotations

import errno
import gc
import os
import re
import socket
import threading
import time
import warnings

import pytest
import torch

import megatron_lowbit as lowbit
from megatron_lowbit.collectives import connect
from megatron_lowbit.communicator import communicator
from tests.ranks import run_ranks

X, Y = torch.full((4, 64), 1.0), torch.full((4, 64), 2.0)


@pytest.fixture
def listener(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with connect.Listener() as made:
        yield made


def call(listener: connect.Listener, said: bytes = b"") -> socket.socket:
    caller = socket.create_connection(listener.invitation[:2], timeout=30)
    caller.sendall(said)
    return caller


def hello(listener: connect.Listener, rank: int) -> bytes:
    return bytes.fromhex(listener.invitation[2]) + rank.to_bytes(4, "little")


def refused(caller: socket.socket) -> bool:
    try:
        return caller.recv(1) == b""
    except ConnectionResetError:
        return True
    finally:
        caller.close()


def test_strangers_are_turned_away_and_hold_up_nobody(listener):
    right = hello(listener, 1)
    said = [b"", right[:7], bytes(16) + right[16:], b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"]
    strangers = [call(listener, each) for each in said]
    strangers.append(call(listener, hello(listener, 0)))  # not one that calls this rank
    strangers.append(call(listener, hello(listener, 9)))
    call(listener, right[:7]).close()
    gone = call(listener)
    gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # ends with a reset
    gone.close()
    ranks = [call(listener, hello(listener, rank)) for rank in (2, 1)]
    again = call(listener, hello(listener, 2))
    connections, start = {}, time.monotonic()
    listener._answer(connections, range(1, 3), start + 3600)
    assert sorted(connections) == [1, 2]
    for rank, caller in zip((2, 1), ranks):
        connections[rank].send(bytes([rank]))
        assert caller.recv(1) == bytes([rank])  # the caller is who it says
        caller.close()
        connections[rank].close()
    listener.__exit__()  # who was not answered yet is refused, too
    assert all(map(refused, [*strangers, again]))


def test_a_hello_in_pieces_and_what_follows_it(listener):
    said, connections = hello(listener, 5) + b"first message", {}

    def speak(caller=call(listener)):  # noqa: B008
        for byte in said[:20]:
            caller.sendall(bytes([byte]))
            time.sleep(0.002)
        caller.sendall(said[20:])
        caller.close()

    speaker = threading.Thread(target=speak)
    speaker.start()
    listener._answer(connections, range(5, 6), time.monotonic() + 30)
    speaker.join()
    connections[5].setblocking(True)
    assert connections[5].recv(64, socket.MSG_WAITALL) == b"first message"
    connections[5].close()


def test_ranks_that_do_not_call_are_waited_for_until_the_deadline(listener):
    stranger, rank = call(listener, b"abc"), call(listener, hello(listener, 1))
    connections = {}
    with pytest.raises(OSError, match="the other ranks could not be reached in time"):
        listener._answer(connections, range(1, 3), time.monotonic() + 0.3)
    assert list(connections) == [1] and refused(stranger)
    connections[1].close()
    rank.close()


def test_the_address_of_the_interface_that_gloo_uses(monkeypatch):
    monkeypatch.setattr(connect, "_store", lambda: pytest.fail("not asked for"))
    for names in ("lo", "lo,eth7"):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", names)
        assert connect.own_address() == (socket.AF_INET, "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-nic")
    with pytest.raises(OSError, match=os.strerror(errno.ENODEV)):
        connect.own_address()
    assert connect.Listener().invitation is None


def test_the_address_on_the_way_to_the_store(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for host in ("127.0.0.1", "127.0.1.1"):  # as some hosts call themselves
        monkeypatch.setattr(connect, "_store", lambda host=host: host)
        family, address = connect.own_address()
        assert family == socket.AF_INET and address.startswith("127.0.")
        with connect.Listener() as listener:
            call(listener).close()
    if has_ipv6():
        monkeypatch.setattr(connect, "_store", lambda: "::1")
        assert connect.own_address() == (socket.AF_INET6, "::1")


def test_an_address_of_no_use_and_a_name_that_nobody_knows(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(connect, "_store", lambda: "a-host")
    known = [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", (host, 9)) for host in ("255.255.255.255", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: known)
    assert connect.own_address() == (socket.AF_INET, "127.0.0.1")

    def unknown(*_, **__):
        raise socket.gaierror("unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert connect.own_address() == (socket.AF_INET, "127.0.0.1")


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def _store(rank, world):
    import torch.distributed as dist

    os.environ.pop("MASTER_ADDR", None)
    found = [connect._store() == socket.gethostname()]  # a file has no host
    os.environ |= {"MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "a word"}
    found.append(connect._store() == "10.1.2.3")
    dist.destroy_process_group()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    return [*found, connect._store() == "127.0.0.1"]


def test_the_host_of_the_store():
    assert run_ranks(1, _store) == [[True] * 3]


def _over_ipv6(rank, world):
    import torch.distributed as dist

    del os.environ["GLOO_SOCKET_IFNAME"]
    connect._store = lambda: "::1"
    result = lowbit.all_reduce(X * rank, "int8:g64")
    peers = connect.mesh(dist.group.WORLD)._peers.values()
    return [result, all(peer.connection.family == socket.AF_INET6 for peer in peers)]


@pytest.mark.skipif(not has_ipv6(), reason="this host has no IPv6")
def test_ranks_connect_over_ipv6():
    assert all(torch.equal(result, X * 3) and ipv6 for result, ipv6 in run_ranks(3, _over_ipv6))


def _timeouts(rank, world):
    import datetime

    import torch.distributed as dist

    group = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=77))
    for each in (dist.group.WORLD, group):
        communicator(each, lowbit.CommConfig())
    return [connect.mesh(dist.group.WORLD).seconds, connect.mesh(group).seconds]


def test_the_timeout_is_the_groups():
    assert run_ranks(2, _timeouts, timeout=99) == [[99, 77]] * 2


def _with_strangers(rank, world):
    import torch.distributed as dist

    made, strangers, listen = [], [], connect.Listener.__init__

    def listening(self):
        listen(self)
        made.append(self.invitation)
        for said in (b"", b"abc", bytes(20)):
            strangers.append(call(self, said))

    connect.Listener.__init__ = listening
    result = lowbit.all_reduce(X * rank, "int8:g64")
    address, port, _ = made[0]
    with pytest.raises(ConnectionRefusedError):  # nobody listens any more
        socket.create_connection((address, port), timeout=5)
    assert len(made) == 1 and all(map(refused, strangers))
    return [result, connect.mesh(dist.group.WORLD) is not None]


def test_ranks_connect_among_strangers_and_nobody_listens_afterwards():
    assert all(torch.equal(result, X * 3) and direct for result, direct in run_ranks(3, _with_strangers))


def _cannot(rank, world, why):
    import torch.distributed as dist

    connect.SECONDS, listen = 1.0, connect.Listener.__init__

    def unreachable(self):
        listen(self)
        with socket.create_server(("127.0.0.1", 0)) as closed:
            self.invitation[1] = closed.getsockname()[1]

    if rank == 1 and why == "no interface":
        os.environ["GLOO_SOCKET_IFNAME"] = "no-such-nic"
    elif rank == 1:
        connect.Listener.__init__ = unreachable
    sockets = count_sockets()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lowbit.reset_stats()
        results = [lowbit.all_reduce(X * rank, "int8:g64"), lowbit.all_reduce(X * rank, "int8:g64", min_bytes=0)]
        communicator(None, lowbit.CommConfig("int4:g32"))  # is not tried, and not warned of, again
        gc.collect()
    said = [str(each.message) for each in caught]
    assert connect.tried(dist.group.WORLD) and connect.mesh(dist.group.WORLD) is None
    return {"results": results, "said": said, "left": count_sockets() - sockets}


@pytest.mark.parametrize(
    "why, reason", [("no interface", f"rank 1: .*{os.strerror(errno.ENODEV)}"), ("unreachable", "rank 2: .*refused")]
)
def test_one_rank_that_cannot_leaves_all_to_torch_and_is_told_of_once(why, reason):
    for rank, told in enumerate(run_ranks(3, _cannot, why)):
        assert all(torch.equal(result, X * 3) for result in told["results"])
        ours = [each for each in told["said"] if "cannot reach each other" in each]
        assert len(ours) == (rank == 0) and not [each for each in told["said"] if "unclosed" in each]
        assert told["left"] == 0
        for each in ours:
            assert "GLOO_SOCKET_IFNAME" in each and "LOWBIT_TRANSPORT=torch" in each
            assert re.search(reason, each), each


def count_sockets() -> int:
    def target(entry: str) -> str:
        try:
            return os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            return ""

    return sum(target(entry).startswith("socket:") for entry in os.listdir("/proc/self/fd"))


def _unknown(rank, world):
    os.environ["LOWBIT_TRANSPORT"] = "pigeon"
    with pytest.raises(lowbit.ConfigError, match="LOWBIT_TRANSPORT='pigeon' is unknown: use tcp or torch"):
        lowbit.all_reduce(X, "int8:g64")
    os.environ["LOWBIT_TRANSPORT"] = ("tcp", "torch")[rank]
    sockets = count_sockets()
    with pytest.raises(lowbit.RankError, match="on transport: rank 0 has 'tcp', rank 1 has 'torch'"):
        lowbit.all_reduce(X, "int8:g64")
    gc.collect()
    assert count_sockets() == sockets  # the listener's too


def test_transports_that_are_unknown_or_differ():
    run_ranks(2, _unknown)


def _subgroups(rank, world):
    import torch.distributed as dist

    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3], [0, 2, 3], [0, 1, 2, 3])]
    mine = [group for group in groups if dist.get_rank(group) >= 0]
    for _ in range(3):
        results = [lowbit.all_reduce(X * (1 << rank), "int8:g64", group=group) for group in mine]
    meshes = [connect.mesh(group) for group in mine]
    assert len(set(map(id, meshes))) == len(mine) and None not in meshes
    assert [mesh.rank for mesh in meshes] == [dist.get_rank(group) for group in mine]
    assert connect.mesh(dist.group.WORLD) is None and not connect.tried(dist.group.WORLD)
    return {str(dist.get_process_group_ranks(group)): result for group, result in zip(mine, results)}


def test_groups_have_connections_of_their_own():
    ranks = run_ranks(4, _subgroups)
    assert [len(told) for told in ranks] == [3, 2, 3, 3]
    for told in ranks:
        for group, result in told.items():
            assert torch.equal(result, X * sum(1 << int(rank) for rank in group.strip("[]").split(",")))


def _come_and_go(rank, world):
    import torch.distributed as dist

    counts = []
    for _ in range(4):
        group = dist.new_group([0, 1, 2])
        lowbit.all_reduce(X, "int8:g64", group=group)
        assert connect.mesh(group) is not None
        if not counts:
            before = count_sockets()
            del connect._meshes[group]
            gc.collect()
            assert before - count_sockets() == 2  # one for each other rank
        dist.barrier()
        dist.destroy_process_group(group)
        del group
        gc.collect()
        counts.append(count_sockets())
    assert not connect._meshes
    return counts


def test_connections_end_with_their_group():
    for counts in run_ranks(3, _come_and_go):
        assert len(set(counts[1:])) == 1, counts


def _alone(rank, world):
    import torch.distributed as dist

    lowbit.all_reduce(X, "int8:g64")
    group = dist.group.WORLD
    return connect.tried(group)


def test_one_rank_needs_no_connections():
    assert run_ranks(1, _alone) == [False]


def _exact(rank, world):
    import torch.distributed as dist

    result = lowbit.all_reduce(X, "int8:g64", algorithm="exact")
    return [connect.tried(dist.group.WORLD), result]


def test_who_wants_exact_gets_torchs_own_and_no_connections():
    assert all(not tried and torch.equal(result, Y) for tried, result in run_ranks(2, _exact))
