"""The Megatron-Core patch: which reduces it takes, what comes out, and that it leaves no trace."""

from contextlib import nullcontext

import pytest
import torch

import megatron_lowbit as lowbit
from tests.calibrations import random_calibration
from tests.ranks import run_ranks

LAYERS, HIDDEN = 3, 64


def _build(tp, bias=False, row=None):
    """A tiny GPTModel whose weights depend on nothing but their names and this rank's shard of them."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnBackend

    from megatron_lowbit.engines.megatron import init_tensor_parallel
    from megatron_lowbit.patches import megatron_cpu

    megatron_cpu.enable()
    init_tensor_parallel(tp)
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=128,
        num_attention_heads=4,
        add_bias_linear=bias,
        tensor_model_parallel_size=tp,
        use_cpu_initialization=True,
        attention_backend=AttnBackend.local,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    spec = get_gpt_layer_local_spec(normalization="LayerNorm")
    if row is not None:
        mlp = spec.submodules.mlp  # from 0.18 on a functools.partial
        (mlp.keywords["submodules"] if hasattr(mlp, "keywords") else mlp.submodules).linear_fc2 = row
    model = GPTModel(config, spec, vocab_size=96, max_sequence_length=32, position_embedding_type="rope").eval()
    rank = parallel_state.get_tensor_model_parallel_rank()
    for index, (_, parameter) in enumerate(model.named_parameters()):
        split = getattr(parameter, "tensor_model_parallel", False)
        seed = 100 * index + (rank if split else 0)
        generator = torch.Generator().manual_seed(seed)
        if parameter.ndim > 1 or bias:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def _logits(model, length=7):
    ids = torch.arange(2 * length).view(2, length) * 5 % 96
    positions = torch.arange(length).expand_as(ids)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    return model(ids, positions, mask, runtime_gather_output=True)


def _record_partials(model, spec, algorithm, calibration=None, sites=()):
    """Run with every row-parallel reduce replaced by: gather all partial products exactly, then simulate the ranks."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel import layers

    original = layers.reduce_from_tensor_model_parallel_region

    def simulated(x, **group):  # no group before 0.14
        if x.shape[1] == 7:  # the embedding's [batch, sequence, hidden]; the layers' are [sequence, batch, hidden]
            return original(x, **group)
        partials = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(partials, x.contiguous())
        return lowbit.simulate.all_reduce(partials, spec, algorithm, calibration, next(order, None))

    order = iter(sites)
    layers.reduce_from_tensor_model_parallel_region = simulated
    try:
        return _logits(model)
    finally:
        layers.reduce_from_tensor_model_parallel_region = original


