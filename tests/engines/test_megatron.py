"""The Megatron engine generates and scores what Transformers does, alike on all ranks and TP sizes, or says why not."""

import contextlib
import json
import math
import shutil
import tempfile
from dataclasses import astuple
from types import SimpleNamespace

import pytest
import torch

from megatron_lowbit.engines.base import Sampling, TextStream
from megatron_lowbit.engines.megatron import MegatronEngine, init_tensor_parallel
from megatron_lowbit.errors import ConfigError, LowBitError, ModelError
from tests.byte_tokenizer import make_tokenizer
from tests.ranks import run_ranks

# What releases print where they are imported (0.15) or build a model (from 0.18 on).
MEGATRONS_OWN = ("fused_indices_to_multihot has reached", "GPTModel IS DEPRECATED")
PROMPTS = ["Hi", "Flüsse tragen Schiffe", "two rivers, one sea"]  # of different lengths: one batch all the same
NEW = 24
TEXT = "Le cœur a ses raisons que la raison ne connaît point. " * 4
SAMPLINGS = {
    "seed 0": Sampling(NEW, temperature=0.8, top_k=0, seed=0),
    "seed 1": Sampling(NEW, temperature=0.8, top_k=0, seed=1),
    "top_k": Sampling(NEW, top_k=7, seed=3),
    "top_p": Sampling(NEW, top_k=0, top_p=0.6, seed=3),
    "hot": Sampling(100, temperature=1e4, top_k=0, seed=5),  # every token alike: padding would be drawn too
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A random Llama with tokenizer, what Transformers makes of it, and copies that end early and lack a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(11)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices: threads only wait for each other
    root = tmp_path_factory.mktemp("engine")
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=160,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(root / "llama")
    tokenizer = make_tokenizer(root / "llama")

    def greedy(prompt):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, pad_token_id=0
        )
        return tuple(out[0, ids.shape[1] :].tolist())

    expected = [greedy(prompt) for prompt in PROMPTS]
    assert all(len(tokens) == NEW for tokens in expected), "the reference ended early: choose another torch seed"
    ends = shutil.copytree(root / "llama", root / "ends")
    stop = expected[0][5]  # a second end-of-sequence token, which the first prompt meets early
    path = ends / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, stop]}))
    mute = shutil.copytree(root / "llama", root / "mute", ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    yield SimpleNamespace(
        folder=str(root / "llama"), ends=str(ends), mute=str(mute), stop=stop, model=model, tokenizer=tokenizer,
        expected=expected,
    )  # fmt: skip
    torch.set_num_threads(threads)


def message(function, *args, **kwargs):
    """The package's error that a call raises, as `Type: text`."""
    try:
        function(*args, **kwargs)
    except LowBitError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def run_engine(rank, world, folder, ends, mute):
    """In one world of 2: everything the tests look at, with the engine at TP 1 and at TP 2."""
    found = {}
    printed = tempfile.TemporaryFile("w+")  # a real file: Megatron hands stderr's descriptor to faulthandler
    with printed, contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        found["three ranks"] = message(MegatronEngine, folder, tp=4)
        found["uneven"] = message(MegatronEngine, folder, tp=3)
        for tp in (1, 2):
            engine, pieces = MegatronEngine(folder, tp), []
            before = torch.get_rng_state()
            greedy = engine.generate(PROMPTS, Sampling(NEW), on_text=lambda i, piece: pieces.append((i, piece)))  # noqa: B023
            found[f"rng untouched TP={tp}"] = torch.equal(before, torch.get_rng_state())
            found[f"greedy TP={tp}"] = [astuple(generation) for generation in greedy]
            found[f"pieces TP={tp}"] = pieces
            found[f"alone TP={tp}"] = [astuple(engine.generate([prompt], Sampling(NEW))[0]) for prompt in PROMPTS]
            for name, sampling in SAMPLINGS.items():
                found[f"{name} TP={tp}"] = [astuple(generation) for generation in engine.generate(PROMPTS, sampling)]
            for window in (None, 32, 7):
                found[f"perplexity {window} TP={tp}"] = astuple(engine.perplexity(TEXT, window))
            found[f"ends TP={tp}"] = [astuple(g) for g in MegatronEngine(ends, tp).generate(PROMPTS, Sampling(NEW))]
            if tp == 1:
                from megatron.core import parallel_state

                found["other TP"] = message(MegatronEngine, folder, tp=2)
                parallel_state.destroy_model_parallel()
        found["default TP"] = MegatronEngine(folder).tp
        found["dtype"] = message(MegatronEngine, folder, dtype=torch.float64)
        found["one string"] = message(engine.generate, "Hi", Sampling())
        found["nothing"] = engine.generate([], Sampling())
        found["no tokenizer"] = message(MegatronEngine, mute)
        found["empty prompt"] = message(engine.generate, ["a", ""], Sampling())
        found["too long"] = message(engine.generate, ["a" * 100], Sampling(max_new_tokens=60))
        found["exactly fits"] = message(engine.generate, ["a" * 99], Sampling(max_new_tokens=60))
        found["top_k too large"] = message(engine.generate, ["a"], Sampling(top_k=259))
        found["window too large"] = message(engine.perplexity, TEXT, 161)
        found["window too small"] = message(engine.perplexity, TEXT, 1)
        found["text too short"] = message(engine.perplexity, "")
        printed.seek(0)
        found["printed"] = [line for line in printed.read().splitlines() if not line.startswith(MEGATRONS_OWN)]
    return found


@pytest.fixture(scope="module")
def by_rank(llama):
    return run_ranks(2, run_engine, llama.folder, llama.ends, llama.mute, timeout=240)


@pytest.fixture(scope="module")
def found(by_rank):
    return by_rank[0]


@pytest.mark.parametrize("tp", [1, 2])
def test_greedy_equals_transformers(llama, found, tp):
    assert [tokens for _, _, tokens in found[f"greedy TP={tp}"]] == llama.expected
    assert [prompt for prompt, _, _ in found[f"greedy TP={tp}"]] == PROMPTS
    assert found[f"alone TP={tp}"] == found[f"greedy TP={tp}"]


@pytest.mark.parametrize("tp", [1, 2])
def test_text_is_the_continuation(llama, found, tp):
    for prompt, text, tokens in found[f"greedy TP={tp}"]:
        ids = llama.tokenizer(prompt)["input_ids"] + list(tokens)
        assert prompt + text == llama.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("tp", [1, 2])
def test_streamed_pieces_are_the_text(by_rank, tp):
    pieces = by_rank[0][f"pieces TP={tp}"]
    for index, (_, text, _) in enumerate(by_rank[0][f"greedy TP={tp}"]):
        mine = [piece for i, piece in pieces if i == index]
        assert "".join(mine) == text and len(mine) > 1 and all(mine)
    assert by_rank[1][f"pieces TP={tp}"] == []


def test_ranks_agree(by_rank):
    differing = {name for name in by_rank[0] if by_rank[0][name] != by_rank[1][name]}
    assert differing == {"pieces TP=1", "pieces TP=2"}


def test_sampling_depends_on_the_seed_not_on_tp(found):
    for name, sampling in SAMPLINGS.items():
        assert all(len(tokens) <= sampling.max_new_tokens for _, _, tokens in found[f"{name} TP=1"])
        if name != "hot":  # there every token is as likely as the next, so rounding may choose
            assert found[f"{name} TP=1"] == found[f"{name} TP=2"]
    assert found["seed 0 TP=1"] != found["seed 1 TP=1"]
    assert found["top_k TP=1"] != found["greedy TP=1"]
    assert found["rng untouched TP=1"] and found["rng untouched TP=2"]


def test_vocabulary_padding_is_never_sampled(found):
    tokens = [token for _, _, tokens in found["hot TP=2"] for token in tokens]
    assert len(set(tokens)) > 50 and max(tokens) < 259


@pytest.mark.parametrize("tp", [1, 2])
def test_any_end_token_ends_the_text(llama, found, tp):
    for (_, _, tokens), full in zip(found[f"ends TP={tp}"], llama.expected):
        assert tokens == (full[: full.index(llama.stop)] if llama.stop in full else full)
    assert len(found[f"ends TP={tp}"][0][2]) <= 5


@pytest.mark.parametrize("window", [None, 32, 7])
def test_perplexity_equals_transformers(llama, found, window):
    ids = torch.tensor(llama.tokenizer(TEXT)["input_ids"])
    nll, count = 0.0, 0
    with torch.no_grad():
        for part in ids[None].split(window or 160, dim=1):
            if part.shape[1] > 1:
                nll += llama.model(part, labels=part).loss.item() * (part.shape[1] - 1)
                count += part.shape[1] - 1
    for tp in (1, 2):
        value, mean, tokens = found[f"perplexity {window} TP={tp}"]
        assert tokens == count
        assert mean == pytest.approx(nll / count, rel=1e-5)
        assert value == pytest.approx(math.exp(nll / count), rel=1e-5)


def test_engine_prints_nothing(found):
    assert found["printed"] == []


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("three ranks", "ConfigError: TP=4 does not divide the 2 ranks; start a multiple of 4 ranks"),
        (
            "uneven",
            "ModelError: TP=3 does not divide 8 attention heads; possible TP sizes: 1, 2, 4, 8",
        ),
        ("other TP", "ConfigError: TP=2 was asked for but Megatron already runs TP=1; use 1"),
        (
            "dtype",
            "ConfigError: dtype torch.float64 is not supported; "
            "supported: torch.float32, torch.float16, torch.bfloat16",
        ),
        ("one string", "ConfigError: prompts is the string 'Hi'; give a list of strings"),
        ("empty prompt", "ConfigError: prompt 1 is empty; give at least one character"),
        (
            "too long",
            "ConfigError: prompt 0: 101 prompt tokens + 60 new tokens = 161, above the model's 160 positions; "
            "shorten the prompt or lower max_new_tokens",
        ),
        ("exactly fits", "no error"),
        ("top_k too large", "ConfigError: top_k is 259; it must stay below the vocabulary size 259"),
        ("window too large", "ConfigError: window is 161; it must lie between 2 and 160 tokens"),
        ("window too small", "ConfigError: window is 1; it must lie between 2 and 160 tokens"),
        ("text too short", "ConfigError: the text has 1 tokens; perplexity needs at least 2"),
    ],
)
def test_refusals(found, case, expected):
    assert found[case] == expected


