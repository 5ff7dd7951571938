"""Transforms that the legs of two-step share stay on in between: against the oracles, simulated and on real ranks."""

import numpy as np
import pytest
import torch

import megatron_lowbit as lowbit
from megatron_lowbit.collectives import all_reduce
from megatron_lowbit.collectives.exchange import Workspace
from tests.codecs import oracle_gauss, oracle_selective, samples
from tests.codecs.samples import same, same_bits
from tests.ranks import run_ranks

SHAPES = [(3, 300), (2, 512), (1, 256), (5, 33), (2, 3, 64)]


@pytest.fixture(params=["reference", "numba"])
def backend(request, monkeypatch):
    monkeypatch.setenv("LOWBIT_BACKEND", request.param)
    return request.param


def partial(rank: int, shape, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def stays_rotated(partials: list[torch.Tensor], scatter_bits: int, gather_bits: int, group: int) -> torch.Tensor:
    rows = [x.reshape(-1, x.shape[-1]).float().numpy() for x in partials]
    wires = [oracle_gauss.encode(x, scatter_bits, group) for x in rows]
    total = oracle_gauss.decode(wires, *rows[0].shape, scatter_bits, group, rotates=False)
    wire = oracle_gauss.encode(total, gather_bits, group, rotates=False)
    y = torch.from_numpy(oracle_gauss.decode([wire], *rows[0].shape, gather_bits, group))
    return y.view(partials[0].shape).to(partials[0].dtype)


def comes_back(partials: list[torch.Tensor], scatter: str, gather: str) -> torch.Tensor:
    scatter, gather = lowbit.codec(scatter), lowbit.codec(gather)
    total = torch.empty(partials[0].shape)
    rows = total.view(-1, total.shape[-1])
    scatter.reduce_rows(torch.stack([scatter.encode(x) for x in partials]), rows)
    return gather.decode(gather.encode(total), total.shape, partials[0].dtype)


@pytest.mark.parametrize("group", [32, 128, 256])
@pytest.mark.parametrize("bits", [(4, 4), (2, 6)])
def test_one_rotation_for_both_legs(backend, group, bits):
    legs = [f"gauss{b}:g{group}" for b in bits]
    for n, shape in enumerate(SHAPES):
        partials = [partial(rank, shape, (torch.float32, torch.bfloat16)[n % 2]) for rank in range(3)]
        y = lowbit.simulate.all_reduce(partials, "/".join(legs), "two-step")
        assert same_bits(y, stays_rotated(partials, *bits, group)), shape
    # Partial sums that cancel each other leave rotated values of exactly 0, until rounding in between spoils them.
    x = partial(0, (8, 256))
    partials = [x, 0.02 * partial(1, (8, 256)) - x]
    y = lowbit.simulate.all_reduce(partials, "/".join(legs), "two-step")
    assert same_bits(y, stays_rotated(partials, *bits, group))
    assert bits != (4, 4) or not same_bits(y, comes_back(partials, *legs)), "this test shows nothing"


@pytest.mark.parametrize("spec", ["gauss4:g64/gauss4:g128", "gauss4:g128/int8:g128", "int4:g32/gauss6:g256"])
def test_other_legs_come_back_in_between(backend, spec):
    for shape in SHAPES:
        partials = [partial(rank, shape, torch.bfloat16) for rank in range(3)]
        y = lowbit.simulate.all_reduce(partials, spec, "two-step")
        assert same_bits(y, comes_back(partials, *spec.split("/"))), shape


def test_one_shot_rotates_back_once(backend):
    for shape in SHAPES:
        partials = [partial(rank, shape) for rank in range(3)]
        rows = [x.view(-1, shape[-1]).numpy() for x in partials]
        wires = [oracle_gauss.encode(x, 3, 128) for x in rows]
        expected = torch.from_numpy(oracle_gauss.decode(wires, *rows[0].shape, 3, 128)).view(shape)
        assert same_bits(lowbit.simulate.all_reduce(partials, "gauss3:g128", "one-shot"), expected)


def test_a_token_does_not_depend_on_its_batch(backend):
    partials = [partial(rank, (6, 300), torch.bfloat16) for rank in range(3)]
    for spec in ("gauss4:g128", "gauss2:g256/gauss5:g256"):
        together = lowbit.simulate.all_reduce(partials, spec, "two-step")
        for token in range(6):
            alone = lowbit.simulate.all_reduce([p[token : token + 1] for p in partials], spec, "two-step")
            assert same_bits(alone[0], together[token])


def calibrations(features: int, world: int):
    """Statistics of the scatter leg, with ranges per rank, and of the gather leg: the sum's."""
    scatter = samples.statistics(features, max(1, features // 64), senders=world, seed=features)
    low, high = (world**0.5 * bound[:1] for bound in (scatter.low, scatter.high))
    return scatter, type(scatter)(scatter.outliers, low, high)


LEGS = [
    ("gauss4:g128", "gauss5:g128"),
    ("gauss2:g256", "gauss2:g256"),
    ("gauss4:outliers=1/64", "int8:g64"),
    ("int4:outliers=1/64", "selective4"),
    ("selective4", "selective4"),
]


def _calibrated(rank, world):
    results, workspace = [], Workspace()
    for shape in SHAPES:
        for legs in LEGS:
            codecs = [lowbit.codec(leg).bind(facts, rank) for leg, facts in zip(legs, calibrations(shape[-1], world))]
            x = partial(rank, shape)
            results.append(all_reduce.two_step(x, *codecs, torch.distributed.group.WORLD, workspace).result(x))
            results.append(all_reduce.one_shot(x, codecs[0], torch.distributed.group.WORLD, workspace).result(x))
    return results


def selective_by_hand(rows: list[np.ndarray], scatter, gather) -> tuple[np.ndarray, np.ndarray]:
    """-> the results of two-step and of one-shot."""
    outliers, (low, high) = scatter.outliers, (scatter.low.numpy(), scatter.high.numpy())
    wires = [oracle_selective.encode(x, low[rank], high[rank], outliers) for rank, x in enumerate(rows)]
    total = oracle_selective.decode(wires, len(rows[0]), low, high, outliers)
    sums = gather.low.numpy(), gather.high.numpy()
    wire = oracle_selective.encode(total, sums[0][0], sums[1][0], outliers)
    return oracle_selective.decode([wire], len(rows[0]), *sums, outliers), total


def by_hand(partials: list[torch.Tensor], legs: tuple[str, str], facts, stays: bool) -> torch.Tensor:
    scatter, gather = (lowbit.codec(leg).bind(some, 0) for leg, some in zip(legs, facts))
    wires, total = torch.stack([scatter.encode(x) for x in partials]), torch.empty(partials[0].shape)
    (scatter.inner if stays else scatter).reduce_rows(wires, total.view(-1, total.shape[-1]))
    return gather.decode((gather.inner if stays else gather).encode(total), total.shape, total.dtype)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_agree_with_the_oracles(world):
    ranks = run_ranks(world, _calibrated)
    for other in ranks[1:]:
        assert all(same_bits(a, b) for a, b in zip(ranks[0], other, strict=True))
    results = iter(ranks[0])
    for shape in SHAPES:
        partials = [partial(rank, shape) for rank in range(world)]
        facts = calibrations(shape[-1], world)
        for legs in LEGS:
            two, one = next(results), next(results)
            if legs[0] == "selective4":
                rows = [x.view(-1, shape[-1]).numpy() for x in partials]
                expected = [torch.from_numpy(y).view(shape) for y in selective_by_hand(rows, *facts)]
                assert same(two, expected[0]) and same(one, expected[1]), shape
            elif legs[1] == "gauss5:g128":
                assert same_bits(two, stays_rotated(partials, 4, 5, 128)), shape
            else:
                assert same_bits(two, by_hand(partials, legs, facts, stays=legs[1] != "int8:g64")), (shape, legs)


@pytest.mark.parametrize("names", [("gauss4", "gauss6"), ("int4", "int4"), ("int4", "gauss6")])
def test_a_split_stays_in_between(backend, names):
    """Ordinary features and outliers are reduced side by side, as if they were messages of their own."""
    facts = samples.statistics(100, 6)
    scatter, gather = (lowbit.codec(f"{name}:outliers=1/16").bind(facts, 0) for name in names)
    x = [partial(rank, (7, 100)) for rank in range(3)]
    wire, out = torch.empty(gather.wire_nbytes((7, 100)), dtype=torch.uint8), torch.empty(7, 100)
    wires = torch.stack([scatter.encode(part) for part in x])
    all_reduce.reduce_shard(wires, (7, 100), scatter, gather, wire, Workspace())
    gather.reduce_rows(wire[None], out)
    kept = [feature for feature in range(100) if feature not in facts.outliers]
    ordinary = lowbit.simulate.all_reduce([part[:, kept] for part in x], "/".join(names), "two-step")
    picked = lowbit.simulate.all_reduce([part[:, facts.outliers] for part in x], "bf16", "two-step")
    assert same_bits(out[:, kept], ordinary) and same_bits(out[:, facts.outliers], picked)
