"""What is known of any folder before it is loaded, and every reason to refuse one."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from megatron_lowbit.engines.deepspeed import DeepSpeedEngine
from megatron_lowbit.engines.hf_folder import read_folder
from megatron_lowbit.engines.megatron import MegatronEngine
from megatron_lowbit.engines.model_facts import Trust
from megatron_lowbit.engines.transformers import TransformersEngine
from megatron_lowbit.errors import ConfigError, ModelError
from tests import hf_folders
from tests.llama import tiny_llama
from tests.models import random_model

SITES = ("layers.0.attention", "layers.0.mlp", "layers.1.attention", "layers.1.mlp")
CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
class Ours(LlamaConfig):
    model_type = "ours"
class OursForCausalLM(LlamaForCausalLM):
    config_class = Ours
"""


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pickled(folder: Path) -> Path:
    torch.save(tiny_llama().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("engine", [MegatronEngine, DeepSpeedEngine, TransformersEngine])
def test_the_same_facts_of_one_model(folder, engine):
    facts = engine.read(folder)
    assert tuple(facts.sites) == SITES and facts.scores
    assert (facts.vocab, facts.max_positions) == (61, 64)
    facts.check_tensor_parallel(2)
    with pytest.raises(ModelError, match=r"TP=3 does not divide 4 attention heads.*; possible TP sizes: 1, 2"):
        facts.check_tensor_parallel(3)


def test_experts_are_shared_where_the_engine_shares_them(tmp_path):
    random_model("mixtral").save_pretrained(tmp_path)
    assert not any(site.endswith("moe.combine") for site in DeepSpeedEngine.read(tmp_path).sites)
    kinds = {site.removeprefix("layers.0.") for site in TransformersEngine.read(tmp_path).sites[:2]}
    assert kinds in ({"attention", "moe.combine"}, {"attention", "moe.experts"})  # the second: Transformers 4


def test_numbers_within_names_are_not_those_of_layers(tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=61, **sizes)).save_pretrained(tmp_path)  # mlp.dense_4h_to_h
    assert TransformersEngine.read(tmp_path).sites == ("layers.0.attention", "layers.0.mlp")


def test_a_model_without_a_plan(tmp_path):
    from transformers import OPTConfig, OPTForCausalLM

    OPTForCausalLM(
        OPTConfig(vocab_size=61, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4)
    ).save_pretrained(tmp_path)
    facts = TransformersEngine.read(tmp_path)
    facts.check_tensor_parallel(1)
    with pytest.raises(ModelError, match="no tensor-parallel plan for a OPTForCausalLM; use --engine deepspeed"):
        facts.check_tensor_parallel(2)
    assert DeepSpeedEngine.read(tmp_path).sites == ("layers.0.attention", "layers.0.mlp")


