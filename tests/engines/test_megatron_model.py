"""Llama folders become Megatron models that compute what Transformers computes, or are refused with a reason."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from megatron_lowbit.engines.hf_model import Checkpoint, check_tensor_parallel, read_config
from megatron_lowbit.errors import ModelError
from tests.ranks import run_ranks

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # short, so that the test's positions cross all three bands
}
CASES = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "multi-head": {"num_key_value_heads": 8},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 500.0},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}, "rope_theta": 5000.0},
    "head_dim": {"head_dim": 16, "rms_norm_eps": 1e-3},
    "attention_bias": {"attention_bias": True},
    "all_bias": {"attention_bias": True, "mlp_bias": True},
}
IDS = torch.arange(80).view(2, 40) * 37 % 101


def make_llama(folder, dtype=torch.float32, shard_size="5GB", **changes):
    """A tiny random Llama (8 heads, 4 key-value heads, 101 tokens, biases not zero) saved to `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    sizes = {
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    model = LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return model


def respell(folder):
    """Rewrites config.json the way Transformers 4 spells the rotary embedding and the dtype."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": None, "torch_dtype": config.pop("dtype")}
    if rope["rope_type"] != "default":
        config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    path.write_text(json.dumps(config))


def megatron_logits(rank, world, folders, ids):
    """In one world of 4: the logits of every folder at TP 1, 2 and 4, then bf16 and the progress bar at TP 4."""
    from megatron_lowbit.engines.megatron import init_tensor_parallel, quiet
    from megatron_lowbit.engines.megatron_model import load_model
    from megatron_lowbit.patches import megatron_cpu

    megatron_cpu.enable()
    length, found = ids.shape[1], {}
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    positions = torch.arange(length).expand_as(ids)
    with quiet(), torch.inference_mode():
        from megatron.core import parallel_state

        for tp in (1, 2, 4):
            init_tensor_parallel(tp)
            for name, folder in folders.items():
                model = load_model(folder)
                found[f"{name} TP={tp}"] = model(ids, positions, mask, runtime_gather_output=True)[..., :101].clone()
            if tp < 4:
                parallel_state.destroy_model_parallel()
        model = load_model(folders["untied"], torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad for p in model.parameters()) and not model.training
        found["cast to bf16"] = model(ids, positions, mask, runtime_gather_output=True)[..., :101].float()
    return found


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Every case as a folder, with Transformers' logits; `respelled` and `sharded` repeat cases in other clothes."""
    root, folders, logits = tmp_path_factory.mktemp("llamas"), {}, {}

    def add(name, **changes):
        model = make_llama(root / name, **changes)
        with torch.no_grad():
            folders[name], logits[name] = root / name, model(IDS).logits.float()

    for name, changes in CASES.items():
        add(name, **changes)
    add("sharded", shard_size="100KB")
    add("bfloat16", dtype=torch.bfloat16)
    assert len(list((root / "sharded").glob("*.safetensors"))) > 1
    for name in ("llama3", "linear", "untied"):
        folders[f"respelled {name}"] = shutil.copytree(folders[name], root / f"respelled-{name}")
        logits[f"respelled {name}"] = logits[name]
        respell(root / f"respelled-{name}")
    return SimpleNamespace(folders=folders, logits=logits)


@pytest.fixture(scope="module")
def by_rank(references):
    return run_ranks(4, megatron_logits, {k: str(v) for k, v in references.folders.items()}, IDS, timeout=240)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_logits_equal_transformers(references, by_rank, tp):
    differences = {
        name: (by_rank[0][f"{name} TP={tp}"].float() - expected).abs().max().item()
        for name, expected in references.logits.items()
    }
    bf16 = differences.pop("bfloat16")
    print(f"TP={tp}:", {name: f"{value:.1e}" for name, value in differences.items()}, f"bf16 {bf16:.1e}")
    assert max(differences.values()) < 1e-4, differences
    assert bf16 < 0.05 * references.logits["bfloat16"].abs().max()


def test_default_dtype_is_the_checkpoints_and_can_be_chosen(references, by_rank):
    assert by_rank[0]["bfloat16 TP=2"].dtype == torch.bfloat16
    assert by_rank[0]["untied TP=2"].dtype == torch.float32
    expected = references.logits["untied"]
    assert (by_rank[0]["cast to bf16"] - expected).abs().max() < 0.05 * expected.abs().max()


def test_ranks_agree_bit_for_bit(by_rank):
    for other in by_rank[1:]:
        assert all(torch.equal(other[name], logits) for name, logits in by_rank[0].items())


# --- refusals: nothing below needs Megatron or ranks --------------------------------------------------------------


@pytest.fixture
def folder(references, tmp_path):
    """A private copy of a good folder, to be spoilt."""
    return shutil.copytree(references.folders["untied"], tmp_path / "llama")


def open_checkpoint(folder):
    return Checkpoint(folder, read_config(folder))


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_folder_missing(tmp_path):
    with pytest.raises(ModelError, match=r"model folder .*nowhere does not exist; give"):
        read_config(tmp_path / "nowhere")


def test_config_missing(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json; give"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_config_broken(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json .*download the model again"):
        read_config(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: llama, mistral, "),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported for a Llama; supported: 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantized weights are not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn' is not supported; supported: default, linear"),
        ({"rope_parameters": {"rope_type": "linear"}}, "lacks 'factor'"),
    ],
)
def test_unsupported_config(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(ModelError, match=message):
        read_config(folder)


def test_config_lacks_a_size(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["hidden_size"]
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="lacks 'hidden_size'"):
        read_config(folder)


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no safetensors \(pickled \*\.bin weights, which are never loaded\); save"):
        open_checkpoint(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no safetensors \(no weights\)"):
        open_checkpoint(folder)


def test_broken_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        open_checkpoint(folder)


def test_index_names_a_missing_file(references, tmp_path):
    folder = shutil.copytree(references.folders["sharded"], tmp_path / "llama")
    next(folder.glob("model-00002*.safetensors")).unlink()
    with pytest.raises(ModelError, match=r"names model-00002.*, which is missing"):
        open_checkpoint(folder)


def test_missing_tensors_are_named(folder):
    change_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1.mlp" in name])
    with pytest.raises(ModelError, match=r"lacks model\.layers\.1\.mlp\.gate_proj\.weight, .*up_proj.*; download"):
        open_checkpoint(folder)


def test_unknown_tensors_are_named(folder):
    change_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}))
    with pytest.raises(ModelError, match=r"holds model\.layers\.0\.self_attn\.q_norm\.weight, which a Llama"):
        open_checkpoint(folder)


def test_old_rotary_buffers_are_ignored(folder):
    change_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    open_checkpoint(folder)


def test_wrong_shape(folder):
    change_config(folder, vocab_size=90)
    with pytest.raises(ModelError, match=r"embed_tokens\.weight is \[101, 64\], config\.json says \[90, 64\]"):
        open_checkpoint(folder)


def test_unsupported_dtype(folder):
    change_tensors(folder, lambda t: t.update({k: v.double() for k, v in t.items()}))
    with pytest.raises(ModelError, match="weights are F64; supported: F32, F16, BF16"):
        _ = open_checkpoint(folder).dtype


@pytest.mark.parametrize("tp", [3, 5, 0])
def test_tensor_parallel_size_that_does_not_fit(references, tp):
    with pytest.raises(ModelError, match=f"TP={tp} does not divide .*; possible TP sizes: 1, 2, 4, 8$"):
        check_tensor_parallel(read_config(references.folders["untied"]), tp)


def test_error_names_what_does_not_divide(references):
    config = read_config(references.folders["untied"])
    with pytest.raises(ModelError, match="TP=16 does not divide 8 attention heads; possible"):
        check_tensor_parallel(config, 16)
