"""The functional interface's own checks; what ranks compute is tested in tests/collectives."""

import gc
import os

import pytest
import torch

import megatron_lowbit as lowbit
from megatron_lowbit.communicator import _communicators, communicator
from tests.ranks import run_ranks


@pytest.mark.parametrize("collective", [lowbit.all_reduce, lowbit.reduce_scatter, lowbit.all_gather, lowbit.all_to_all])
def test_without_a_process_group(collective):
    with pytest.raises(lowbit.ConfigError, match="init_process_group first, or start the program with torchrun"):
        collective(torch.zeros(4), "int4:g32")


def _bad_input(rank, world):
    messages = []
    for x in (
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(4, dtype=torch.complex64),
        torch.zeros(4, dtype=torch.float64),
        torch.zeros(4, requires_grad=True),
        [1.0],
        torch.zeros(4, 4).to_sparse(),
    ):
        try:
            lowbit.all_reduce(x, "int4:g32")
        except lowbit.ConfigError as error:
            messages.append(str(error))
    try:
        lowbit.all_reduce(torch.zeros(4), "int4:g32", group="world")
    except lowbit.ConfigError as error:
        messages.append(str(error))
    return messages


def test_bad_tensors_and_groups():
    for messages in run_ranks(2, _bad_input):
        expected = [
            "dtype int64",
            "dtype complex64",
            "dtype float64",
            "requires grad",
            "got list",
            "layout",
            "group is 'world'",
        ]
        assert len(messages) == len(expected)
        assert all(part in message for part, message in zip(expected, messages, strict=True))


def _gate(rank, world):
    lowbit.reset_stats()
    from megatron_lowbit.links import UNKNOWN, named

    limit = named("cpu", UNKNOWN).eligible
    small, large = torch.ones(limit // 4 - 1), torch.ones(limit // 4)
    lowbit.all_reduce(small, "int4:g32")
    lowbit.all_reduce(large, "int4:g32")
    return lowbit.stats()["all_reduce"]


def test_small_messages_go_exact_and_are_counted():
    for stats in run_ranks(2, _gate):
        assert stats["paths"] == {"exact": 1, "one-shot": 1} and stats["fallbacks"] == {"below min_bytes": 1}


SPECIAL = [0.0, -0.0, 1.0, -1.0, 3.0e38, -3.0e38, 1.0e-40, 65504.0, float("inf"), -float("inf"), float("nan")]
CASES = [((1, 64), torch.bfloat16), ((3, 5, 96), torch.float16), ((7, 33), torch.float32), ((80, 512), torch.bfloat16)]
SPECIALS = torch.cartesian_prod(torch.tensor(SPECIAL), torch.tensor(SPECIAL)).T.contiguous()  # [ranks, pairs]


def _terms(rank):
    """What the ranks add up; the last is not contiguous."""
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype) for shape, dtype in CASES]
    pairs = [SPECIALS[rank % 2].to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)]
    return [*drawn, torch.tensor(rank + 0.5), drawn[1].transpose(0, 1), *pairs]


def _left_exact(rank, world, transport, limit):
    import torch.distributed as dist

    os.environ["LOWBIT_TRANSPORT"] = transport
    torchs, called = dist.all_reduce, []
    dist.all_reduce = lambda x, **more: called.append(x.numel()) or torchs(x, **more)
    lowbit.reset_stats()
    results, before = [], [x.clone() for x in _terms(rank)]
    for x, same in zip(_terms(rank), before, strict=True):
        results.append(lowbit.all_reduce(x, "int4:g32", min_bytes=limit))
        assert torch.equal(x.nan_to_num(), same.nan_to_num())  # what is passed stays as it is
    stats, ours = lowbit.stats()["all_reduce"], len(called)
    expected = [x.clone(memory_format=torch.contiguous_format) for x in before]
    for x in expected:
        torchs(x)
    return {"results": results, "torchs": expected, "called": ours, "stats": stats}


def _bits(x):
    """Of all NaNs alike: which of two comes out is the processor's choice."""
    x = torch.where(x.isnan(), torch.full_like(x, float("nan")), x)
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16).tolist()


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    "transport, limit, direct", [("tcp", None, True), ("torch", None, False), ("tcp", 1 << 20, False)]
)
def test_what_is_left_exact_goes_over_the_ranks_own_connections(world, transport, limit, direct):
    ranks, terms = run_ranks(world, _left_exact, transport, limit), [_terms(rank) for rank in range(world)]
    calls = len(terms[0])
    for told in ranks:
        assert told["called"] == (0 if direct else calls)
        assert told["stats"]["paths"] == {"exact": calls} and told["stats"]["fallbacks"] == {"below min_bytes": calls}
        assert told["stats"]["backends"] == {}
        for number, result in enumerate(told["results"]):
            assert result.is_contiguous() and result.dtype == terms[0][number].dtype
            assert _bits(result) == _bits(ranks[0]["results"][number])  # all ranks have the same
            summed = terms[0][number].float()
            for rank in range(1, world):
                summed = summed + terms[rank][number].float()
            if direct:
                assert _bits(result) == _bits(summed.to(result.dtype)), number
            if world == 2 or not direct:
                assert _bits(result) == _bits(told["torchs"][number]), number


