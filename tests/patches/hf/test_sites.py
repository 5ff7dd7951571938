"""Every family gets its sites, and what is no part of the language model gets none."""

import pytest
import torch
import transformers
from torch import nn

from megatron_lowbit.patches.hf.sites import named, site_of
from tests.models import EVERY_FAMILY, SIZES, random_model, site_names


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_every_family(family):
    model = random_model(family)
    assert list(dict.fromkeys(site for site, _, _ in named(model))) == site_names(family)
    assert all(site_of(model, path) == site for site, path, _ in named(model))
    if model.base_model is not model:  # the model without its head has the same sites
        assert list(dict.fromkeys(site for site, _, _ in named(model.base_model))) == site_names(family)


def test_models_without_their_head():
    sizes = {**SIZES, "num_hidden_layers": 1}
    bert = transformers.BertModel(transformers.BertConfig(**sizes))
    assert [site for site, _, _ in named(bert)] == ["layers.0.attention", "layers.0.mlp"]
    t5 = transformers.T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    assert t5.is_encoder_decoder
    encoder = transformers.T5EncoderModel(t5)
    assert [site for site, _, _ in named(encoder)] == ["layers.0.attention", "layers.0.mlp"]
    encoder.config.is_encoder_decoder = True  # as releases leave it that copy the config
    assert [site for site, _, _ in named(encoder)] == ["layers.0.attention", "layers.0.mlp"]


def test_layers_whose_class_another_framework_derived():
    model = random_model("llama")
    for layer in model.model.layers:  # as torch's fully_shard does
        layer.__class__ = type("FSDPLlamaDecoderLayer", (type(layer),), {})
    assert [site for site, _, _ in named(model)] == site_names("llama")
    assert site_of(model, "model.layers.1.mlp.down_proj") == "layers.1.mlp"


def test_cross_attention():
    model = random_model("gpt2", num_hidden_layers=1, add_cross_attention=True)
    sites = [site for site, _, _ in named(model)]
    assert sites == ["layers.0.attention", "layers.0.cross_attention", "layers.0.mlp"]
    model = random_model("bert", num_hidden_layers=1, is_decoder=True, add_cross_attention=True)
    assert [site for site, _, _ in named(model)] == sites


def test_only_the_text_part_of_a_multimodal_model():
    text = {**SIZES, "head_dim": 8, "num_hidden_layers": 1}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    with torch.device("meta"):
        model = transformers.Gemma3ForConditionalGeneration(config)
    found = {path: site for site, path, _ in named(model)}
    assert sorted(found.values()) == ["layers.0.attention", "layers.0.mlp"]
    assert all("language_model" in path for path in found)
    tower = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and "vision" in path]
    assert tower and all(site_of(model, path) == path for path in tower)


def stand_in(kind: str, model_type: str, within: dict) -> nn.Module:
    """A model whose one layer, of the class called `kind`, has linear layers at these paths."""
    layer = type(kind, (nn.Module,), {})()
    for path in within:
        *parents, name = path.split(".")
        owner = layer
        for parent in parents:
            owner.add_module(parent, getattr(owner, parent, None) or nn.Module())
            owner = getattr(owner, parent)
        owner.add_module(name, nn.Linear(8, 8))
    model = nn.Module()
    model.config = type("Config", (), {"model_type": model_type})()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([layer])
    return model


def test_experts_as_transformers_4_has_them():
    paths = [
        "self_attn.o_proj",
        "block_sparse_moe.gate",
        *(f"block_sparse_moe.experts.{i}.w{j}" for i in (0, 1) for j in (1, 2, 3)),
    ]
    found = [(path, site) for site, path, _ in named(stand_in("MixtralDecoderLayer", "mixtral", paths))]
    experts = [(f"model.layers.0.block_sparse_moe.experts.{i}.w2", "layers.0.moe.experts") for i in (0, 1)]
    assert found == [("model.layers.0.self_attn.o_proj", "layers.0.attention"), *experts]
    paths = ["mlp.gate", "mlp.experts.0.down_proj", "mlp.shared_expert.down_proj", "mlp.shared_expert_gate"]
    found = [site for site, _, _ in named(stand_in("Qwen2MoeDecoderLayer", "qwen2_moe", paths))]
    assert found == ["layers.0.moe.experts", "layers.0.moe.shared_experts"]


def test_a_family_without_a_policy_is_named_by_its_paths():
    paths = ["self_attn.q_proj", "self_attn.out_proj", "encoder_attn.out_proj", "ffn.fc1", "ffn.fc2", "experts.1.w2"]
    model = stand_in("NewLayer", "new", paths)
    parts = {path.split("layers.0.")[1]: site for site, path, _ in named(model)}
    assert parts == {
        "self_attn.out_proj": "layers.0.attention",
        "encoder_attn.out_proj": "layers.0.cross_attention",
        "ffn.fc2": "layers.0.mlp",
        "experts.1.w2": "layers.0.moe.experts",
    }
    assert site_of(model, "lm_head") == "lm_head"
    assert site_of(model, "vision_tower.layers.0.attn.out_proj") == "vision_tower.layers.0.attn.out_proj"
