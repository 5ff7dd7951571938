"""`convert` as a user types it: there, checked, and back; and every way to call it wrongly."""

import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch

from megatron_lowbit.__main__ import main
from megatron_lowbit.cli.files import BUNDLED
from tests.models import random_model

MODEL = BUNDLED / "model"


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The bundled model at TP 2, by the command in a process of its own."""
    out = tmp_path_factory.mktemp("made") / "megatron"
    command = [sys.executable, "-m", "megatron_lowbit", "convert", "--hf", MODEL, "--megatron", out, "--tp", "2"]
    return out, subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "megatron")


def test_it_says_what_it_did_and_how_to_go_on(made):
    out, done = made
    assert done.returncode == 0 and not done.stderr, done.stderr
    first, second, flags, *notes = done.stdout.splitlines()
    assert first.startswith(f"Llama: all 56 tensors of {out} are those of {MODEL}, bit for bit (")
    assert second == f"flags for Megatron-LM's scripts, also as $(cat {out}/megatron_args.txt):"
    assert flags + "\n" == (out / "megatron_args.txt").read_text() and not notes
    for part in (
        "--num-layers 6",
        "--tensor-model-parallel-size 2",
        "--bf16",
        f"--load {out}",
        "--use-checkpoint-args",
    ):
        assert part in flags
    assert (out / "hf" / "tokenizer.json").read_bytes() == (MODEL / "tokenizer.json").read_bytes()


def test_there_and_back_is_the_same_file(made, tmp_path, capsys):
    assert convert("--megatron", made[0], "--hf", tmp_path / "back", "--reverse") == 0
    assert "bit for bit" in capsys.readouterr().out
    for path in MODEL.iterdir():
        if path.suffix == ".safetensors" or "tokenizer" in path.name:
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_check(made, copy, capsys):
    assert convert("--megatron", made[0], "--hf", MODEL, "--check") == 0
    assert "all 56 tensors" in capsys.readouterr().out
    path = copy / "release/mp_rank_01/model_optim_rng.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # one bit of some weight
    path.write_bytes(content)
    assert convert("--megatron", copy, "--hf", MODEL, "--check") == 2
    assert "is not the model's; convert it again" in capsys.readouterr().err


def test_notes_and_stages_and_dtype(tmp_path, capsys):
    random_model("gemma2").save_pretrained(tmp_path / "gemma")
    arguments = (
        "--hf",
        tmp_path / "gemma",
        "--megatron",
        tmp_path / "out",
        "--tp",
        "4",
        "--pp",
        "2",
        "--dtype",
        "fp16",
    )
    assert convert(*arguments) == 0
    output = capsys.readouterr().out
    assert "note: its logits are capped at 5.0" in output and "--fp16" in output and "--num-query-groups 4" in output
    assert len(list((tmp_path / "out" / "release").iterdir())) == 8
    assert convert(*arguments) == 2 and "is not empty" in capsys.readouterr().err
    again = [*arguments[:5], "1", "--force"]  # fewer ranks: none of the old files may stay
    assert convert(*again) == 0
    assert [path.name for path in (tmp_path / "out" / "release").iterdir()] == ["mp_rank_00"]


def test_an_interrupted_checkpoint_is_none(tmp_path, monkeypatch, capsys):
    real, calls = torch.save, []

    def save(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(torch, "save", save)
    assert convert("--hf", MODEL, "--megatron", tmp_path / "m", "--tp", "2") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "m" / "latest_checkpointed_iteration.txt").exists()


WRITE = ["--hf", MODEL, "--megatron", "{tmp}/out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (WRITE, "--tp is missing: give"),
        ([*WRITE, "--tp", "3"], "TP=3 does not divide 8 attention heads and 1024 intermediate features; possible TP"),
        ([*WRITE, "--tp", "0"], "TP=0 does not divide"),
        ([*WRITE, "--tp", "2", "--pp", "4"], "--pp is 4: give a number that divides the model's 6 layers"),
        ([*WRITE, "--tp", "2", "--pp", "0"], "--pp is 0"),
        ([*WRITE, "--tp", "2", "--make-vocab-size-divisible-by", "0"], "--make-vocab-size-divisible-by is 0: give 1"),
        ([*WRITE, "--tp", "2", "--check"], "--tp is read from the checkpoint: leave it out with --check"),
        ([*WRITE, "--dtype", "bf16", "--reverse"], "--dtype is read from the checkpoint: leave it out with --reverse"),
        ([*WRITE, "--check", "--force"], "--force is for writing"),
        ([*WRITE, "--check"], "out has no latest_checkpointed_iteration.txt; give the folder"),
        (["--hf", "{tmp}/back", "--megatron", "{tmp}/out", "--reverse"], "has no latest_checkpointed_iteration.txt"),
        (["--hf", MODEL, "--megatron", MODEL, "--tp", "2"], "--hf and --megatron are both"),
        (["--hf", "{tmp}/full/in", "--megatron", "{tmp}/full", "--tp", "2", "--force"], "lies within --megatron"),
        (["--hf", MODEL, "--megatron", "{tmp}/full", "--tp", "2"], "full is not empty: give another folder, or"),
        (["--hf", MODEL, "--megatron", "{tmp}/file", "--tp", "2"], "file is a file: give a folder"),
        (["--hf", MODEL, "--megatron", "{tmp}/a b", "--tp", "2"], "would split its path at spaces"),
        (["--hf", "{tmp}/none", "--megatron", "{tmp}/out", "--tp", "2"], "none does not exist"),
        (["--hf", "{tmp}/file", "--megatron", "{tmp}/out", "--tp", "2"], "file is a file; give the folder"),
        (["--hf", "{tmp}/bert", "--megatron", "{tmp}/out", "--tp", "2"], "model_type 'bert' is not supported"),
        (["--hf", "{tmp}/full", "--megatron", "{tmp}/out", "--reverse"], "full is not empty"),
        (["--hf", MODEL, "--megatron", "{tmp}/out", "--reverse", "--force"], "holds weights already: remove them"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_line(arguments, message, tmp_path, capsys):
    (tmp_path / "full" / "in").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    assert convert(*(str(argument).format(tmp=tmp_path) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


def test_no_room(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1 << 20))
    assert convert("--hf", MODEL, "--megatron", tmp_path / "out", "--tp", "2") == 2
    assert "MB, the disk has 1 MB free" in capsys.readouterr().err


def test_gemma_has_no_transformer_engine_layers(tmp_path, capsys):
    random_model("gemma2").save_pretrained(tmp_path / "gemma")
    arguments = ("--hf", tmp_path / "gemma", "--megatron", tmp_path / "out", "--tp", "1")
    assert convert(*arguments, "--transformer-impl", "transformer_engine") == 2
    assert "has no layers for a Gemma 2: use local" in capsys.readouterr().err


def test_reverse_without_the_models_config(copy, tmp_path, capsys):
    (copy / "hf" / "config.json").unlink()
    assert convert("--megatron", copy, "--hf", tmp_path / "back", "--reverse") == 2
    assert "hf has no config.json; put the Hugging Face model's there" in capsys.readouterr().err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit, match="0"):
        convert("--help")
    output = capsys.readouterr().out
    assert "examples:" in output and "$(cat ~/models/llama-tp4/megatron_args.txt)" in output and "--reverse" in output
