"""Specs with our layers: the same numbers as `enable` gives, neither the spec nor Megatron's classes are touched."""

import functools
import pickle

import pytest
import torch

import megatron_lowbit as lowbit
from tests.calibrations import random_calibration
from tests.megatron_models import HIDDEN, gpt, logits, settings, start
from tests.ranks import run_ranks

SITES = [f"layers.{layer}.{kind}" for layer in range(2) for kind in ("attention", "mlp")]
CONFIG = lowbit.CommConfig(spec="int6:g32", algorithm="one-shot")


def _model(spec=None):
    return gpt(settings(2), spec)


def _refused(function, *args):
    try:
        function(*args)
    except lowbit.LowBitError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@torch.no_grad()
def _everything(rank, world):
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.tensor_parallel.layers import RowParallelLinear
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_lowbit.patches import megatron_core

    start(world)
    lowbit_spec, plain = megatron_core.lowbit_spec, _model()
    originals = RowParallelLinear.forward, RowParallelLinear.__init__, TransformerLayer.__init__
    with megatron_core.enable(CONFIG, plain):
        results = {"expected": logits(plain)}
    results["exact"] = logits(plain)

    def layer(row=None):
        spec = gpt_layer_specs.get_gpt_layer_local_spec(normalization="LayerNorm")
        if row is not None:
            mlp = spec.submodules.mlp  # from 0.18 on a functools.partial
            (mlp.keywords["submodules"] if hasattr(mlp, "keywords") else mlp.submodules).linear_fc2 = row
        return spec

    by_path = layer(ModuleSpec(("megatron.core.tensor_parallel.layers", "RowParallelLinear")))
    block = TransformerBlockSubmodules([layer()] * 2, gpt_layer_specs.LNImpl)
    specs = {"layer": layer(), "by path": by_path, "block": block, "whole": ModuleSpec(TransformerBlock, {}, block)}
    for name, spec in specs.items():
        before = pickle.dumps(spec)
        model = _model(lowbit_spec(spec, CONFIG))
        lowbit.reset_stats()
        computed = logits(model)
        results[name] = [computed, lowbit.stats(), pickle.dumps(spec) == before]
        results[f"{name} keys"] = list(model.state_dict()) == list(plain.state_dict())
    lowbit.reset_stats()
    results["others exact"] = torch.equal(logits(plain), results["exact"]) and lowbit.stats() == {}
    results["classes"] = (RowParallelLinear.forward, RowParallelLinear.__init__, TransformerLayer.__init__) == originals

    given = [functools.partial(MLP, submodules={"linear_fc2": (RowParallelLinear,)})]  # as newer releases write specs
    nested = lowbit_spec(given, CONFIG)
    kinds = [kind.keywords["submodules"]["linear_fc2"][0].__name__ for kind in (nested[0], given[0])]
    results["nested"] = [nested[0].func is MLP, *kinds]

    class OwnMLP(MLP):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.linear_fc2 = _model().decoder.layers[0].mlp.linear_fc2

    class OwnRow(RowParallelLinear):
        def forward(self, *args):
            return super().forward(*args)

    own = layer()
    if hasattr(own.submodules.mlp, "keywords"):
        own.submodules.mlp = functools.partial(OwnMLP.as_mlp_submodule, **own.submodules.mlp.keywords)
    else:
        own.submodules.mlp.module = OwnMLP
    scattered = settings(world, sequence_parallel=True)
    rows_only = lowbit.CommConfig("int6:g32", sites=("layers.*.attention", "layers.*.mlp"))
    with_experts = lowbit.CommConfig("int6:g32", sites=("layers.*.attention", "layers.*.moe*"))
    experts = settings(world, num_moe_experts=2, moe_token_dispatcher_type="alltoall", sequence_parallel=True)
    moe = gpt_layer_specs.get_gpt_layer_local_spec(num_experts=2, moe_grouped_gemm=False, normalization="LayerNorm")
    few = random_calibration(SITES[:3], world, HIDDEN, "1/8")
    calibrated = lowbit.CommConfig("selective4:outliers=1/8", "two-step", calibration=few)
    results["refused"] = [
        _refused(lowbit_spec, ModuleSpec(torch.nn.Linear), CONFIG),
        _refused(lowbit_spec, layer(type("TEFusedMLP", (RowParallelLinear,), {})), CONFIG),
        _refused(lowbit_spec, layer(), "int8"),
        _refused(lambda: _model(lowbit_spec(own, CONFIG))),
        _refused(lambda: _model(lowbit_spec(layer(OwnRow), CONFIG))),
        _refused(lambda: _model(lowbit_spec(layer(), calibrated))),
        _refused(megatron_core.enable, CONFIG, model),
        _refused(lowbit_spec, layer(), lowbit.CommConfig("int6:g32", sites=("layers.*", "embedding"))),
        _refused(lambda: gpt(scattered, lowbit_spec(layer(), CONFIG))),
        _refused(lambda: gpt(scattered, lowbit_spec(layer(), rows_only))),
        _refused(lambda: gpt(experts, lowbit_spec(moe, with_experts))),
    ]
    with megatron_core.enable(CONFIG, plain):
        results["refused"].append(_refused(lowbit_spec, layer(), CONFIG))
    return results


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(2, _everything, timeout=200)


@pytest.mark.parametrize("name", ["layer", "by path", "block", "whole"])
def test_a_spec_gives_the_numbers_that_enable_gives(ranks, name):
    for rank in ranks:
        logits, stats, untouched = rank[name]
        assert torch.equal(logits, rank["expected"]) and not torch.equal(logits, rank["exact"])
        assert sorted(stats) == SITES
        assert all(site["paths"] == {"one-shot": 1} and not site["fallbacks"] for site in stats.values())
        assert untouched and rank[f"{name} keys"]


def test_other_models_stay_exact_and_no_class_is_changed(ranks):
    for rank in ranks:
        assert rank["others exact"] and rank["classes"]


def test_specs_nest_in_partials_lists_tuples_and_dicts(ranks):
    assert ranks[0]["nested"] == [True, "LowBitRowParallelLinear", "RowParallelLinear"]


def test_what_would_not_be_compressed_is_an_error(ranks):
    expected = [
        "ModelError: no row-parallel layer in the ModuleSpec",
        "ModelError: the spec has a TEFusedMLP, which reduces among Transformer Engine's fused operations",
        "ConfigError: config is 'int8': pass a CommConfig",
        "layers.0.mlp would go uncompressed: the RowParallelLinear at mlp.linear_fc2 is out of the spec's reach",
        "layers.0.mlp would go uncompressed: the OwnRow at mlp.linear_fc2 is out of the spec's reach",
        "lacks layers.1.mlp",
        "ModelError: layers.0.attention is enabled already",
        "ConfigError: embedding is not part of a layer's spec",
        "layers.0.attention.gather would go uncompressed: the ColumnParallelLinear at self_attention.linear_qkv is out",
        "no error",
        "layers.0.moe.dispatch would go uncompressed: the MoELayer at mlp is out",
        "ConfigError: low-bit communication is enabled already: leave out lowbit_spec",
    ]
    for rank in ranks:
        assert len(rank["refused"]) == len(expected)
        for message, part in zip(rank["refused"], expected, strict=True):
            assert part in message, (message, part)
