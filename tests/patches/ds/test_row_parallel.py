"""Every class of DeepSpeed's that sums partial products, against its own result and an exact sum."""

import pytest
import torch

import megatron_lowbit as lowbit
from tests.llama import tiny_llama
from tests.models import SIZES
from tests.patches.ds.engines import paths, sharded, snapshot, start, tokens, unchanged
from tests.ranks import run_ranks

INT8 = {"spec": "int8:g32", "min_bytes": 0}


def _layers(group) -> dict[str, torch.nn.Module]:
    """One of each class that this release has, made of the same whole layer."""
    from deepspeed.module_inject import layers, tp_shard

    if hasattr(tp_shard, "set_num_kv_heads"):  # older releases ask this module, where newer ones ask the layer
        tp_shard.set_num_kv_heads(None)
        tp_shard.set_tp_grain_size(64)

    def linear(bias: bool = True) -> torch.nn.Linear:
        torch.manual_seed(2)
        return torch.nn.Linear(32, 32, bias=bias)  # square: DeepSpeed's Conv_LinearALlreduce takes no other

    class Conv1D(torch.nn.Module):  # GPT-2's: its weight is transposed
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(linear().weight.data.t().contiguous())
            self.bias = None  # which DeepSpeed's class would fail over

    made = {
        "LinearAllreduce": layers.LinearAllreduce(linear(), group, name="mlp"),
        "no bias": layers.LinearAllreduce(linear(bias=False), group, name="mlp"),
        "Conv_LinearALlreduce": layers.Conv_LinearALlreduce(Conv1D(), group, name="mlp"),
    }
    if hasattr(layers, "SubParamLinearAllreduce"):
        made["SubParamLinearAllreduce"] = layers.SubParamLinearAllreduce(linear(), group, shape=(-1, (16, 16)))
    return made


def classes(rank: int, world: int) -> dict:
    group = start()
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(4))
    results = {}
    for name, layer in _layers(group).items():
        model = torch.nn.Module()
        model.layers = torch.nn.ModuleList([layer])
        with torch.no_grad():
            shard = x[:, rank * 16 : rank * 16 + 16]
            own, before = layer(shard), snapshot(layer)
            with lowbit.patches.deepspeed.enable(model, lowbit.CommConfig("fp32", min_bytes=0)):
                same = layer(shard)
            lowbit.telemetry.reset_stats()
            with lowbit.patches.deepspeed.enable(model, lowbit.CommConfig(**INT8)):
                assert type(layer).__name__.startswith("LowBit") and layer.mp_group is group
                close = layer(shard)
            assert unchanged(layer, before)
            bias = layer.bias if layer.bias is not None else 0
            partial = shard @ layer.weight.t()
        parts = [torch.empty_like(partial) for _ in range(world)]
        torch.distributed.all_gather(parts, partial.contiguous())
        simulated = lowbit.simulate.all_reduce(parts, INT8["spec"], algorithm="one-shot") + bias
        results[name] = {"own": own, "same": same, "close": close, "simulated": simulated, "paths": paths()}
    return results


def test_each_class():
    first, second = run_ranks(2, classes)
    assert len(first) >= 3
    for name, found in first.items():
        assert list(found["paths"].values()) == [{"one-shot": 1}], name
        torch.testing.assert_close(found["same"], found["own"], rtol=1e-6, atol=1e-6, msg=name)
        assert found["close"].equal(found["simulated"]), name
        assert found["close"].equal(second[name]["close"]), name
        assert not found["close"].equal(found["own"]), name


def models(rank: int, world: int, family: str, changes: dict) -> dict:
    from transformers import OPTConfig, OPTForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    from transformers.models.opt.modeling_opt import OPTDecoderLayer

    torch.manual_seed(5)
    if family == "opt":
        sizes = {
            name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        }
        model = OPTForCausalLM(
            OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64)
        ).eval()
    else:
        model = tiny_llama(**changes)
    policy = {  # given by hand: init_inference's own refuse shards that differ in size
        OPTDecoderLayer: ("self_attn.out_proj", ".fc2"),
        LlamaDecoderLayer: ("self_attn.o_proj", "mlp.down_proj"),
    }
    policy = {kind: rows for kind, rows in policy.items() if kind.__name__.lower().startswith(family)}
    with torch.no_grad():
        whole = model(tokens()).logits
        engine = sharded(model, world, injection_policy=policy)
        own = engine(tokens()).logits
        with lowbit.patches.deepspeed.enable(engine, lowbit.CommConfig(**INT8)):
            close = engine(tokens()).logits
    values = {site: counters["values"] for site, counters in lowbit.stats().items()}
    return {"whole": whole, "own": own, "close": close, "values": values, "paths": paths()}


@pytest.mark.parametrize(
    "family, changes",
    [
        ("opt", {}),  # its fc2 sees [tokens, features]
        ("llama", {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 48, "intermediate_size": 49}),
    ],
    ids=["opt", "shards that differ in size"],
)
def test_models_of_other_shapes(family, changes):
    first, second = run_ranks(2, models, family, changes)
    sites = [f"layers.{layer}.{part}" for layer in range(2) for part in ("attention", "mlp")]
    assert first["paths"] == {site: {"one-shot": 1} for site in sites}
    assert set(first["values"].values()) == {2 * 12 * changes.get("hidden_size", 32)}
    assert first["close"].equal(second["close"])
    torch.testing.assert_close(first["own"], first["whole"], rtol=0, atol=1e-5)
    assert 0 < (first["close"] - first["own"]).abs().max() < 0.2
