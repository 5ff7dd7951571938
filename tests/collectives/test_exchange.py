"""The configuration handshake, and buffers that are reused."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import megatron_lowbit as lowbit
from megatron_lowbit.collectives import exchange
from megatron_lowbit.collectives.exchange import Workspace
from megatron_lowbit.communicator import communicator
from megatron_lowbit.plan_file import Plan
from tests.ranks import run_ranks


def test_workspace_grows_and_reuses():
    workspace, cpu = Workspace(), torch.device("cpu")
    first = workspace.bytes("a", 100, cpu)
    assert workspace.bytes("a", 50, cpu).data_ptr() == first.data_ptr()
    assert workspace.bytes("b", 50, cpu).data_ptr() != first.data_ptr()
    assert workspace.bytes("a", 200, cpu).numel() == 200
    assert workspace.floats("a", (5, 10), cpu).shape == (5, 10)


def _no_growth(rank, world):
    x = torch.randn(64, 512)
    lowbit.all_reduce(x, "int4:g32", algorithm="two-step")
    from megatron_lowbit.communicator import communicator

    workspace = communicator(None, lowbit.CommConfig("int4:g32", "two-step"))._workspace
    before = {name: buffer.data_ptr() for name, buffer in workspace._buffers.items()}
    for rows in (64, 1, 33, 64):
        lowbit.all_reduce(x[:rows], "int4:g32", algorithm="two-step")
    return before == {name: buffer.data_ptr() for name, buffer in workspace._buffers.items()}


def test_calls_allocate_no_new_buffers():
    assert run_ranks(2, _no_growth) == [True, True]


def _memory(rank, world):
    """Growth of this process, in MB, over a thousand calls after the first hundred."""

    def resident() -> float:
        return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    x = torch.randn(64, 512)
    for call in range(1100):
        if call == 100:
            before = resident()
        lowbit.all_reduce(x[: 1 + call % 64], "int5:g32/int8:g64", algorithm=("one-shot", "two-step")[call % 2])
    return resident() - before


def test_memory_does_not_grow_with_calls():
    assert all(growth < 4 for growth in run_ranks(2, _memory))  # one leaked message a call would be 70 MB


def _modes(rank, world):
    """A workspace first used in inference mode has to serve outside of it, and the other way round."""
    x, results = torch.randn(8, 64, generator=torch.Generator().manual_seed(rank)), []
    for backend in ("numba", "reference"):
        os.environ["LOWBIT_BACKEND"] = backend
        for spec in ("int5:g32", "bf16"):
            for first, second in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)):
                shape = x if first is torch.no_grad else x[:4]
                with first():
                    lowbit.all_reduce(shape[:2], spec, algorithm="two-step")
                with second():
                    results.append(lowbit.all_reduce(shape, spec, algorithm="two-step").clone())
                    results.append(lowbit.all_gather(lowbit.reduce_scatter(lowbit.all_to_all(shape, spec), spec), spec))
    return results


def test_inference_mode_and_ordinary_mode_share_buffers():
    first, second = run_ranks(2, _modes)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and len(first) == 16


def _byte(me, to):
    return 16 * me + to


def _both_transports(rank, world):
    """all_gather and all_to_all over connections of our own, and by torch -> whether torch was asked, by transport."""
    import torch.distributed as dist

    group, asked = dist.group.WORLD, []
    for name in ("all_gather_into_tensor", "all_gather_single", "all_to_all_single"):
        if torchs := getattr(dist, name, None):
            setattr(dist, name, lambda *given, _torchs=torchs, **more: asked.append(1) or _torchs(*given, **more))
    counts, everyone = [], range(world)
    for transport in ("torch", "tcp"):
        os.environ["LOWBIT_TRANSPORT"] = transport
        communicator(None, lowbit.CommConfig(algorithm="auto" if transport == "tcp" else "two-step"))
        asked.clear()
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                for size in (1, 1000, 0, 1 << 20):
                    output = torch.zeros(world * size, dtype=torch.uint8)
                    exchange.all_gather(output, torch.full((size,), _byte(rank, 0), dtype=torch.uint8), group)
                    gathered = [torch.full((size,), _byte(other, 0), dtype=torch.uint8) for other in everyone]
                    assert torch.equal(output, torch.cat(gathered))
                    sent = [size * (to % 2) for to in everyone]  # to every second rank nothing
                    sends = [torch.full((sent[to],), _byte(rank, to), dtype=torch.uint8) for to in everyone]
                    received = [sent[rank]] * world
                    output = torch.zeros(sum(received), dtype=torch.uint8)
                    exchange.all_to_all(output, torch.cat(sends), received, sent, group)
                    arrived = [torch.full((sent[rank],), _byte(other, rank), dtype=torch.uint8) for other in everyone]
                    assert torch.equal(output, torch.cat(arrived))
        counts.append(len(asked))
    return counts


def test_bytes_go_over_connections_of_our_own_where_there_are_any():
    assert run_ranks(3, _both_transports) == [[16, 0]] * 3


def _checked(rank, world, folder):
    os.environ["LOWBIT_CHECK"] = "1"
    x = torch.zeros(8, 64)
    for spec in ("int4:g64:sym", "int4:g128"):  # both are known to both ranks, and as long on the wire
        lowbit.all_reduce(x, spec, min_bytes=0)
    messages = []
    for mine in ({"spec": ("int4:g64:sym", "int4:g128")[rank]}, {"shape": (8, 64 + 64 * rank)}):
        try:
            lowbit.all_reduce(torch.zeros(mine.get("shape", (8, 64))), mine.get("spec", "int4:g128"), min_bytes=0)
        except lowbit.RankError as error:
            messages.append(str(error))
    return messages


def test_every_call_can_be_checked():
    for messages in run_ranks(2, _checked, ""):
        assert messages[0].startswith("ranks disagree on spec: rank 0 has 'int4:g64:sym', rank 1 has 'int4:g128'")
        assert messages[1].startswith("ranks disagree on shape: rank 0 has [8, 64], rank 1 has [8, 128]")


def _all_checked(rank, world):
    os.environ["LOWBIT_CHECK"] = "1"
    x, odd = torch.zeros(6, 6), rank == 1
    agreed = [
        lowbit.reduce_scatter(x, "int4:g32", dim=-2),
        lowbit.all_gather(x, "int4:g32"),
        lowbit.all_to_all(x[: 3 * (1 + rank)], "int4:g32", output_splits=[1, 2, 2]),  # shapes differ rightly
    ]
    messages = []
    for call in (
        lambda: lowbit.reduce_scatter(x, "int4:g32", dim=-1 if odd else 0),
        lambda: lowbit.all_gather(x[: 5 + odd], "int4:g32"),
        lambda: lowbit.all_gather(x.half() if odd else x, "int4:g32", dim=1),
        lambda: lowbit.all_to_all(torch.zeros(3, 4 + odd), "int4:g32"),
        lambda: lowbit.all_to_all(x, "int4:g32", output_splits=[3, 2, 2] if odd else None),
        lambda: lowbit.all_gather(x, "int4:g32") if odd else lowbit.reduce_scatter(x, "int4:g32"),
    ):
        try:
            call()
        except lowbit.RankError as error:
            messages.append(str(error))
    return [[list(y.shape) for y in agreed], messages]


def test_every_collective_can_be_checked():
    for rank, (shapes, messages) in enumerate(run_ranks(3, _all_checked)):
        assert shapes == [[2, 6], [18, 6], [5, 6]], rank
        expected = [
            "dim: rank 0 has 0, rank 1 has 1",
            "shape: rank 0 has [5, 6], rank 1 has [6, 6]",
            "dtype: rank 0 has 'torch.float32', rank 1 has 'torch.float16'",
            "shape of a row: rank 0 has [4], rank 1 has [5]",
            "rows from rank 0 to rank 1: rank 0 has 2, rank 1 has 3",
            "collective: rank 0 has 'reduce_scatter', rank 1 has 'all_gather'",
        ]
        assert [message.startswith(f"ranks disagree on {start}") for message, start in zip(messages, expected)] == [
            True
        ] * 6


def _made_anew(rank, world, folder):
    """A second world over the same store must not read what the first one left there."""
    import torch.distributed as dist

    store = dist.distributed_c10d._get_default_store()
    x = torch.ones(2, 32)
    lowbit.all_reduce(x, "int8:g32", min_bytes=0)
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.PrefixStore("again", store), rank=rank, world_size=world)
    return lowbit.all_reduce(x, "int4:g32", min_bytes=0)


def test_a_world_made_anew():
    assert all(torch.equal(result, torch.full((2, 32), 2.0)) for result in run_ranks(2, _made_anew, ""))


def _mismatch(rank, world, kind):
    spec = "int8:g128" if kind == "spec" and rank == 1 else "int4:g32"
    if kind == "backend" and rank == 2:
        os.environ["LOWBIT_BACKEND"] = "reference"
    if kind == "version" and rank == 1:
        lowbit.__version__ = "9.9.9"
    if kind == "protocol" and rank == 1:  # facts alone is what was told then
        from megatron_lowbit import handshake
        from megatron_lowbit.collectives import exchange

        handshake.PROTOCOL, dumps = 1, json.dumps
        exchange.json = SimpleNamespace(loads=json.loads, dumps=lambda told, **more: dumps(told[0], **more))
    try:
        if kind == "gate":  # the plan's algorithm, which one rank names too
            os.environ["LOWBIT_TUNED"] = "none"
            plan = Plan({"a": "int4"}, world, "two-step")
            communicator(None, lowbit.CommConfig(plan=plan, algorithm="two-step" if rank == 2 else "auto"))
        lowbit.all_reduce(torch.zeros(2, 64), spec, min_bytes=7 if kind == "min_bytes" and rank == 2 else 0)
    except lowbit.LowBitError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    "kind, sides",
    [
        ("spec", "spec: rank 0 has 'int4:g32', rank 1 has 'int8:g128'"),
        ("min_bytes", "min_bytes: rank 0 has 0, rank 2 has 7"),
        ("backend", "backend: rank 0 has 'numba', rank 2 has 'reference'"),
        ("gate", "size gate: rank 0 has 'on', rank 2 has 'off'"),
        ("protocol", "protocol: rank 0 has 4, rank 1 has 1"),
        ("version", "version: rank 0 has '0.1.0', rank 1 has '9.9.9'"),
    ],
)
def test_ranks_that_disagree_all_get_an_error_naming_both_sides(kind, sides):
    for message in run_ranks(3, _mismatch, kind):
        assert message.startswith(f"ranks disagree on {sides}")


SCRIPT = """
import os, torch, torch.distributed as dist, megatron_lowbit as lowbit
dist.init_process_group("gloo")
lowbit.all_reduce(torch.zeros(2, 64), ("int4:g32", "int8:g128")[dist.get_rank()], min_bytes=0)
"""


def test_both_sides_are_named_though_the_rank_with_the_store_ends_at_once():
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT], env=environment | {"RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    for rank in ranks:
        _, stderr = rank.communicate(timeout=60)
        assert rank.returncode == 1 and "rank 0 has 'int4:g32', rank 1 has 'int8:g128'" in stderr, stderr


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _changes_its_mind(rank, world, folder):
    from megatron_lowbit.collectives import exchange

    exchange.LATER_SECONDS = 3
    x = torch.zeros(8, 64)
    lowbit.all_reduce(x, "int4:g32", min_bytes=0)
    try:
        lowbit.all_reduce(x, "int8:g32" if rank == 1 else "int4:g32", min_bytes=0)
    except lowbit.RankError as error:
        torch.save(str(error), f"{folder}/{rank}")
    os._exit(0)


def test_a_rank_that_changes_its_settings_alone_hangs_nobody(tmp_path):
    run_ranks(3, _changes_its_mind, str(tmp_path), timeout=60, dead=(0, 1, 2))
    messages = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(3)]
    assert "rank 0 of the group (global rank 0) did not come to compare settings within 3 s" in messages[1]
    assert "'spec': 'int8:g32'" in messages[1]
    assert all(message.startswith(f"rank {rank} lost rank ") for rank, message in enumerate(messages) if rank != 1)


def _one_dies(rank, world):
    x = torch.zeros(8, 64)
    lowbit.all_reduce(x, "int4:g32", algorithm="two-step")
    if rank == 1:
        os._exit(0)
    start = time.monotonic()
    try:
        for _ in range(3):
            lowbit.all_reduce(x, "int4:g32", algorithm="two-step")
    except lowbit.RankError as error:
        message = f"{time.monotonic() - start < 30} {error}"
    else:
        message = "no error"
    torch.save(message, os.environ["RESULT"] + f"/{rank}")
    os._exit(0)


def test_when_a_rank_dies_the_others_end_with_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("RESULT", str(tmp_path))
    run_ranks(3, _with_result_folder, str(tmp_path), timeout=60, dead=(0, 1, 2))
    for rank in (0, 2):
        message = torch.load(tmp_path / str(rank), weights_only=True)
        assert re.match(rf"True rank {rank} lost rank \d of its group of 3", message)


def _with_result_folder(rank, world, folder):
    os.environ["RESULT"] = folder
    _one_dies(rank, world)
