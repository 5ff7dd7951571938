"""`calibrate` on the bundled model: the file, the table, the JSON and the picture; and every way to call it wrongly."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch

from megatron_lowbit.__main__ import main
from megatron_lowbit.calibration_file import Calibration
from megatron_lowbit.cli.files import BUNDLED
from megatron_lowbit.engines.fingerprint import fingerprint
from megatron_lowbit.spec import parse
from tests import hf_folders

TEXT = BUNDLED / "sample_text.txt"
SHORT = ["--text", str(TEXT), "--samples", "6", "--sequence-length", "32"]
SITES = tuple(f"layers.{layer}.{kind}" for layer in range(6) for kind in ("attention", "mlp"))


def calibrate(folder, *arguments, tp="4", name="a.safetensors") -> Calibration:
    assert main(["calibrate", "--tp", tp, "--out", str(folder / name), *SHORT, *arguments]) == 0
    return Calibration.load(folder / name)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So little work is slower with more, above all beside other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return calibrate(tmp_path_factory.mktemp("calibration"))


def test_the_file_fits_its_model(made):
    assert made.sites == SITES and made.has_sums
    made.check(parse("selective4"), 4, fingerprint(BUNDLED / "model"), SITES, "two-step")
    for site, ranges in made.ranges.items():
        assert ranges.low.shape == (4, 256) and len(made.outliers[site]) == 4
        assert not torch.equal(ranges.low[0], ranges.low[1])


def test_the_file_names_its_origin_and_no_path(made):
    facts = dict(made.metadata)
    expected = {"model": "model", "text": "sample_text.txt", "samples": "6", "sequence_length": "32", "seed": "0"}
    assert facts.items() >= (expected | {"gamma": "0.01", "dtype": "bfloat16", "algorithm": "auto"}).items()
    assert facts["text_sha256"] == hashlib.sha256(TEXT.read_bytes()).hexdigest()
    assert not any("/" in text for name, text in facts.items() if name != "fraction")


def test_the_seed_decides(made, tmp_path):
    assert calibrate(tmp_path).digest == made.digest
    assert calibrate(tmp_path, "--seed", "1").digest != made.digest


def test_another_tp_size_has_other_statistics(made, tmp_path):
    other = calibrate(tmp_path, tp="2")
    assert other.tp == 2 and not torch.equal(other.ranges[SITES[1]].low[0], made.ranges[SITES[1]].low[0])
    assert torch.allclose(other.ranges[SITES[0]].sum_low, made.ranges[SITES[0]].sum_low, rtol=0.05, atol=0.05)


def test_all_that_can_be_asked_for(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = ["--plot", str(tmp_path / "a.png"), "--json", str(tmp_path / "a.json")]
    choices = ["--fraction", "1/32", "--gamma", "0.2", "--algorithm", "one-shot", "--dtype", "fp32", "--seed", "5"]
    made = calibrate(tmp_path, *files, *choices)
    assert not made.has_sums and len(made.outliers[SITES[0]]) == 8
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "a.json").read_text())
    assert set(result) == {
        "model", "tp", "text", "text_sha256", "samples", "sequence_length", "seed", "gamma", "fraction", "algorithm",
        "dtype", "digest", "seconds", "sites",
    }  # fmt: skip
    assert (result["tp"], result["fraction"], result["gamma"]) == (4, "1/32", 0.2)
    assert (result["samples"], result["digest"], result["algorithm"]) == (6, made.digest, "one-shot")
    assert tuple(site["site"] for site in result["sites"]) == SITES
    for site in result["sites"]:
        assert set(site) == {"site", "features", "outliers", "outlier_range", "median_range", "overlap", "chance"}
        assert (site["features"], site["outliers"], site["chance"]) == (256, 8, 1 / 32)
        assert site["outlier_range"] > site["median_range"] > 0 and 0 <= site["overlap"] <= 1
    shown = capsys.readouterr().out
    for part in ("model · TP=4 · 1/32 of the features", "layers.0.attention", "8 of 256", "3.1%", "6 windows of 32"):
        assert part in shown
    assert made.digest[:12] in shown and "…" not in shown


def test_a_short_text_is_said_to_be_short(tmp_path, capsys):
    made = calibrate(tmp_path, "--samples", "64", "--sequence-length", "512")
    count = int(made.metadata["samples"])
    assert 1 < count < 64
    assert f"{count} windows of 512 tokens, all that the text has of the 64 asked for" in capsys.readouterr().out


def test_a_single_window_has_no_overlap(tmp_path, capsys):
    calibrate(tmp_path, "--samples", "1", "--json", str(tmp_path / "a.json"))
    assert all(site["overlap"] is None for site in json.loads((tmp_path / "a.json").read_text())["sites"])


def test_what_an_engine_does_not_have_is_left_out(tmp_path):
    """DeepSpeed leaves experts whole: they make no partial sums."""
    folder = hf_folders.save("mixtral", tmp_path / "model")
    for engine, kinds in (("deepspeed", ["attention"]), ("transformers", ["attention", "moe.combine"])):
        made = calibrate(tmp_path, "--model", str(folder), "--engine", engine, tp="2", name=engine)
        assert made.sites == tuple(f"layers.{layer}.{kind}" for layer in range(2) for kind in kinds)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_family_that_megatron_does_not_run(name, tmp_path, capsys):
    folder = hf_folders.save(name, tmp_path / "model")
    made = calibrate(tmp_path, "--model", str(folder), "--engine", "deepspeed", tp="2")
    made.check(parse("selective4"), 2, fingerprint(folder), made.sites)
    assert len(made.sites) == (4 if name == "gpt2" else 10)
    assert main(["calibrate", "--tp", "2", "--out", str(tmp_path / "b"), *SHORT, "--model", str(folder)]) == 2
    assert f"model_type '{name}' is not supported" in capsys.readouterr().err


def test_as_a_user_types_it(made, tmp_path):
    command = [sys.executable, "-m", "megatron_lowbit", "calibrate", "--tp", "4", "--out", str(tmp_path / "a"), *SHORT]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert Calibration.load(tmp_path / "a").digest == made.digest
    assert "Warning" not in done.stderr and "Loading" not in done.stderr and "windows" in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tp", "1"], "--tp is 1: give 2 or more ranks, as fewer have nothing to communicate"),
        (["--tp", "0"], "--tp is 0"),
        (["--tp", "3"], "TP=3 does not divide 8 attention heads"),
        (["--fraction", "0"], "--fraction is '0': give a number above 0 and up to 1, such as 1/64"),
        (["--fraction", "65/64"], "--fraction is '65/64'"),
        (["--fraction", "some"], "--fraction is 'some'"),
        (["--fraction", "1/0"], "--fraction is '1/0'"),
        (["--gamma", "0"], "--gamma is 0.0: give a number above 0 and up to 1, such as 0.01"),
        (["--gamma", "nan"], "--gamma is nan"),
        (["--samples", "0"], "--samples is 0: give at least one window"),
        (["--seed", "-1"], "--seed is -1"),
        (["--sequence-length", "1"], "--sequence-length is 1: give 2 to 512 tokens, the model's positions"),
        (["--sequence-length", "513"], "--sequence-length is 513: give 2 to 512 tokens"),
        (["--text", "/nowhere.txt"], "--text /nowhere.txt cannot be read"),
        (["--text", "/dev/null"], "--text /dev/null is empty"),
        (["--text", str(BUNDLED / "model" / "model.safetensors")], "cannot be read as UTF-8 text"),
        (["--text", str(BUNDLED / "prompts.txt"), "--sequence-length", "512"], "too few for one window of 512: give a"),
        (["--out", "/nowhere/a"], "--out /nowhere/a: there is no folder /nowhere; make it first"),
        (["--out", "/tmp"], "--out /tmp is a folder: give a file"),
        (["--out", "/dev/null"], "--out /dev/null is a device: give a file"),
        (["--json", "/nowhere/a"], "--json /nowhere/a: there is no folder"),
        (["--plot", "/tmp"], "--plot /tmp is a folder"),
        (["--json", "OUT"], "--out, --json name one file twice: give each its own"),
        (["--model", "/nowhere"], "model folder /nowhere does not exist"),
        (["--model", str(BUNDLED)], "has no config.json"),
    ],
)
def test_bad_input_is_one_line_with_the_remedy(arguments, message, capsys, tmp_path, monkeypatch):
    """And found before the model is loaded."""
    import transformers

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    out = str(tmp_path / "a.safetensors")
    arguments = [out if argument == "OUT" else argument for argument in arguments]
    assert main(["calibrate", "--tp", "2", "--out", out, "--text", str(TEXT), *arguments]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and message in stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: --tp, --text, --out"),
        (["--tp", "two"], "invalid int value: 'two'"),
        (["--algorithm", "ring"], "invalid choice: 'ring'"),
    ],
)
def test_unreadable_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["calibrate", *arguments])
    stderr = capsys.readouterr().err
    assert stop.value.code == 2 and stderr.count("\n") == 1 and message in stderr


def test_under_a_launcher(monkeypatch, capsys, tmp_path):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert main(["calibrate", "--tp", "2", "--out", str(tmp_path / "a"), *SHORT]) == 2
    assert "calibrate simulates all ranks in one process: start it without torchrun" in capsys.readouterr().err


def test_without_a_tokenizer(capsys, tmp_path):
    from tests.llama import tiny_llama

    tiny_llama().save_pretrained(tmp_path / "model")
    arguments = ["--tp", "2", "--out", str(tmp_path / "a"), "--model", str(tmp_path / "model"), *SHORT]
    assert main(["calibrate", *arguments]) == 2
    assert "has no tokenizer that Transformers can load" in capsys.readouterr().err


def test_help_has_examples(capsys):
    for arguments in (["--help"], ["calibrate", "--help"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "megatron-lowbit calibrate --model" in capsys.readouterr().out
