"""Every family computes in Megatron what it computes in Transformers: windows, caps, biases, norms, experts and all."""

import json

import pytest
import torch

from megatron_lowbit.engines.hf_model import check_tensor_parallel, read_config
from megatron_lowbit.errors import ModelError
from tests.engines.test_megatron import make_tokenizer
from tests.models import FAMILIES, SIZES, random_model
from tests.ranks import run_ranks

IDS = torch.arange(48).view(2, 24) * 37 % 61
VARIANTS = {  # name: (family, changes)
    "llama kv1": ("llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "llama kv3": ("llama", {"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 96}),
    "mistral no window": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "mixtral no window": ("mixtral", {"sliding_window": None, "num_key_value_heads": 1}),
    "mixtral three": ("mixtral", {"num_experts_per_tok": 3, "tie_word_embeddings": True}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2 window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3 bias": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "gemma2 untied": ("gemma2", {"tie_word_embeddings": False, "attention_bias": True, "num_key_value_heads": 1}),
    "gemma2 uncapped": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
}


OLD = {"layer_types": None}  # Transformers 4 derived it
PROMPTS = ["Hi", "two rivers, one sea"]  # the second is longer than the windows


def respell(folder):
    """config.json as Transformers 4 spells it, without what Transformers 4 did not write."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "torch_dtype": config.pop("dtype")}
    config.pop("layer_types", None)
    if config["model_type"] == "gemma2":
        config.pop("tie_word_embeddings")
        config["hidden_act"] = config["hidden_activation"]
    path.write_text(json.dumps(config))


def megatron_logits(rank, world, folders, sizes):
    """Logits of every folder at every TP size that it fits."""
    from megatron_lowbit.engines.megatron import init_tensor_parallel, quiet
    from megatron_lowbit.engines.megatron_model import load_model
    from megatron_lowbit.patches import megatron_cpu

    megatron_cpu.enable()
    found = {}
    positions = torch.arange(IDS.shape[1]).expand_as(IDS)
    mask = torch.ones(1, 1, IDS.shape[1], IDS.shape[1], dtype=torch.bool).triu(1)
    with quiet(), torch.inference_mode():
        from megatron.core import parallel_state

        for tp in sizes:
            init_tensor_parallel(tp)
            for name, folder in folders.items():
                logits = load_model(folder)(IDS, positions, mask, runtime_gather_output=True)
                found[f"{name} TP={tp}"] = logits[..., :61].clone()
            parallel_state.destroy_model_parallel()
    return found


def compare(tmp_path, models, world, sizes):
    folders, expected = {}, {}
    for name, model in models.items():
        folder = tmp_path / name.replace(" ", "-")
        model.save_pretrained(folder)
        with torch.no_grad():
            folders[name], expected[name] = str(folder), model(IDS).logits
        if name in FAMILIES:
            respell(folder)
    by_rank = run_ranks(world, megatron_logits, folders, sizes, timeout=300)
    differences = {
        f"{name} TP={tp}": (by_rank[0][f"{name} TP={tp}"] - logits).abs().max().item()
        for name, logits in expected.items()
        for tp in sizes
    }
    print({name: f"{value:.1e}" for name, value in differences.items()})
    assert max(differences.values()) < 1e-4, differences
    assert all(torch.equal(other[name], logits) for other in by_rank[1:] for name, logits in by_rank[0].items())
    assert len({logits.sum().item() for logits in expected.values()}) == len(expected)


def test_logits_equal_transformers(tmp_path):
    compare(tmp_path, {family: random_model(family) for family in FAMILIES}, world=2, sizes=(1, 2))


def generated(rank, world, folders):
    """Greedy tokens of every folder, step by step through the cache of keys and values; and what compression counts."""
    import contextlib
    import tempfile

    import megatron_lowbit as lowbit
    from megatron_lowbit.engines.base import Sampling
    from megatron_lowbit.engines.megatron import MegatronEngine

    found = {}
    with (
        tempfile.TemporaryFile("w+") as printed,
        contextlib.redirect_stderr(printed),
        contextlib.redirect_stdout(printed),
    ):
        for name, folder in folders.items():
            engine = MegatronEngine(folder, world)
            found[name] = [list(g.tokens) for g in engine.generate(PROMPTS, Sampling(8))]
            with lowbit.patches.megatron_core.enable(lowbit.CommConfig("int8:g32", min_bytes=0), engine.model):
                lowbit.reset_stats()
                engine.generate(PROMPTS, Sampling(8))
            sites = {site: dict(said["paths"]) for site, said in lowbit.stats().items()}
            found[f"{name} sites"] = {site: sites[site] for site in engine.config.sites}
    return found


def test_greedy_text_is_transformers(tmp_path):
    folders, expected = {}, {}
    for family in ("mistral", "mixtral", "qwen3", "gemma2"):
        model = random_model(family, vocab_size=259, bos_token_id=None, eos_token_id=None, pad_token_id=None)
        folders[family] = str(tmp_path / family)
        model.save_pretrained(folders[family])
        tokenizer = make_tokenizer(folders[family])
        ids = [torch.tensor([tokenizer(prompt)["input_ids"]]) for prompt in PROMPTS]
        texts = [model.generate(x, do_sample=False, max_new_tokens=8, pad_token_id=0, eos_token_id=None) for x in ids]
        expected[family] = [text[0, x.shape[1] :].tolist() for text, x in zip(texts, ids, strict=True)]
    for found in run_ranks(2, generated, folders, timeout=300):
        assert {name: found[name] for name in folders} == expected
        for family in folders:
            paths = list(found[f"{family} sites"].values())
            assert len({sum(each.values()) for each in paths}) == 1 and sum(paths[0].values()) >= 8  # in every step
            assert not any("exact" in each for each in paths)


@pytest.mark.slow
def test_logits_with_fewer_key_value_heads_than_ranks(tmp_path):
    compare(tmp_path, {family: random_model(family) for family in FAMILIES}, world=4, sizes=(4,))


@pytest.mark.slow
def test_logits_of_variants(tmp_path):
    models = {name: random_model(family, **changes) for name, (family, changes) in VARIANTS.items()}
    compare(tmp_path, models, world=4, sizes=(1, 2, 4))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": None}),
        ("mixtral", {"num_experts_per_tok": 3}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 16}),
        ("gemma2", {"layer_types": ["full_attention"] * 2}),
    ],
)
@torch.no_grad()
def test_what_the_families_differ_in_shows_in_these_logits(family, changes):
    """Otherwise the tests above would pass without it."""
    ids = IDS[:1]
    difference = random_model(family)(ids).logits - random_model(family, **changes)(ids).logits
    assert difference.abs().max() > 1e-2


# --- what config.json says ------------------------------------------------------------------------------------------


@pytest.fixture
def config_of(tmp_path):
    def read(family, **changes):
        from transformers import AutoConfig

        AutoConfig.for_model(family, **SIZES | FAMILIES[family]).save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return read_config(tmp_path)

    return read


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("mistral", {}, (7, 7)),
        ("mistral", {"sliding_window": None}, ()),
        ("mistral", {"sliding_window": 64}, ()),  # as many as the positions
        ("qwen2", {"use_sliding_window": False, "sliding_window": 5} | OLD, ()),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1} | OLD, (None, 5)),
        ("qwen3", {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}, (5, None)),
        ("gemma2", OLD, (7, None)),
        ("llama", {"sliding_window": 5}, ()),
    ],
)  # fmt: skip
def test_windows(config_of, family, changes, windows):
    assert config_of(family, **changes).windows == windows


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok is 1; .* at least 2"),
        ("gemma2", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types has 'chunked_attention'"),
        ("gemma2", {"query_pre_attn_scalar": -4}, "query_pre_attn_scalar is -4, not a number above 0"),
        ("gemma2", {"attn_logit_softcapping": "x"}, "attn_logit_softcapping is 'x', not a number above 0"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps is null"),
        ("mixtral", {"num_local_experts": None}, "num_local_experts is null"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5, and there are 4 experts"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts is 0, not a whole number above 0"),
        ("mistral", {"sliding_window": -1}, "sliding_window is -1, not a whole number above 0"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        ("gemma2", {"hidden_activation": "gelu"}, "'gelu' is not supported for a Gemma 2; supported: 'gelu_pytorch_"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types names 1 layers, num_hidden_layers 2"),
    ],
)
def test_refusals(config_of, family, changes, message):
    with pytest.raises(ModelError, match=message):
        config_of(family, **changes)


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({"num_key_value_heads": 1}, [1, 2, 4]),
        ({"num_key_value_heads": 2}, [1, 2, 4]),
        ({"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 96}, [1, 2, 3, 4, 6, 12]),
        ({"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96}, [1, 2, 3, 6]),
    ],
)
def test_key_value_heads_need_not_divide(config_of, changes, fits):
    config = config_of("llama", head_dim=8, **changes)
    for tp in range(1, 14):
        if tp in fits:
            check_tensor_parallel(config, tp)
        else:
            with pytest.raises(ModelError, match=f"possible TP sizes: {', '.join(map(str, fits))}$"):
                check_tensor_parallel(config, tp)
