"""Sequence parallelism: each gather before a column-parallel layer, each reduce-scatter behind a row-parallel one."""

import pytest
import torch

import megatron_lowbit as lowbit
from tests.calibrations import random_calibration
from tests.megatron_models import BATCH, HIDDEN, LENGTH, gathered, gpt, logits, refused, settings, start
from tests.ranks import run_ranks

WORLD, SPEC = 2, "int5:g32/int6:g32"
PARTS = [f"layers.{layer}.{part}" for layer in range(2) for part in ("attention", "mlp")]
GATHERS = [*(f"{part}.gather" for part in PARTS), "output_layer.gather"]


def _reference(model):
    """Logits with every message of the layers gathered exactly and the ranks simulated, and how many there were."""
    from megatron.core.tensor_parallel import layers

    originals = layers.dist_all_gather_func, layers.reduce_scatter_to_sequence_parallel_region
    calls = {"gather": 0, "scatter": 0}

    def gather(buffer, x, group=None):
        calls["gather"] += 1
        buffer.copy_(lowbit.simulate.all_gather(gathered(x), SPEC, 0))

    def scatter(x, **group):  # not in 0.12
        calls["scatter"] += 1
        if calls["scatter"] == 1:  # the embedding's, exact
            return originals[1](x, **group)
        return lowbit.simulate.reduce_scatter(gathered(x), SPEC, 0)[torch.distributed.get_rank()]

    layers.dist_all_gather_func, layers.reduce_scatter_to_sequence_parallel_region = gather, scatter
    try:
        return logits(model), calls
    finally:
        layers.dist_all_gather_func, layers.reduce_scatter_to_sequence_parallel_region = originals