def test_missing_tokenizer(found):
    assert found["no tokenizer"].startswith("ModelError: ")
    assert "has no tokenizer that Transformers can load" in found["no tokenizer"] and "\n" not in found["no tokenizer"]


def test_defaults(found):
    assert found["default TP"] == 2 and found["nothing"] == []


# --- nothing below needs ranks ------------------------------------------------------------------------------------


def test_needs_torch_distributed(llama):
    with pytest.raises(ConfigError, match=r"torch\.distributed is not initialised; call init_process_group"):
        init_tensor_parallel(1)


def test_missing_folder_is_refused_before_megatron_loads(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        MegatronEngine(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"temperature": 0.0}, r"temperature is 0\.0; it must be above 0 \(for greedy use top_k=1\)"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1; use 0"),
        ({"top_k": 0, "top_p": 1.5}, r"top_p is 1\.5; it must lie between"),
        ({"top_p": 0.9}, r"top_k=1 and top_p=0\.9 exclude each other; set top_k=0"),
    ],
)
def test_sampling_out_of_range(options, expected):
    with pytest.raises(ConfigError, match=expected):
        Sampling(**options)


def sentencepiece_like():
    """Words with a leading mark, and single bytes for what is no word: the tokens of Llama 2."""
    from tokenizers import Tokenizer, decoders, models

    symbols = ["<unk>", "▁one", "▁two", "s", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [
        ([2, 3, 1], [" two", "s", " one"]),  # the leading space survives
        ([2, *(4 + b for b in "é🙂".encode()), 3], [" two", "", "é", "", "", "", "🙂", "s"]),  # whole characters only
        ([2, 4 + 0xE2, 4 + 0x82], [" two", "", ""]),  # an unfinished character waits for the end
    ],
)
def test_stream_gives_whole_characters(tokens, pieces):
    tokenizer = sentencepiece_like()
    stream = TextStream(tokenizer.decode, [1])
    given = [stream.push(token) for token in tokens]
    assert given == pieces
    assert "one" + "".join(given) + stream.finish() == tokenizer.decode([1, *tokens])