@torch.no_grad()
def _everything(rank, world):
    from megatron.core.tensor_parallel.layers import RowParallelLinear
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_lowbit.patches import megatron_core

    original = RowParallelLinear.forward, TransformerLayer.__init__
    results = {}
    for bias in (False, True):
        model = _build(world, bias)
        exact = _logits(model)
        for spec, algorithm in (("int6:g32", "one-shot"), ("int5:g32/int8:g64", "two-step")):
            config = lowbit.CommConfig(spec=spec, algorithm=algorithm)
            lowbit.reset_stats()
            keys = list(model.state_dict())
            with megatron_core.enable(config, model) as handle:
                results[f"sites {bias}"] = list(handle.sites)
                compressed = _logits(model)
                results[f"stats {bias} {spec}"] = lowbit.stats()
                results[f"keys {bias}"] = keys == list(model.state_dict())
            results[f"logits {bias} {spec}"] = [exact, compressed, _record_partials(model, spec, algorithm)]
            results[f"restored {bias} {spec}"] = torch.equal(_logits(model), exact)
    lowbit.reset_stats()
    with megatron_core.enable(lowbit.CommConfig(spec="int6:g32", algorithm="one-shot")) as handle:
        model = _build(world)
        results["process-wide"] = [_logits(model), list(handle.sites), lowbit.stats()]
        handle.verify()
        try:
            megatron_core.enable(lowbit.CommConfig())
        except lowbit.ConfigError as error:
            results["twice"] = str(error)
    lowbit.reset_stats()
    earlier = _build(world)
    with megatron_core.enable(lowbit.CommConfig(spec="int6:g32", algorithm="one-shot")):
        results["built earlier"] = [_logits(earlier), lowbit.stats()]
    with megatron_core.enable(lowbit.CommConfig(spec="int6:g32", algorithm="one-shot")):
        _logits(model)  # named under a handle that is gone: leaving must not call it unhooked
    results["classes restored"] = (RowParallelLinear.forward, TransformerLayer.__init__) == original
    lowbit.reset_stats()
    only_mlp = lowbit.CommConfig(spec="int6:g32", algorithm="one-shot", sites=("layers.*.mlp",))
    with megatron_core.enable(only_mlp, model):
        _logits(model)
        results["mlp only"] = lowbit.stats()
    lowbit.reset_stats()
    sites = [f"layers.{layer}.{kind}" for layer in range(LAYERS) for kind in ("attention", "mlp")]
    spec, known = "selective4:outliers=1/8", random_calibration(sites, world, HIDDEN, "1/8")
    with megatron_core.enable(lowbit.CommConfig(spec, "two-step", calibration=known), model):
        results["calibrated"] = [_logits(model), lowbit.stats()]
    results["calibrated"].append(_record_partials(model, spec, "two-step", known, sites))
    for chosen in (None, model):
        few = lowbit.CommConfig(spec, calibration=random_calibration(sites[:3], world, HIDDEN, "1/8"))
        try:
            with megatron_core.enable(few, chosen):
                _build(world)
        except lowbit.ConfigError as error:
            results[f"few sites, {chosen is None}"] = str(error)
    lowbit.reset_stats()
    config = lowbit.CommConfig(spec="int6:g32", algorithm="one-shot")
    with torch.enable_grad():
        results["gradients"] = [_gradients(model, None), _gradients(model, config), lowbit.stats()]
    return results


def _gradients(model, config):
    """Of a linear function of what the last layer's MLP sends, with respect to what enters it and to its weights."""
    from megatron_lowbit.patches import megatron_core

    mlp = model.decoder.layers[-1].mlp
    x = torch.randn(5, 2, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
    model.zero_grad()
    with megatron_core.enable(config, model) if config else nullcontext():
        out, _ = mlp(x)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)))
    return [out.detach(), x.grad, mlp.linear_fc1.weight.grad.clone(), mlp.linear_fc2.weight.grad.clone()]


def test_a_calibration_is_used_site_by_site(two_ranks):
    for result in two_ranks:
        compressed, stats, simulated = result["calibrated"]
        assert torch.equal(compressed, simulated)
        assert len(stats) == 2 * LAYERS and all(site["paths"] == {"two-step": 1} for site in stats.values())
        for process_wide in (True, False):
            assert "lacks layers.1.mlp" in result[f"few sites, {process_wide}"]


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(2, _everything, timeout=200)


SITES = [f"layers.{layer}.{kind}" for layer in range(LAYERS) for kind in ("attention", "mlp")]


@pytest.mark.parametrize("bias", [False, True])
def test_two_reduces_per_layer_are_compressed_and_nothing_else(two_ranks, bias):
    for rank in two_ranks:
        assert sorted(rank[f"sites {bias}"]) == SITES and rank[f"keys {bias}"]
        for spec, path in (("int6:g32", "one-shot"), ("int5:g32/int8:g64", "two-step")):
            stats = rank[f"stats {bias} {spec}"]
            assert sorted(stats) == SITES
            for site in stats.values():
                assert site["paths"] == {path: 1} and site["fallbacks"] == {}
                assert site["values"] == 2 * 7 * HIDDEN


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("spec", ["int6:g32", "int5:g32/int8:g64"])
def test_logits_equal_an_independent_simulation(two_ranks, bias, spec):
    exact, compressed, simulated = two_ranks[0][f"logits {bias} {spec}"]
    assert torch.equal(compressed, simulated)
    assert not torch.equal(compressed, exact)
    assert (compressed - exact).norm() < 0.2 * exact.norm()
    assert torch.equal(two_ranks[1][f"logits {bias} {spec}"][1], compressed)


def test_disabling_restores_everything(two_ranks):
    for rank in two_ranks:
        assert all(value for key, value in rank.items() if key.startswith("restored"))
        assert rank["classes restored"]