def _not_selected(rank, world):
    os.environ["LOWBIT_LINK"] = "slow"
    x = torch.randn(500, 1024, generator=torch.Generator().manual_seed(rank)).bfloat16()
    config = lowbit.CommConfig("int4:g32", sites=("other",))
    known = communicator(None, config)
    assert known._decide(x, "s").chunks > 1
    result = known.all_reduce(x, "s")
    return {"result": result, "stats": lowbit.stats()["s"]}


def test_large_messages_are_left_exact_in_chunks():
    ranks = run_ranks(2, _not_selected)
    one, other = (torch.randn(500, 1024, generator=torch.Generator().manual_seed(rank)).bfloat16() for rank in (0, 1))
    for told in ranks:
        assert torch.equal(told["result"], (one.float() + other.float()).bfloat16())
        assert told["stats"]["paths"] == {"exact": 1} and told["stats"]["fallbacks"] == {"site not selected": 1}


def _exact_then_norm(rank, world, transport):
    os.environ["LOWBIT_TRANSPORT"] = transport
    x, residual = (torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)).half() for seed in (rank, 9))
    return list(lowbit.all_reduce_add_rmsnorm(x, residual, torch.ones(64), "int4:g32"))


def test_the_fused_norm_of_what_is_left_exact():
    (ours, others), (torchs, _) = (run_ranks(2, _exact_then_norm, transport) for transport in ("tcp", "torch"))
    for one, other, expected in zip(ours, others, torchs, strict=True):
        assert torch.equal(one, other)
        assert torch.allclose(one.float(), expected.float(), rtol=2**-9, atol=2**-9)


def _of_another_device(rank, world):
    known, x = communicator(None, lowbit.CommConfig("int4:g32")), torch.ones(4, 64)
    ways = [known._decide(each, "s").way for each in (x, x.to("meta"))]
    return [known.facts.direct, known._facts_for(x.to("meta")).direct, *ways]


def test_tensors_of_another_device_stay_torchs():
    assert run_ranks(2, _of_another_device) == [[True, False, "one-shot", ""]] * 2


def _empty(rank, world):
    return [lowbit.all_reduce(torch.zeros(shape), "int4:g32") for shape in ((0,), (3, 0), (0, 64))]


def test_empty_messages_send_nothing():
    assert [[list(x.shape) for x in each] for each in run_ranks(2, _empty)] == [[[0], [3, 0], [0, 64]]] * 2


def _decided_once(rank, world):
    from megatron_lowbit import communicator as module

    asked, choose, module.KEPT = [], module.policy.choose, 4
    module.policy.choose = lambda config, site, nbytes, *more: (
        asked.append(f"{site} {nbytes} {more[-1]}") or choose(config, site, nbytes, *more)
    )
    known = module.communicator(None, lowbit.CommConfig("int4:g32", sites=("a",)))
    for x in (torch.ones(64), torch.ones(128).half(), torch.ones(64)):  # the first two are of as many bytes
        for site in ("a", "b", "a"):
            known.all_reduce(x, site)
    for values in range(1, 9):
        known.all_reduce(torch.ones(values), "a")
    return [asked, len(known._decided), {site: each["fallbacks"] for site, each in lowbit.stats().items()}]


def test_a_decision_is_taken_once_for_each_site_size_and_dtype():
    for asked, kept, fallbacks in run_ranks(2, _decided_once):
        assert asked[:4] == ["a 256 fp32", "b 256 fp32", "a 256 fp16", "b 256 fp16"]
        assert asked[4:] == [f"a {4 * values} fp32" for values in range(1, 9)]
        assert kept <= 4
        assert fallbacks == {"a": {"below min_bytes": 6 + 8}, "b": {"site not selected": 3}}


def _groups_come_and_go(rank, world):
    import torch.distributed as dist

    results = []
    for _ in range(3):
        group = dist.new_group([0, 1])
        results.append(lowbit.all_reduce(torch.full((1, 32), float(rank)), "int8:g32", group=group, min_bytes=0))
        dist.destroy_process_group(group)
        del group
    gc.collect()
    assert len(_communicators) == 0, "destroyed groups are kept alive"
    return results


def test_a_group_made_anew_gets_a_communicator_of_its_own():
    for results in run_ranks(2, _groups_come_and_go):
        assert all(torch.equal(r, torch.ones(1, 32)) for r in results)


def _compiled(rank, world):
    def step(x):
        return lowbit.all_reduce(x * 2, "int6:g32", algorithm="two-step") + 1

    results, compiled = [], torch.compile(step, backend="aot_eager", dynamic=True)
    for rows in (4, 9, 2):
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rank))
        results.append(torch.equal(compiled(x), step(x)))
    try:
        torch.compile(step, backend="aot_eager", fullgraph=True)(torch.ones(3, 64))
    except torch._dynamo.exc.Unsupported:
        results.append("graph break")
    return [results, lowbit.stats()["all_reduce"]["paths"]]


def test_compiled_graphs_break_at_a_collective_and_leave_its_buffers_alone():
    for results, paths in run_ranks(2, _compiled):
        assert results == [True, True, True, "graph break"]
        assert paths == {"two-step": 6}