def test_an_encoder_decoder(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    T5ForConditionalGeneration(
        T5Config(vocab_size=61, num_layers=1, num_heads=4, d_model=32, d_kv=8, d_ff=64)
    ).save_pretrained(tmp_path)
    facts = DeepSpeedEngine.read(tmp_path)
    assert facts.sites == (
        "encoder.layers.0.attention",
        "encoder.layers.0.mlp",
        "layers.0.attention",
        "layers.0.cross_attention",
        "layers.0.mlp",
    )
    assert facts.max_positions is None and not facts.scores and facts.encoder_decoder


def test_an_encoder_writes_no_text(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    BertForMaskedLM(BertConfig(vocab_size=61, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"a bert is an encoder, which generates no text; examples/bert_embeddings\.py"
    ):
        read_folder(tmp_path)
    facts = read_folder(tmp_path, encoders=True)
    assert facts.predicts == "masked" and facts.sites == SITES[:2] and facts.max_positions == 512
    assert type(facts.load()).__name__ == "BertForMaskedLM"


def test_roberta_counts_positions_from_behind_the_padding(tmp_path):
    facts = read_folder(hf_folders.save("roberta", tmp_path), encoders=True)
    assert facts.config.max_position_embeddings == 40 and facts.max_positions == 39
    model = facts.load()
    with torch.no_grad():
        assert model(torch.full((1, 39), 7)).logits.isfinite().all()
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, 40), 7))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "who"}, "model_type 'who' is not known to Transformers .*; upgrade it"),
        ({"model_type": None}, "model_type None is not known"),
        ({"model_type": "vit"}, "no text-generating model of type vit; use another"),
        (
            {"model_type": "ours", "auto_map": {"AutoConfig": "ours.Ours"}},
            "needs Python code of the folder's; read it, and then give --trust-remote-code",
        ),
        ({"quantization_config": {"bits": 4}}, "quantized weights are not supported"),
        ({"num_hidden_layers": "two"}, "download"),
    ],
)
def test_configs_that_are_refused(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(ModelError, match=message):
        read_folder(folder)


def test_transformers_warns_of_nothing(folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # for caplog
    edit(folder, bos_token_id=61)  # beyond the vocabulary
    read_folder(folder)
    assert not caplog.records


def test_folders_that_are_refused(folder, tmp_path):
    for where, message in (
        (tmp_path / "nowhere", "does not exist"),
        (folder / "config.json", "is a file"),
        (tmp_path, "has no config.json"),
    ):
        with pytest.raises(ModelError, match=message):
            read_folder(where)
    (folder / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ModelError, match="is not a readable safetensors file"):
        read_folder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no weights; download model\.safetensors too"):
        read_folder(folder)


def test_shards(folder, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "many", max_shard_size="10KB")
    facts = read_folder(tmp_path / "many")
    assert torch.equal(facts.load().lm_head.weight, read_folder(folder).load().lm_head.weight)
    next((tmp_path / "many").glob("model-00002-of-*.safetensors")).unlink()
    with pytest.raises(ModelError, match=r"names model-00002-of-.*, which is missing; download the model again"):
        read_folder(tmp_path / "many")


def test_tensors_that_are_missing_are_not_made_up(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lacks model\.layers\.1\.mlp\.down_proj\.weight, which a LlamaForCausalLM has"
    ):
        read_folder(folder).load()


def test_dtypes(folder):
    facts = read_folder(folder)
    assert facts.load().dtype == torch.float32 and facts.load(torch.bfloat16).dtype == torch.bfloat16
    tiny_llama().half().save_pretrained(folder)
    assert read_folder(folder).load().dtype == torch.float16
    with pytest.raises(ModelError, match=r"dtype torch\.float64 is not supported"):
        facts.load(torch.float64)


def test_pickles_are_read_only_if_the_user_says_so(folder, tmp_path):
    folder = pickled(folder)
    with pytest.raises(ModelError, match=r"only pickled \*\.bin weights: save .* give --allow-pickled-weights"):
        read_folder(folder)
    model = read_folder(folder, Trust(pickled_weights=True)).load()
    assert torch.equal(model.lm_head.weight, tiny_llama().lm_head.weight)


def test_a_pickle_that_runs_code_is_refused_even_then(folder, tmp_path):
    folder, proof = pickled(folder), tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(proof),)

    torch.save({"lm_head.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="holds pickles of more than tensors|cannot load"):
        read_folder(folder, Trust(pickled_weights=True)).load()
    assert not proof.exists()


def test_code_of_the_folders_runs_only_if_the_user_says_so(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "ours.py").write_text(CODE)
    auto = {"AutoConfig": "ours.Ours", "AutoModelForCausalLM": "ours.OursForCausalLM"}
    edit(folder, model_type="ours", auto_map=auto)
    with pytest.raises(ModelError, match="--trust-remote-code"):
        read_folder(folder)
    model = read_folder(folder, Trust(remote_code=True)).load()
    assert type(model).__name__ == "OursForCausalLM"


def test_megatron_takes_neither(folder):
    with pytest.raises(ConfigError, match="leave --trust-remote-code and --allow-pickled-weights out"):
        MegatronEngine.read(folder, Trust(remote_code=True))
    shutil.rmtree(folder)
    with pytest.raises(ModelError, match="does not exist"):
        MegatronEngine.read(folder)
