"""Memory of results is taken again, and never while anybody can see it."""

import gc
import threading

import pytest
import torch

import megatron_lowbit as lowbit
from megatron_lowbit.collectives import results
from tests.ranks import run_ranks

LARGE = (1024, 4096)


@pytest.fixture(autouse=True)
def nothing_idle():
    results._idle.clear()
    yield
    results._idle.clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.uint8])
def test_a_result_is_like_any_other_tensor(dtype):
    x = torch.zeros(LARGE, dtype=dtype).t()
    result = results.empty_like(x)
    assert (result.shape, result.dtype, result.device) == (x.shape, dtype, x.device)
    assert result.is_contiguous() and not result._is_view() and not result.requires_grad
    assert result.untyped_storage().nbytes() == x.nbytes  # saved or copied, it is no larger than it looks
    assert result.data_ptr() % results.ALIGNMENT == 0


def test_memory_is_taken_again_once_a_result_is_gone():
    x = torch.zeros(LARGE, dtype=torch.bfloat16)
    first = results.empty_like(x)
    place = first.data_ptr()
    second = results.empty_like(x)
    assert second.data_ptr() != place
    del first
    assert results.empty_like(x.float()[:512]).data_ptr() == place  # of as many bytes, whatever they mean


@pytest.mark.parametrize("of", [lambda t: t[3:5], lambda t: t.t(), lambda t: t.numpy(), lambda t: t.untyped_storage()])
def test_whatever_shows_a_result_keeps_it(of):
    x = torch.zeros(LARGE, dtype=torch.float32)
    result = results.empty_like(x)
    place = result.data_ptr()
    held = of(result)
    del result
    gc.collect()
    others = [results.empty_like(x) for _ in range(3)]
    assert place not in [other.data_ptr() for other in others]
    del held
    gc.collect()
    assert results.empty_like(x).data_ptr() == place


def test_few_blocks_are_kept(monkeypatch):
    x = torch.zeros(LARGE, dtype=torch.bfloat16)
    many = [results.empty_like(x) for _ in range(5)]
    del many
    assert [len(blocks) for blocks in results._idle.values()] == [results.SPARE]
    monkeypatch.setattr(results, "IDLE", 3 * x.nbytes)
    many = [results.empty_like(torch.cat([x, x])) for _ in range(2)]
    del many
    assert sum(size * len(blocks) for size, blocks in results._idle.items()) <= results.IDLE


def test_small_results_are_left_to_torch():
    results.empty_like(torch.zeros(64, 64))
    assert not results._idle


def test_results_may_end_in_another_thread():
    x = torch.zeros(LARGE)

    def many():
        for _ in range(200):
            results.empty_like(x).fill_(1)

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({block.ctypes.data for block in results._idle[x.nbytes]}) == len(results._idle[x.nbytes]) > 0


def test_a_result_can_be_trained_on():
    weight = torch.nn.Parameter(torch.ones(LARGE[1]))
    with torch.no_grad():
        result = results.empty_like(torch.zeros(LARGE)).zero_()
    result.add_(weight).sum().backward()
    assert torch.equal(weight.grad, torch.full_like(weight, LARGE[0]))


def _kept(rank, world):
    """Results that are held keep their values while others are made; the memory of those that are not is reused."""
    x = torch.full(LARGE, float(rank + 1)).bfloat16()
    held = [lowbit.all_reduce(x * factor, "int8:g128", min_bytes=0) for factor in (1, 2, 4)]
    places = [lowbit.all_reduce(x, "int8:g128", min_bytes=0).data_ptr() for _ in range(6)]
    return {"values": [[t.min().item(), t.max().item()] for t in held], "places": len(set(places))}


def test_all_reduce_reuses_what_nobody_holds():
    for rank in run_ranks(2, _kept):
        assert rank["values"] == [[3.0, 3.0], [6.0, 6.0], [12.0, 12.0]]
        assert rank["places"] == 1
