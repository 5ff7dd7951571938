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
