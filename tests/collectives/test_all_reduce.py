"""Real ranks at every world size: identical bits on all of them, and the bits the simulation says."""

import pytest
import torch

import megatron_lowbit as lowbit
from tests.ranks import run_ranks

SHAPES = [(3, 7, 96), (1, 1, 512), (2, 33), (1, 256), (5, 1), (4, 130)]
CASES = [
    ("int4:g32", "one-shot"),
    ("int4:g32", "two-step"),
    ("int4:g32/int8:g128", "two-step"),
    ("int3:g64:sym/bf16", "two-step"),
    ("bf16", "two-step"),
    ("fp32", "one-shot"),
    ("int2:g256/int7:g32", "auto"),
]


def partial(rank: int, shape, dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def _every_case(rank, world):
    results, counted = [], []
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            for spec, algorithm in CASES:
                x = partial(rank, shape, dtype)
                before = x.clone()
                results.append(lowbit.all_reduce(x, spec, algorithm=algorithm, min_bytes=0))
                assert torch.equal(x, before), "the input was written to"
    stats = lowbit.stats()["all_reduce"]
    counted = [
        stats["calls"],
        sum(n for path, n in stats["paths"].items() if path != "exact"),
        stats["backends"].get("numba", 0),
    ]
    return {"results": results, "counted": counted}


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 6, 7, 8])
def test_ranks_agree_with_each_other_and_with_the_simulation(world):
    ranks = run_ranks(world, _every_case)
    calls = len(SHAPES) * 3 * len(CASES)
    for rank in ranks:
        assert rank["counted"] == ([calls, calls, calls] if world > 1 else [calls, 0, 0])
        assert all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            for a, b in zip(rank["results"], ranks[0]["results"], strict=True)
        )
    results = iter(ranks[0]["results"])
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            partials = [partial(r, shape, dtype) for r in range(world)]
            exact = sum(p.float() for p in partials)
            for spec, algorithm in CASES:
                result = next(results)
                assert result.dtype == dtype and result.shape == torch.Size(shape)
                assert torch.equal(result, lowbit.simulate.all_reduce(partials, spec, algorithm)), (shape, dtype, spec)
                if spec in ("bf16", "fp32"):
                    assert torch.allclose(result.float(), exact, atol=0.1)


def _subgroups(rank, world):
    import torch.distributed as dist

    odd, even = dist.new_group([1, 3, 4]), dist.new_group([0, 2])
    group = odd if rank in (1, 3, 4) else even
    x = partial(rank, (8, 96), torch.bfloat16)
    non_contiguous = x.t().contiguous().t()
    return [
        lowbit.all_reduce(x, "int4:g32", group=group, algorithm="two-step"),
        lowbit.all_reduce(non_contiguous, "int4:g32", group=group, algorithm="two-step"),
    ]


def test_subgroups_and_non_contiguous_input():
    results = run_ranks(5, _subgroups)
    for members in ([1, 3, 4], [0, 2]):
        expected = lowbit.simulate.all_reduce([partial(r, (8, 96), torch.bfloat16) for r in members], "int4:g32")
        for member in members:
            assert torch.equal(results[member][0], expected) and torch.equal(results[member][1], expected)


def _changing_shapes(rank, world):
    generator = torch.Generator().manual_seed(0)
    totals = []
    for step in range(300):
        tokens, features = (int(n) for n in torch.randint(0, 40, (2,), generator=generator))
        shape = (tokens, features * 8)
        x = partial(1000 * rank + step, shape, torch.bfloat16)
        y = lowbit.all_reduce(x, "int5:g32/int8:g64", algorithm="two-step" if step % 3 else "one-shot")
        totals.append(y)
    return totals


def test_changing_and_empty_shapes_over_hundreds_of_calls():
    first, second, third = run_ranks(3, _changing_shapes)
    for step in range(300):
        assert torch.equal(first[step], second[step]) and torch.equal(first[step], third[step])
        partials = [partial(1000 * r + step, first[step].shape, torch.bfloat16) for r in range(3)]
        assert torch.equal(
            first[step],
            lowbit.simulate.all_reduce(partials, "int5:g32/int8:g64", "two-step" if step % 3 else "one-shot"),
        )


def _non_finite(rank, world):
    x = torch.zeros(4, 128)
    if rank == 1:
        x[2, 70] = float("inf")
    if rank == 2:
        x[0, 0] = float("nan")
    return [
        lowbit.all_reduce(x, spec, algorithm=algorithm)
        for spec in ("int4:g32", "int8:g64:sym", "bf16")
        for algorithm in ("one-shot", "two-step")
    ]


def test_one_ranks_non_finite_value_reaches_every_rank():
    for results in run_ranks(3, _non_finite):
        for y in results:
            assert not y[2, 70].isfinite() and y[0, 0].isnan()
            assert y[1].isfinite().all() and y[3].isfinite().all()


def _exact(rank, world):
    x = torch.full((3, 5), float(rank + 1))
    return [lowbit.all_reduce(x, "int4:g32", algorithm="exact"), lowbit.all_reduce(x, "int4:g32", min_bytes=1000), x]


def test_exact_and_gated_messages_are_really_summed():
    for rank, (exact, gated, x) in enumerate(run_ranks(3, _exact)):
        assert torch.equal(exact, torch.full((3, 5), 6.0)) and torch.equal(gated, exact)
        assert torch.equal(x, torch.full((3, 5), float(rank + 1)))


def _bytes_sent(rank, world):
    x = partial(rank, (64, 1024), torch.bfloat16)
    sent = []
    for spec, algorithm in (("int4:g32", "one-shot"), ("int4:g32", "two-step"), ("bf16", "exact")):
        lowbit.reset_stats()
        lowbit.all_reduce(x, spec, algorithm=algorithm)
        stats = lowbit.stats()["all_reduce"]
        sent.append([stats["bytes_sent"], stats["bytes_bf16"]])
    return sent


def test_bytes_are_what_the_algorithms_send():
    values, bits = 64 * 1024, 5
    for sent in run_ranks(4, _bytes_sent):
        exact = 2 * 3 * values * 2 // 4
        assert sent == [[3 * values * bits // 8, exact], [2 * 3 * values * bits // 8 // 4, exact], [exact, exact]]