def _column_gradients(model, config):
    """Of a linear function of what fc1 makes of its split input, with respect to that input and to fc1's weight."""
    from contextlib import nullcontext

    from megatron_lowbit.patches import megatron_core

    linear, rank = model.decoder.layers[0].mlp.linear_fc1, torch.distributed.get_rank()
    model.zero_grad()
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(LENGTH // WORLD, BATCH, HIDDEN, generator=generator).requires_grad_()
    with megatron_core.enable(config, model) if config else nullcontext():
        out, _ = linear(x)
        out.backward(torch.randn(out.shape, generator=generator))
    weight = linear.weight.grad
    return [out.detach(), x.grad, torch.zeros(1) if weight is None else weight.clone()]


def _another_gather(input, weight, **others):
    """A linear layer that gathers in a way nobody knows of."""
    return torch.cat(gathered(input)) @ weight.t()


@torch.no_grad()
def _everything(rank, world):
    from megatron.core.tensor_parallel import layers

    from megatron_lowbit.patches import megatron_core

    def names():
        return [layers.ColumnParallelLinear.forward, layers.dist_all_gather_func,
                layers.gather_from_sequence_parallel_region]  # fmt: skip

    start(world)
    originals = names()
    model = gpt(settings(world, sequence_parallel=True))
    config, results = lowbit.CommConfig(SPEC, min_bytes=0), {"exact": logits(model)}
    results["reference"], results["calls"] = _reference(model)
    lowbit.reset_stats()
    with megatron_core.enable(config, model) as handle:
        results["sites"], results["logits"] = list(handle.sites), logits(model)
        results["stats"] = lowbit.stats()
        with torch.inference_mode():
            results["inference"] = logits(model).clone()
    results["restored"] = names() == originals and torch.equal(logits(model), results["exact"])

    lowbit.reset_stats()
    with megatron_core.enable(config) as handle:
        built = gpt(settings(world, sequence_parallel=True))
        results["sites while building"] = list(handle.sites)
        results["built"] = [logits(built), sorted(lowbit.stats())]
    lowbit.reset_stats()
    with megatron_core.enable(config):
        results["earlier"] = [logits(gpt_without_names(model)), lowbit.stats()]
    lowbit.reset_stats()
    with megatron_core.enable(lowbit.CommConfig(SPEC, sites=("layers.*.mlp",)), model):
        logits(model)
        results["reduce-scatters of the MLPs"] = lowbit.stats()

    for name, spec in (("calibrated", "selective4:outliers=1/8"), ("int8 gathers", "selective4:outliers=1/8/int8")):
        known = random_calibration(PARTS, world, HIDDEN, "1/8")
        chosen = lowbit.CommConfig(spec, calibration=known)
        if name == "calibrated":
            results[name] = [refused(megatron_core.enable, chosen, model)]
            handle = megatron_core.enable(chosen)
            results[name] += [refused(gpt, settings(world, sequence_parallel=True))]
            handle.disable()
        else:
            lowbit.reset_stats()
            with megatron_core.enable(chosen, model):
                logits(model)
                results[name] = lowbit.stats()

    with torch.enable_grad():
        results["gradients"] = [_column_gradients(model, None), _column_gradients(model, config)]
        model.requires_grad_(False)
        results["frozen gradients"] = [_column_gradients(model, None), _column_gradients(model, config)]
    lowbit.reset_stats()
    with megatron_core.enable(config, model):
        results["frozen"] = [logits(model), lowbit.stats()]
        layers.linear_with_frozen_weight = _another_gather
        results["unknown"] = refused(logits, model)
    return results


def gpt_without_names(model):
    for module in model.modules():
        module.__dict__.pop("lowbit_site", None)
    return model


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(WORLD, _everything, timeout=200)


def test_every_gather_and_every_reduce_scatter_is_compressed(ranks):
    for rank in ranks:
        assert sorted(rank["sites"]) == sorted(rank["stats"]) == sorted(PARTS + GATHERS)
        for site, stats in rank["stats"].items():
            path = "all-gather" if site.endswith("gather") else "reduce-scatter"
            assert stats["paths"] == {path: 1} and stats["fallbacks"] == {}, site
            assert stats["values"] == LENGTH * BATCH * HIDDEN // (WORLD if path == "all-gather" else 1)


def test_logits_equal_an_independent_simulation(ranks):
    for rank in ranks:
        assert rank["calls"] == {"gather": len(GATHERS), "scatter": 1 + len(PARTS)}
        assert torch.equal(rank["logits"], rank["reference"]) and not torch.equal(rank["logits"], rank["exact"])
        assert (rank["logits"] - rank["exact"]).norm() < 0.2 * rank["exact"].norm()
        assert torch.equal(rank["logits"], ranks[0]["logits"]) and torch.equal(rank["logits"], rank["inference"])


def test_a_model_built_later_has_the_same_sites(ranks):
    for rank in ranks:
        assert sorted(rank["sites while building"]) == sorted(rank["sites"])
        assert torch.equal(rank["built"][0], rank["logits"]) and rank["built"][1] == sorted(rank["sites"])


def test_a_model_built_earlier_is_compressed_without_names(ranks):
    for rank in ranks:
        out, stats = rank["earlier"]
        assert torch.equal(out, rank["logits"])
        assert {site: row["paths"] for site, row in stats.items()} == {
            "row_parallel": {"reduce-scatter": len(PARTS)},
            "column_parallel.gather": {"all-gather": len(GATHERS)},
        }


def test_disabling_restores_everything(ranks):
    assert all(rank["restored"] for rank in ranks)


def test_unselected_gathers_go_exact_and_are_counted(ranks):
    for site, stats in ranks[0]["reduce-scatters of the MLPs"].items():
        selected = site.endswith("mlp")
        assert stats["paths"] == ({"reduce-scatter": 1} if selected else {"exact": 1})
        assert stats["fallbacks"] == ({} if selected else {"site not selected": 1})


def test_a_calibration_that_knows_no_gathers_is_refused_when_the_model_is_built(ranks):
    for rank in ranks:
        for message in rank["calibrated"]:
            assert "lacks layers.0.attention.gather" in message and "sites=('layers.*.attention'" in message
        assert all(stats["fallbacks"] == {} for stats in rank["int8 gathers"].values())
        assert sorted(rank["int8 gathers"]) == sorted(PARTS + GATHERS)


@pytest.mark.parametrize("key", ["gradients", "frozen gradients"])
def test_gradients_are_those_of_the_exact_layer(ranks, key):
    for rank in ranks:
        exact, compressed = rank[key]
        assert not torch.equal(exact[0], compressed[0]) and exact[1].abs().max() > 0
        assert all(torch.equal(a, b) for a, b in zip(exact[1:], compressed[1:], strict=True))
        assert (exact[2].abs().max() > 0) == (key == "gradients")


def test_frozen_weights_gather_elsewhere_and_are_compressed_too(ranks):
    for rank in ranks:
        assert torch.equal(rank["frozen"][0], rank["logits"])
        assert sorted(rank["frozen"][1]) == sorted(PARTS + GATHERS)


def test_a_layer_that_gathers_in_another_way_is_a_loud_error(ranks):
    for rank in ranks:
        assert "layers.0.attention.gather did not communicate as the releases do" in rank["unknown"]
