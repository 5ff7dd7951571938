"""Under DeepSpeed and Transformers' tensor parallelism, text is what Transformers makes of the unsharded model."""

import json
import math
import os
import shutil
from dataclasses import astuple
from types import SimpleNamespace

import pytest
import torch

from megatron_lowbit.engines.base import Sampling
from megatron_lowbit.engines.hf_engine import choose
from megatron_lowbit.engines.registry import engine_class
from megatron_lowbit.errors import ConfigError, LowBitError
from tests.byte_tokenizer import make_tokenizer
from tests.ranks import run_ranks

ENGINES = ("deepspeed", "transformers")
PROMPTS = ["Hi", "Flüsse tragen Schiffe", "two rivers, one sea"]  # of different lengths: one batch all the same
NEW = 20
TEXT = "Le cœur a ses raisons que la raison ne connaît point. " * 4
SAMPLINGS = {
    "seed 0": Sampling(NEW, temperature=0.8, top_k=0, seed=0),
    "seed 1": Sampling(NEW, temperature=0.8, top_k=0, seed=1),
    "top_k": Sampling(NEW, top_k=7, seed=3),
    "top_p": Sampling(NEW, top_k=0, top_p=0.6, seed=3),
}
SIZES = {"vocab_size": 259, "num_hidden_layers": 2, "initializer_range": 0.1}


def by_transformers(model, tokenizer, prompt):
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, pad_token_id=0)
    return tuple(out[0, 1 if model.config.is_encoder_decoder else ids.shape[1] :].tolist())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A Llama and a T5 with random weights, what Transformers makes of them, and a Llama with settings of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices: threads only wait for each other
    root = tmp_path_factory.mktemp("hf")
    torch.manual_seed(11)
    heads = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, **heads, max_position_embeddings=160)).eval()
    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=259, num_layers=2, num_heads=4, d_model=64, d_kv=16, d_ff=128, decoder_start_token_id=0,
            eos_token_id=2, initializer_factor=3.0,
        )
    ).eval()  # fmt: skip
    for name, model in (("llama", llama), ("t5", t5)):
        model.save_pretrained(root / name)
        tokenizer = make_tokenizer(root / name)
    expected = [by_transformers(llama, tokenizer, prompt) for prompt in PROMPTS]
    assert all(len(tokens) == NEW for tokens in expected), "the reference ended early: choose another torch seed"
    own = shutil.copytree(root / "llama", root / "own")
    stop = expected[0][5]  # a second end-of-sequence token, which the first prompt meets early
    path = own / "generation_config.json"
    settings = {
        "eos_token_id": [2, stop],
        "repetition_penalty": 9.0,
        "temperature": 0.1,
        "do_sample": True,
        "top_p": 0.3,
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | settings | {"min_new_tokens": 19, "max_length": 4}))
    yield SimpleNamespace(
        llama=str(root / "llama"), t5=str(root / "t5"), own=str(own), stop=stop, model=llama, tokenizer=tokenizer,
        expected=expected, t5_expected=[by_transformers(t5, tokenizer, prompt) for prompt in PROMPTS],
    )  # fmt: skip
    torch.set_num_threads(threads)


