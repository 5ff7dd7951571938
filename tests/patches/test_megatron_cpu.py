"""The shim answers Megatron's CUDA calls where there is no CUDA, and leaves no trace once disabled."""

import pytest
import torch

from megatron_lowbit.patches import megatron_cpu

CUDA = ("current_device", "current_stream", "synchronize", "stream", "Event", "Stream")
WATCHED = [*((torch.cuda, name) for name in CUDA), (torch.Tensor, "cuda")]
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is idle where CUDA exists")


def snapshot():
    return [(getattr(owner, name), name in vars(owner)) for owner, name in WATCHED]


@pytest.fixture
def before():
    megatron_cpu.enable().disable()
    yield snapshot()
    megatron_cpu.enable().disable()


@without_cuda
def test_replaces_what_megatron_calls(before):
    handle = megatron_cpu.enable()
    assert handle.active
    assert torch.empty(1, device=torch.cuda.current_device()).device.type == "cpu"
    x = torch.ones(2)
    assert x.cuda() is x and x.cuda(0, non_blocking=True) is x
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event()
    start.record(), end.record(), end.wait(), end.synchronize(), torch.cuda.synchronize()
    assert end.query() and start.elapsed_time(end) == 0.0
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current), current.wait_event(stream.record_event()), stream.synchronize()
    with torch.cuda.stream(stream):
        assert stream.record_event(end) is end


@without_cuda
def test_disable_restores_everything(before):
    handle = megatron_cpu.enable()
    assert snapshot() != before
    handle.disable()
    assert snapshot() == before and not handle.active
    handle.disable()
    assert snapshot() == before


@without_cuda
def test_enabling_twice_is_enabling_once(before):
    first, second = megatron_cpu.enable(), megatron_cpu.enable()
    assert first is second
    first.disable()
    assert snapshot() == before
    assert megatron_cpu.enable().active


def test_idle_where_cuda_exists(before, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not megatron_cpu.enable().active
    assert snapshot() == before


TRAINING = [
    *((torch, name) for name in megatron_cpu.FACTORIES), (torch.Tensor, "to"), (torch.nn.Module, "cuda"),
    *((torch.cuda, name) for name in ("device_count", "set_device", "memory_stats")),
]  # fmt: skip


def training_snapshot():
    return [(getattr(owner, name), name in vars(owner)) for owner, name in TRAINING]


@without_cuda
def test_training_makes_tensors_meant_for_cuda_on_the_cpu(before):
    originals = training_snapshot()
    handle = megatron_cpu.enable_training()
    assert handle.active and megatron_cpu.enable_training() is handle and torch.cuda.device_count() == 1
    made = [torch.tensor([1], device="cuda"), torch.ones(2, device=torch.device("cuda", 0)), torch.full((2,), 3)]
    made += [torch.zeros(1).to("cuda:0", torch.float64), torch.zeros(1).to(device="cuda")]
    assert {x.device.type for x in made} == {"cpu"} and made[3].dtype == torch.float64
    with pytest.raises(RuntimeError):
        torch.zeros(1, device="no such device")
    module = torch.nn.Linear(2, 2)
    assert module.cuda(0) is module and torch.cuda.memory_stats()["allocated_bytes.all.peak"] == 0
    handle.disable()
    assert training_snapshot() == originals and not handle.active


def test_training_is_idle_where_cuda_exists(before, monkeypatch):
    originals = training_snapshot()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not megatron_cpu.enable_training().active
    assert training_snapshot() == originals
