"""Megatron's collectives, compressed: rows shared unevenly, and gradients that are those of the exact ones."""

import pytest
import torch

import megatron_lowbit as lowbit
from tests.patches.megatron.moe_layers import gather_unevenly, init_parallel
from tests.ranks import run_ranks

ROWS, SPEC = [3, 5], "int6:g32"  # of each rank


def _rows(count, seed):
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def _everything(rank, world):
    import torch.distributed as dist

    from megatron_lowbit.patches import megatron_core  # noqa: F401  says what to install where Megatron is missing
    from megatron_lowbit.patches.megatron import collectives as ours

    init_parallel(tp=2, ep=1, etp=1)
    gather_unevenly()
    from megatron.core.tensor_parallel import mappings as theirs

    group, config = dist.group.WORLD, lowbit.CommConfig(SPEC, algorithm="two-step")
    sends = [[1, 2], [4, 1]]
    receives = [[1, 4], [2, 1]]
    mine, all_rows = _rows(ROWS[rank], rank), _rows(sum(ROWS), rank)
    cases = {
        "all_reduce": (
            all_rows,
            lambda x: ours.all_reduce(x, group, config, "s"),
            theirs.reduce_from_tensor_model_parallel_region,  # among all ranks too; no group can be passed before 0.14
        ),
        "all_to_all": (
            mine,
            lambda x: ours.all_to_all(x, group, config, "s", receives[rank], sends[rank]),
            lambda x: theirs.all_to_all(group, x, receives[rank], sends[rank]),
        ),
        "all_gather": (
            mine,
            lambda x: ours.all_gather(x, group, config, "s", torch.tensor(ROWS)),
            lambda x: theirs.gather_from_sequence_parallel_region(x, group=group, output_split_sizes=ROWS),
        ),
        "reduce_scatter": (
            all_rows,
            lambda x: ours.reduce_scatter(x, group, config, "s", ROWS),
            lambda x: theirs.reduce_scatter_to_sequence_parallel_region(x, group=group, input_split_sizes=ROWS),
        ),
    }
    results = {}
    for name, (x, compressed, exact) in cases.items():
        lowbit.reset_stats()
        pair = []
        for function in (exact, compressed):
            x.grad = None
            out = function(x.clone())  # Megatron reduces in place
            out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(7 + rank)))
            pair += [out.detach(), x.grad.clone()]
        results[name] = [*pair, lowbit.stats()["s"]["paths"], lowbit.stats()["s"]["values"]]
    double = ours.reduce_scatter(all_rows.detach().double(), group, config, "s", ROWS)
    results["double"] = [double, ours.reduce_scatter(all_rows.detach(), group, config, "s", ROWS)]
    return results


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(2, _everything, timeout=120)


@pytest.mark.parametrize(
    ("name", "path", "values"),
    [
        ("all_reduce", "two-step", (8 * 64, 8 * 64)),
        ("all_to_all", "all-to-all", (3 * 64, 5 * 64)),
        ("all_gather", "all-gather", (5 * 64, 5 * 64)),  # padded to the longest
        ("reduce_scatter", "reduce-scatter", (10 * 64, 10 * 64)),
    ],
)
def test_values_are_rounded_and_gradients_exact(two_ranks, name, path, values):
    for rank, results in enumerate(two_ranks):
        exact, gradient, compressed, other, paths, counted = results[name]
        assert exact.shape == compressed.shape and torch.equal(gradient, other) and gradient.abs().max() > 0
        assert 0 < (compressed - exact).norm() < 0.1 * exact.norm()
        assert paths == {path: 1} and counted == values[rank]


def test_sums_in_the_routers_fp64_travel_as_fp32(two_ranks):
    for results in two_ranks:
        double, single = results["double"]
        assert double.dtype == torch.float64 and torch.equal(double, single.double())
