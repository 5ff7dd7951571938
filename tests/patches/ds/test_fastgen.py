"""FastGen: the models' own layer methods on real ranks, with matrix products in place of the CUDA kernels."""

import types

import torch

import megatron_lowbit as lowbit
from tests.patches.ds.engines import paths, snapshot, start, unchanged
from tests.ranks import run_ranks

HIDDEN, TOKENS, LAYERS = 32, 6, 2
DENSE = "llama_v2 Llama2", "mistral Mistral", "opt OPT", "phi3 Phi3", "qwen Qwen", "qwen_v2 Qwen2", "exaone4 Exaone4"
BESIDE = "phi Phi", "falcon Falcon"
MOE = "mixtral Mixtral", "qwen_v2_moe Qwen2Moe"


class Parameters:
    """Whatever a layer of the model asks of its container: a name and nothing else."""

    def __getattr__(self, name: str) -> str:
        return name


def stand_in(kind: type, rank: int, group) -> torch.nn.Module:
    """An instance of FastGen's own class whose kernels are products with weights of this rank."""
    model = object.__new__(kind)
    torch.nn.Module.__init__(model)
    shard, weights = torch.Generator().manual_seed(rank), {}

    def product(x, *arguments, **_):
        name = next((argument for argument in arguments if isinstance(argument, str)), "attention")
        if name not in weights:
            weights[name] = torch.randn(HIDDEN, HIDDEN, generator=shard) / HIDDEN**0.5
        return x @ weights[name]

    def norm(residual, hidden, *_, **__):
        residual = residual if hidden is None else residual + hidden
        return residual, torch.nn.functional.layer_norm(residual, (HIDDEN,))

    vars(model).update(
        _config=types.SimpleNamespace(
            num_hidden_layers=LAYERS, num_layers=LAYERS, parallel_attn=True, new_decoder_architecture=False
        ),
        _base_mp_group=group,
        _transformer=[Parameters() for _ in range(LAYERS)],
        state_manager=types.SimpleNamespace(get_cache=lambda layer: None),
        norm=norm,
        attn=product,
        _apply_qk_norm=lambda x, *_: x,
        _forward_attention=lambda layer, x, *_: product(x),
        **dict.fromkeys(
            ("qkv", "attn_out", "mlp_1", "mlp_2", "moe", "shared_expert_mlp_1", "shared_expert_mlp_2"), product
        ),
        shared_expert_gate=product,
    )
    return model


@torch.no_grad()
def run(model: torch.nn.Module) -> torch.Tensor:
    layer = getattr(model, "_forward_transformer_layer", None) or model._forward_transformer
    residual = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(3))
    hidden = residual.clone()
    for index in range(LAYERS):
        residual, hidden = layer(index, residual, hidden, None)
    return residual


def families(rank: int, world: int) -> dict:
    from importlib import import_module
    from importlib.util import find_spec

    group, enable = start(), lowbit.patches.deepspeed.enable
    results = {}
    for family in DENSE + BESIDE + MOE:
        module, name = family.split()
        module = f"deepspeed.inference.v2.model_implementations.{module}"
        if find_spec(module) is None:  # older releases have fewer
            continue
        model = stand_in(getattr(import_module(f"{module}.model"), f"{name}InferenceModel"), rank, group)
        own, before = run(model), snapshot(model)
        with enable(model, lowbit.CommConfig("fp32", min_bytes=0)):
            same = run(model)
        lowbit.telemetry.reset_stats()
        engine = types.SimpleNamespace(_model=model, model=lambda model=model: model)  # as InferenceEngineV2 has it
        with enable(engine, lowbit.CommConfig("int8:g32", min_bytes=0)) as handle:
            close = run(model)
        assert unchanged(model, before)
        assert run(model).equal(own)
        results[name] = {"own": own, "same": same, "close": close, "sites": handle.sites, "paths": paths()}
    try:
        enable(model, lowbit.CommConfig("int8:g32", sites=("layers.*", "logits")))
    except lowbit.LowBitError as error:
        results["logits"] = str(error)
    return results


def test_layers_of_each_model():
    first, second = run_ranks(2, families)
    assert "does not sum" in first.pop("logits")
    assert len(first) >= 10
    for family in DENSE + BESIDE + MOE:
        name = family.split()[1]
        if name not in first:
            continue
        parts = ["mlp"] if family in BESIDE else ["attention", "moe.combine" if family in MOE else "mlp"]
        sites = [f"layers.{layer}.{part}" for layer in range(LAYERS) for part in parts]
        found = first[name]
        assert found["sites"] == sites, name
        assert found["paths"] == {site: {"one-shot": 1} for site in sites}, name
        torch.testing.assert_close(found["same"], found["own"], rtol=1e-6, atol=1e-6, msg=name)
        assert found["close"].equal(second[name]["close"]), name
        assert 0 < (found["close"] - found["own"]).abs().max() < 0.2, name
