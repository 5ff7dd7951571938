"""The embedding's reduce and the logits' gather: exact and uncounted, unless they are asked for by name."""

from contextlib import nullcontext

import pytest
import torch

import megatron_lowbit as lowbit
from tests.calibrations import random_calibration
from tests.megatron_models import BATCH, HIDDEN, LENGTH, VOCAB, gathered, gpt, refused, settings, start, tokens
from tests.ranks import run_ranks

WORLD, SPEC = 2, "int5:g32/int6:g32"
NAMED = ("embedding", "logits")


def logits(model):
    return model(*tokens(), runtime_gather_output=True)


def _reference(model, spec=SPEC):
    """Logits with the embedding's and the logits' message gathered exactly and the ranks simulated."""
    from megatron.core.tensor_parallel import layers

    names = ["reduce_from_tensor_model_parallel_region", "reduce_scatter_to_sequence_parallel_region"]
    names += ["gather_from_tensor_model_parallel_region"]
    originals, calls = [getattr(layers, name) for name in names], []

    def embedding(original, simulate):
        def call(x, **group):  # not in 0.12
            calls.append(0)  # the first one is the embedding's
            return simulate(gathered(x)) if len(calls) == 1 else original(x, **group)

        return call

    rank = torch.distributed.get_rank()
    ours = [
        embedding(originals[0], lambda parts: lowbit.simulate.all_reduce(parts, spec, "two-step")),
        embedding(originals[1], lambda parts: lowbit.simulate.reduce_scatter(parts, spec, 0)[rank]),
        lambda x, group=None: lowbit.simulate.all_gather(gathered(x), spec, -1),
    ]
    for name, function in zip(names, ours, strict=True):
        setattr(layers, name, function)
    try:
        return logits(model)
    finally:
        for name, function in zip(names, originals, strict=True):
            setattr(layers, name, function)


def _gradients(model, config):
    """Of the embedding and of the output layer, each alone and linear."""
    from megatron_lowbit.patches import megatron_core

    embedding, output = model.embedding.word_embeddings, model.output_layer
    model.zero_grad()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(LENGTH, BATCH, HIDDEN, generator=generator).requires_grad_()
    with megatron_core.enable(config, model) if config else nullcontext():
        for out in (embedding(tokens()[0]), output(x, runtime_gather_output=True)[0]):
            out.backward(torch.randn(out.shape, generator=generator))
    return [out.detach(), embedding.weight.grad.clone(), output.weight.grad.clone(), x.grad]


@torch.no_grad()
def _everything(rank, world):
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import layers

    from megatron_lowbit.patches import megatron_core

    start(world)
    results = {}
    for parallel in (False, True):
        model = gpt(settings(world, sequence_parallel=parallel))
        try:
            exact = logits(model)
        except AssertionError:  # 0.12 does not gather logits with sequence parallelism
            continue
        reference = _reference(model)
        chosen = lowbit.CommConfig(SPEC, "two-step", sites=NAMED)
        for route in ("model", "process"):
            lowbit.reset_stats()
            with megatron_core.enable(chosen, model if route == "model" else None) as handle:
                out, stats = logits(model), lowbit.stats()
            results[f"{route} {parallel}"] = [exact, reference, out, stats, list(handle.sites)]
        results[f"restored {parallel}"] = torch.equal(logits(model), exact)
    model = gpt(settings(world))
    for sites in (None, ("*",), ("layers.*",), ("emb*",), ("*", "logits")):
        lowbit.reset_stats()
        with megatron_core.enable(lowbit.CommConfig(SPEC, sites=sites), model):
            logits(model)
            results[f"asked {sites}"] = sorted(set(lowbit.stats()) & set(NAMED))
    lowbit.reset_stats()
    parted = torch.randn(LENGTH, BATCH, VOCAB // world, generator=torch.Generator().manual_seed(rank))
    with megatron_core.enable(chosen) as handle:  # what T5's inference code does behind the model
        outside = tensor_parallel.gather_from_tensor_model_parallel_region(parted)
        results["outside"] = [outside, lowbit.simulate.all_gather(gathered(parted), SPEC, -1), list(handle.sites)]
    results["outside"] += [lowbit.stats(), tensor_parallel.gather_from_tensor_model_parallel_region(parted)]
    spec, known = "selective4:outliers=1/8", random_calibration(["layers.0.mlp"], world, HIDDEN, "1/8")
    for site in NAMED:
        asked = lowbit.CommConfig(spec, calibration=known, sites=("layers.0.mlp", site))
        results[f"calibrated {site}"] = refused(megatron_core.enable, asked, model)
    with torch.enable_grad():
        results["gradients"] = [_gradients(model, None), _gradients(model, chosen)]
    original = layers.VocabParallelEmbedding.forward
    layers.VocabParallelEmbedding.forward = lambda self, ids: torch.zeros(*ids.shape, HIDDEN)
    with megatron_core.enable(chosen, model):
        results["unknown"] = refused(logits, model)
    layers.VocabParallelEmbedding.forward = original
    return results


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(WORLD, _everything, timeout=200)


@pytest.mark.parametrize("parallel", [False, True], ids=["all-reduce", "reduce-scatter"])
@pytest.mark.parametrize("route", ["model", "process"])
def test_both_are_compressed_when_they_are_named(ranks, route, parallel):
    for rank in ranks:
        if f"{route} {parallel}" not in rank:
            pytest.skip("this release does not gather logits with sequence parallelism")
        exact, reference, out, stats, sites = rank[f"{route} {parallel}"]
        assert torch.equal(out, reference) and not torch.equal(out, exact)
        assert torch.equal(out, ranks[0][f"{route} {parallel}"][2])
        paths = {site: stats[site]["paths"] for site in NAMED}
        assert paths == {"embedding": {"reduce-scatter" if parallel else "two-step": 1}, "logits": {"all-gather": 1}}
        assert all(set(row["paths"]) == {"exact"} for site, row in stats.items() if site not in NAMED)
        assert set(NAMED) <= set(sites) and rank[f"restored {parallel}"]


def test_nothing_but_a_name_asks_for_them(ranks):
    expected = {
        None: [],
        ("*",): [],
        ("layers.*",): [],
        ("emb*",): ["embedding"],
        ("*", "logits"): ["logits"],
    }
    for rank in ranks:
        assert {sites: rank[f"asked {sites}"] for sites in expected} == expected


def test_a_gather_outside_of_the_model_follows_the_process(ranks):
    for rank in ranks:
        out, reference, sites, stats, exact = rank["outside"]
        assert torch.equal(out, reference) and not torch.equal(out, exact)
        assert sites == ["logits"] and stats["logits"]["paths"] == {"all-gather": 1}


def test_a_calibration_that_lacks_them_is_refused(ranks):
    for site in NAMED:
        assert f"lacks {site}" in ranks[0][f"calibrated {site}"]


def test_gradients_are_those_of_the_exact_layers(ranks):
    for rank in ranks:
        exact, compressed = rank["gradients"]
        assert not torch.equal(exact[0], compressed[0])
        assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(exact[1:], compressed[1:], strict=True))


def test_an_embedding_that_reduces_in_another_way_is_a_loud_error(ranks):
    assert "embedding did not communicate as the releases do" in ranks[0]["unknown"]
