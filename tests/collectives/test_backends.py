"""Real ranks on each backend, through the public interface: the same bits as one process with the definition."""

from __future__ import annotations

import os

import pytest
import torch

import megatron_lowbit as lowbit
from tests.codecs.samples import same_bits
from tests.ranks import run_ranks
from tests.tensors import sample

pytest.importorskip("triton")
SPECS = ("int4:g32/int8:g128", "int5:g32")
SHAPES = ((3, 256), (5, 100), (1, 64))


def _every_collective(rank: int, world: int, backend: str) -> list:
    os.environ["LOWBIT_BACKEND"] = backend
    results = []
    for spec in SPECS:
        for shape in SHAPES:
            x, residual, weight = (
                sample(rank, shape, torch.bfloat16),
                sample(9, shape, torch.bfloat16),
                torch.ones(shape[1]),
            )
            for algorithm in ("one-shot", "two-step"):
                results.append(lowbit.all_reduce(x, spec, algorithm=algorithm))
                results += lowbit.all_reduce_add_rmsnorm(x, residual, weight, spec, algorithm=algorithm, eps=1e-5)
            results.append(lowbit.all_gather(x, spec, dim=1))
            results.append(lowbit.reduce_scatter(x.repeat(world, 1), spec))
            results.append(lowbit.all_to_all(x.repeat(world, 1), spec))
    stats = lowbit.stats()
    assert {name for site in stats.values() for name in site["backends"]} == {backend}
    assert sum(site["calls"] for site in stats.values()) == 7 * len(SPECS) * len(SHAPES)
    return results


def _expected(rank: int, world: int) -> list:
    results = []
    for spec in SPECS:
        for shape in SHAPES:
            parts = [sample(r, shape, torch.bfloat16) for r in range(world)]
            residual = sample(9, shape, torch.bfloat16)
            for algorithm in ("one-shot", "two-step"):
                total = lowbit.simulate.all_reduce(parts, spec, algorithm=algorithm)
                h = (total.float() + residual.float()).bfloat16()
                root = (h.double().square().mean(1, keepdim=True) + 1e-5).sqrt()
                results += [total, h.double() / root, h]
            repeated = [x.repeat(world, 1) for x in parts]
            results.append(lowbit.simulate.all_gather(parts, spec, dim=1))
            results.append(lowbit.simulate.reduce_scatter(repeated, spec)[rank])
            results.append(lowbit.simulate.all_to_all(repeated, spec)[rank])
    return results


@pytest.mark.parametrize("backend, world", [("triton", 3), ("triton", 2), ("numba", 3)])
def test_ranks_agree_with_one_process_that_runs_the_definition(monkeypatch, backend, world):
    monkeypatch.setenv("LOWBIT_BACKEND", "reference")
    ranks = run_ranks(world, _every_collective, backend)
    for rank, results in enumerate(ranks):
        expected = _expected(rank, world)
        assert len(results) == len(expected)
        for ours, theirs, first in zip(results, expected, ranks[0]):
            if theirs.dtype == torch.float64:  # the norm: to its rounding, and on all ranks alike
                assert ((ours.double() - theirs).abs() <= theirs.abs() * 2**-8 + 1e-6).all()
                assert same_bits(ours, first)
            else:
                assert same_bits(ours, theirs)


def test_ranks_on_different_backends_are_told_apart():
    run_ranks(2, _mixed)


def _mixed(rank: int, world: int) -> None:
    os.environ["LOWBIT_BACKEND"] = ("triton", "reference")[rank]
    with pytest.raises(
        lowbit.RankError, match="ranks disagree on backend: rank 0 has 'triton', rank 1 has 'reference'"
    ):
        lowbit.all_reduce(torch.ones(2, 32), "int4:g32")