def message(function, *args, **kwargs):
    """The package's error that a call raises, as `Type: text`."""
    try:
        function(*args, **kwargs)
    except LowBitError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def run_engines(rank, world, llama, own, t5):
    os.environ["LOCAL_RANK"] = str(rank)
    found = {}
    for name in ENGINES:
        make = engine_class(name)
        for tp in (1, 2):
            engine, pieces, key = make(llama, tp), [], f"{name} TP={tp}"
            before = torch.get_rng_state()
            greedy = engine.generate(PROMPTS, Sampling(NEW), on_text=lambda i, piece: pieces.append((i, piece)))  # noqa: B023
            found[f"greedy {key}"] = [astuple(generation) for generation in greedy]
            found[f"pieces {key}"] = pieces
            found[f"alone {key}"] = [astuple(engine.generate([prompt], Sampling(NEW))[0]) for prompt in PROMPTS]
            for case, sampling in SAMPLINGS.items():
                found[f"{case} {key}"] = [astuple(generation) for generation in engine.generate(PROMPTS, sampling)]
            found[f"rng untouched {key}"] = torch.equal(before, torch.get_rng_state())
            for window in (None, 32, 7):
                found[f"perplexity {window} {key}"] = astuple(engine.perplexity(TEXT, window))
            weight = engine.model.model.layers[0].self_attn.o_proj.weight
            found[f"o_proj {key}"] = list(getattr(weight, "to_local", lambda: weight)().shape)  # noqa: B023
        found[f"own {name}"] = [astuple(generation) for generation in make(own).generate(PROMPTS, Sampling(NEW))]
        found[f"default TP {name}"] = make(llama).tp
        found[f"three ranks {name}"] = message(make, llama, tp=4)
        found[f"dtype {name}"] = message(make, llama, dtype=torch.float64)
        found[f"one string {name}"] = message(engine.generate, "Hi", Sampling())
        found[f"nothing {name}"] = engine.generate([], Sampling())
        found[f"empty prompt {name}"] = message(engine.generate, ["a", ""], Sampling())
        found[f"too long {name}"] = message(engine.generate, ["a" * 100], Sampling(max_new_tokens=60))
        found[f"top_k too large {name}"] = message(engine.generate, ["a"], Sampling(top_k=259))
        found[f"window too large {name}"] = message(engine.perplexity, TEXT, 161)
    for tp in (1, 2):
        engine = engine_class("deepspeed")(t5, tp)
        found[f"t5 TP={tp}"] = [astuple(generation) for generation in engine.generate(PROMPTS, Sampling(NEW))]
    found["t5 perplexity"] = message(engine.perplexity, TEXT)
    found["t5 long"] = len(engine.generate(["a" * 600], Sampling(3))[0].tokens)
    return found


@pytest.fixture(scope="module")
def by_rank(models):
    return run_ranks(2, run_engines, models.llama, models.own, models.t5, timeout=240)


@pytest.fixture(scope="module")
def found(by_rank):
    return by_rank[0]


KEYS = [f"{name} TP={tp}" for name in ENGINES for tp in (1, 2)]


