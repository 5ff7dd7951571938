"""The training script makes, from any text and in one command, a folder that loads and says what it is."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TEXT = ROOT / "examples" / "sample_text.txt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    arguments = [
        "--text",
        TEXT,
        "--held-out",
        TEXT,
        "--out",
        folder,
        "--steps",
        12,
        "--batch-size",
        2,
        "--quiet",
        "--fp32",
    ]
    arguments += ["--vocab-size", 400, "--hidden-size", 64, "--intermediate-size", 128, "--layers", 2, "--heads", 4]
    arguments += ["--sequence-length", 64, "--warmup", 2]
    command = [sys.executable, str(ROOT / "examples" / "train_model.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return folder


def test_it_learns_and_the_card_tells_the_truth(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(trained)
    assert model.dtype == torch.bfloat16
    ids = AutoTokenizer.from_pretrained(trained)(TEXT.read_text(), return_tensors="pt")["input_ids"][0]
    losses = []
    with torch.no_grad():
        for window in ids.split(64):
            if len(window) > 1:
                logits = model.float()(input_ids=window[None]).logits[0, :-1]
                losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
    perplexity = math.exp(torch.cat(losses).mean())
    assert perplexity < 390  # guessing among 400 tokens would give 400
    assert f"**Held-out perplexity**: {perplexity:.2f}" in (trained / "README.md").read_text()


def test_the_tokenizer_unwraps_lines_and_keeps_paragraphs(trained):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained)
    ids = tokenizer("A _hard_ wrapped\nline.\n\n\nA paragraph,  é too.")["input_ids"]
    assert tokenizer.decode(ids) == "A hard wrapped line.\n\nA paragraph, é too."


def test_the_bundled_model_is_what_its_card_says():
    card = (ROOT / "examples" / "model" / "README.md").read_text()
    files = [file for file in (ROOT / "examples" / "model").iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 16e6
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(ROOT / "examples" / "model")
    assert config.hidden_size % 128 == 0 and config.intermediate_size % 256 == 0
    assert config.num_attention_heads == config.num_key_value_heads == 8
    assert f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}" in card
