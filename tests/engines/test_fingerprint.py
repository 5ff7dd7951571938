"""A fingerprint changes with what a model computes, and with nothing else."""

import json
import shutil

import pytest
import torch

from megatron_lowbit.engines.fingerprint import fingerprint
from megatron_lowbit.errors import ModelError
from tests.llama import tiny_llama


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "one")
    return tmp_path / "one"


def test_the_same_model_elsewhere_and_in_more_files(folder, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    shutil.copytree(folder, tmp_path / "copy")
    assert len({fingerprint(tmp_path / name) for name in ("one", "many", "copy")}) == 1


def test_fields_that_shape_nothing_do_not_count(folder):
    before, path = fingerprint(folder), folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_version": "0", "use_cache": False}))
    assert fingerprint(folder) == before


@pytest.mark.parametrize(
    "other",
    [
        lambda: tiny_llama(seed=8),
        lambda: tiny_llama(rope_theta=500.0),
        lambda: tiny_llama(rms_norm_eps=1e-3),
        lambda: tiny_llama(attention_bias=True),
        lambda: tiny_llama().to(torch.bfloat16),
    ],
)
def test_other_models_have_others(folder, tmp_path, other):
    other().save_pretrained(tmp_path / "other")
    assert fingerprint(folder) != fingerprint(tmp_path / "other")


def test_training_one_matrix_on_changes_it(folder, tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight += 1e-3 * torch.randn(16, 32)
    model.save_pretrained(tmp_path / "tuned")
    assert fingerprint(folder) != fingerprint(tmp_path / "tuned")


def test_no_model(tmp_path):
    with pytest.raises(ModelError, match="has no config.json"):
        fingerprint(tmp_path)


def test_it_stays_what_it_was(tmp_path):
    """Calibrations made before must fit: changing what goes into a fingerprint disowns them."""
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.arange(parameter.numel()) % 97 / 128).view_as(parameter))
    model.save_pretrained(tmp_path)
    assert fingerprint(tmp_path) == "3db25f4fb3db5100d7c428a9b085e0143daa8b79cea1fe626b704ea8fd32dccc"


# --- of families that Megatron is not built with ------------------------------------------------------------------


def gpt2(seed=7, **changes):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**({"vocab_size": 61, "n_embd": 32, "n_layer": 1, "n_head": 4} | changes)))


def test_any_folder_with_safetensors_has_one(tmp_path):
    gpt2().save_pretrained(tmp_path / "one")
    gpt2().save_pretrained(tmp_path / "many", max_shard_size="10KB")
    edit = json.loads((tmp_path / "many" / "config.json").read_text()) | {"transformers_version": "0", "dtype": None}
    (tmp_path / "many" / "config.json").write_text(json.dumps(edit))
    others = {"seed": gpt2(seed=8), "heads": gpt2(n_head=2), "epsilon": gpt2(layer_norm_epsilon=1e-3)}
    for name, model in others.items():
        model.save_pretrained(tmp_path / name)
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "many")
    assert len({fingerprint(tmp_path / name) for name in ("one", *others)}) == 4


def test_a_folder_without_safetensors_has_none(tmp_path):
    gpt2().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no safetensors"):
        fingerprint(tmp_path)
