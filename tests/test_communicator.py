"""The functional interface's own checks; what ranks compute is tested in tests/collectives."""

import gc

import pytest
import torch

import megatron_lowbit as lowbit
from megatron_lowbit.communicator import _communicators
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