def test_the_process_wide_route_does_the_same(two_ranks):
    for rank in two_ranks:
        logits, sites, stats = rank["process-wide"]
        assert torch.equal(logits, rank["logits False int6:g32"][1])
        assert sorted(sites) == SITES == sorted(stats)
        assert rank["twice"].startswith("already enabled with spec 'int6:g32': call that handle's disable() first, or")


def test_a_model_built_earlier_is_hooked_process_wide_too(two_ranks):
    for rank in two_ranks:
        logits, stats = rank["built earlier"]
        assert torch.equal(logits, rank["logits False int6:g32"][1])
        assert list(stats) == ["row_parallel"] and stats["row_parallel"]["paths"] == {"one-shot": 2 * LAYERS}


def test_unselected_sites_go_exact_and_are_counted(two_ranks):
    for rank in two_ranks:
        for site, stats in rank["mlp only"].items():
            expected = {"one-shot": 1} if site.endswith("mlp") else {"exact": 1}
            assert stats["paths"] == expected


def test_gradients_are_those_of_the_exact_layer(two_ranks):
    for rank in two_ranks:
        exact, compressed, stats = rank["gradients"]
        assert not torch.equal(exact[0], compressed[0])
        assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(exact[1:], compressed[1:], strict=True))
        assert stats[f"layers.{LAYERS - 1}.mlp"]["paths"] == {"one-shot": 1}


def _uncovered():
    """Stands in for a layer that reduces by itself, where the patch cannot reach."""
    from megatron.core.tensor_parallel.layers import RowParallelLinear

    return type("TEFusedMLP", (RowParallelLinear,), {})


def _refusals(rank, world):
    from megatron_lowbit.patches import megatron_core

    model = _build(world)
    config = lowbit.CommConfig(spec="int6:g32")
    messages = []

    def refused(function):
        try:
            function()
        except lowbit.LowBitError as error:
            messages.append(str(error))
        else:
            messages.append("no error")

    refused(lambda: megatron_core.enable(config, torch.nn.Linear(2, 2)))
    refused(lambda: megatron_core.enable(config, []))
    refused(lambda: megatron_core.enable("int4", model))
    with megatron_core.enable(config, model):
        refused(lambda: megatron_core.enable(config, model))
    original = model.decoder.layers[1].mlp.linear_fc2
    model.decoder.layers[1].mlp.linear_fc2 = _build(world, row=_uncovered()).decoder.layers[0].mlp.linear_fc2
    refused(lambda: megatron_core.enable(config, model))
    messages.append(f"{type(model.decoder.layers[0].mlp.linear_fc2).__name__}")
    model.decoder.layers[1].mlp.linear_fc2 = original

    def hook_nothing():
        with megatron_core.enable(config):
            pass

    refused(hook_nothing)
    with megatron_core.enable(config) as handle:
        refused(handle.verify)
        with torch.no_grad():
            original(torch.zeros(2, 2, 64))
        refused(lambda: _build(world, row=_uncovered()))
    return messages


def test_what_is_not_covered_is_a_loud_error():
    expected = [
        "no RowParallelLinear in Linear: pass a Megatron-Core model",
        "no RowParallelLinear in an empty list",
        "config is 'int4': pass a CommConfig",
        "disable the earlier handle first",
        "is a TEFusedMLP, which reduces among Transformer Engine's fused operations: leave out use_te_op_fuser",
        "RowParallelLinear",
        "no row-parallel layer was built or run under it",
        "no row-parallel layer was built or run under it",
        "layers.0.mlp is a TEFusedMLP, which reduces",
    ]
    for messages in run_ranks(2, _refusals, timeout=200):
        assert len(messages) == len(expected)
        for message, part in zip(messages, expected, strict=True):
            assert part in message and message != "no error", (message, part)


def _one_rank(rank, world):
    from megatron_lowbit.patches import megatron_core

    lowbit.reset_stats()
    model = _build(1)
    with torch.no_grad():
        before = _logits(model)
        with megatron_core.enable(lowbit.CommConfig(spec="int2:g32"), model):
            return torch.equal(_logits(model), before) and lowbit.stats() == {}


def test_a_world_of_one_is_left_alone():
    assert run_ranks(1, _one_rank) == [True]