@pytest.mark.parametrize("key", KEYS)
def test_greedy_equals_transformers(models, found, key):
    assert [tokens for _, _, tokens in found[f"greedy {key}"]] == models.expected
    assert [prompt for prompt, _, _ in found[f"greedy {key}"]] == PROMPTS
    assert found[f"alone {key}"] == found[f"greedy {key}"]
    assert found[f"o_proj {key}"] == [64, 64 // int(key[-1])]  # TP=2 is no copy of TP=1


@pytest.mark.parametrize("key", KEYS)
def test_streamed_pieces_are_the_text(models, by_rank, key):
    for index, (prompt, text, tokens) in enumerate(by_rank[0][f"greedy {key}"]):
        mine = [piece for i, piece in by_rank[0][f"pieces {key}"] if i == index]
        assert "".join(mine) == text and len(mine) > 1 and all(mine)
        ids = models.tokenizer(prompt)["input_ids"] + list(tokens)
        assert prompt + text == models.tokenizer.decode(ids, skip_special_tokens=True)
    assert by_rank[1][f"pieces {key}"] == []


def test_ranks_agree(by_rank):
    assert {name for name in by_rank[0] if by_rank[0][name] != by_rank[1][name]} == {f"pieces {key}" for key in KEYS}


def test_sampling_depends_on_the_seed_not_on_tp_or_engine(found):
    for case in SAMPLINGS:
        assert all(found[f"{case} {key}"] == found[f"{case} {KEYS[0]}"] for key in KEYS)
    assert found[f"seed 0 {KEYS[0]}"] != found[f"seed 1 {KEYS[0]}"]
    assert found[f"top_k {KEYS[0]}"] != found[f"greedy {KEYS[0]}"]
    assert all(found[f"rng untouched {key}"] for key in KEYS)


@pytest.mark.parametrize("name", ENGINES)
def test_of_the_models_own_settings_only_end_tokens_count(models, found, name):
    for (_, _, tokens), full in zip(found[f"own {name}"], models.expected, strict=True):
        assert tokens == (full[: full.index(models.stop)] if models.stop in full else full)
    assert len(found[f"own {name}"][0][2]) <= 5


@pytest.mark.parametrize("window", [None, 32, 7])
def test_perplexity_equals_transformers(models, found, window):
    ids = torch.tensor(models.tokenizer(TEXT)["input_ids"])
    nll, count = 0.0, 0
    with torch.no_grad():
        for part in ids[None].split(window or 160, dim=1):
            if part.shape[1] > 1:
                nll += models.model(part, labels=part).loss.item() * (part.shape[1] - 1)
                count += part.shape[1] - 1
    for key in KEYS:
        value, mean, tokens = found[f"perplexity {window} {key}"]
        assert tokens == count and mean == pytest.approx(nll / count, rel=1e-5)
        assert value == pytest.approx(math.exp(nll / count), rel=1e-5)


@pytest.mark.parametrize("tp", [1, 2])
def test_an_encoder_decoder_writes_a_text_of_its_own(models, found, tp):
    for (_, text, tokens), expected in zip(found[f"t5 TP={tp}"], models.t5_expected, strict=True):
        ends = expected.index(2) if 2 in expected else len(expected)
        assert tokens == expected[:ends] and text == models.tokenizer.decode(tokens, skip_special_tokens=True)
    assert found["t5 perplexity"].startswith("ConfigError: a t5 is an encoder-decoder: a text alone has no perplexity")
    assert found["t5 long"] <= 3  # its positions are relative: there is no longest prompt


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("three ranks", "ConfigError: TP=4 is not the number of ranks, 2; start 4 ranks"),
        (
            "dtype",
            "ModelError: dtype torch.float64 is not supported; supported: torch.float32, torch.float16, torch.bfloat16",
        ),
        ("one string", "ConfigError: prompts is the string 'Hi'; give a list of strings"),
        ("empty prompt", "ConfigError: prompt 1 is empty; give at least one character"),
        (
            "too long",
            "ConfigError: prompt 0: 101 prompt tokens + 60 new tokens = 161, above the model's 160 positions; "
            "shorten the prompt or lower max_new_tokens",
        ),
        ("top_k too large", "ConfigError: top_k is 259; it must stay below the vocabulary size 259"),
        ("window too large", "ConfigError: window is 161; it must lie between 2 and 160 tokens"),
    ],
)
@pytest.mark.parametrize("name", ENGINES)
def test_refusals(found, name, case, expected):
    assert found[f"{case} {name}"] == expected
    assert found[f"default TP {name}"] == 2 and found[f"nothing {name}"] == []


# --- nothing below needs ranks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_choices_are_those_of_megatron(sampling):
    module = pytest.importorskip(
        "megatron.core.inference.text_generation_controllers.text_generation_controller", exc_type=ImportError
    )
    rng = torch.Generator().manual_seed(5)
    stand_in, mine = SimpleNamespace(sampling_rng=rng), torch.Generator().manual_seed(5)
    for step in range(20):
        logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(step)) * 3
        theirs = module.TextGenerationController._torch_sampling_func(
            stand_in, logits, sampling.temperature, sampling.top_k, float(sampling.top_p), 50
        )
        assert torch.equal(choose(logits, sampling, mine), theirs)


def test_needs_torch_distributed(models):
    with pytest.raises(ConfigError, match=r"torch\.distributed is not initialised; call init_process_group"):
        engine_class("transformers")(models.llama)
