"""The main job on the bundled model, through the command a user types; and every way to call it wrongly."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import megatron_lowbit as lowbit
from megatron_lowbit.__main__ import main
from megatron_lowbit.calibration_file import Calibration
from megatron_lowbit.cli.files import BUNDLED
from megatron_lowbit.cli.generate import agreement
from megatron_lowbit.cli.job import DEFAULT_SPEC
from megatron_lowbit.plan_file import Plan
from tests import hf_folders
from tests.calibrations import random_calibration

COMMAND = [sys.executable, "-m", "megatron_lowbit", "generate"]
PLANNED = {"attention": "int8:g128", "mlp": "exact"}
SHORT = ["--max-new-tokens", "12", "--prompt", "The old house stood", "--prompt", "It was a cold morning"]


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL, **options
    )


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    file = tmp_path_factory.mktemp("json") / "out.json"
    done = run("--compare", "--dtype", "fp32", "--json", str(file), *SHORT)
    assert done.returncode == 0, done.stderr
    return done, json.loads(file.read_text())


def test_compare_writes_the_documented_json(compared):
    _, result = compared
    assert set(result) == {"model", "engine", "tp", "comm", "exact", "compressed"}
    assert (result["engine"], result["tp"], result["comm"]) == (
        "megatron",
        2,
        str(lowbit.CommConfig(DEFAULT_SPEC).spec),
    )
    assert set(result["exact"]) == {"texts", "perplexity", "seconds", "bytes_sent"}
    assert set(result["compressed"]) == set(result["exact"]) | {"token_agreement", "bytes_exact"}
    for part in (result["exact"], result["compressed"]):
        assert len(part["texts"]) == 2 and all(text.strip() for text in part["texts"])
        assert 1 < part["perplexity"] < 1000 and part["seconds"] > 0


@pytest.mark.parametrize("engine", ["megatron", "deepspeed", "transformers"])
def test_a_plan_holds_at_its_sites(engine, tmp_path):
    """Attention in 8.25 bits of 16 and the MLP as it is: by the bytes, in every engine."""
    sites = {f"layers.{i}.{kind}": spec for i in range(6) for kind, spec in PLANNED.items()}
    Plan(sites, tp=2).save(tmp_path / "plan.json")
    argv = ["--engine", engine, "--comm-plan", str(tmp_path / "plan.json"), "--json", str(tmp_path / "out.json")]
    done = run(*argv, *SHORT)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["comm"] == "plan"
    sent = result["compressed"]["bytes_sent"] / result["compressed"]["bytes_exact"]
    assert sent == pytest.approx((8.25 / 16 + 1) / 2, abs=0.01)


def test_a_plan_of_another_model_or_size_is_refused(tmp_path):
    Plan({"layers.0.mlp": "int8"}, tp=2).save(tmp_path / "plan.json")
    done = run("--comm-plan", str(tmp_path / "plan.json"), *SHORT)
    assert done.returncode == 2 and "plan.json lacks layers.0.attention" in done.stderr
    done = run("--tp", "4", "--lowbit-comm-plan", str(tmp_path / "plan.json"), *SHORT)  # as Megatron's scripts
    assert done.returncode == 2 and "was made for TP 2, this group has 4 ranks" in done.stderr
    done = run("--comm", "int8", "--comm-plan", str(tmp_path / "plan.json"), *SHORT)
    assert done.returncode == 2 and "exclude each other" in done.stderr


def test_the_default_spec_keeps_its_promise(compared):
    """At most 2.5 % of perplexity for more than 2.3 times fewer bytes than bf16; and really through the codec."""
    exact, compressed = compared[1]["exact"], compared[1]["compressed"]
    assert exact["perplexity"] != compressed["perplexity"] <= 1.025 * exact["perplexity"]
    assert compressed["bytes_exact"] > 2.3 * compressed["bytes_sent"]
    assert exact["bytes_sent"] == 2 * compressed["bytes_exact"]  # fp32 against bf16
    assert 0 < compressed["token_agreement"] <= 1


def test_bytes_are_those_of_two_reduces_per_layer(compared):
    config = json.loads((BUNDLED / "model" / "config.json").read_text())
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "model")
    text = len(tokenizer((BUNDLED / "sample_text.txt").read_text())["input_ids"])
    prompts = sum(len(tokenizer(p)["input_ids"]) + 11 for p in SHORT[3::2])  # the last new token is not fed back
    if text % 512 == 1:
        text -= 1  # a window of one token predicts nothing and is not run
    values = 2 * config["num_hidden_layers"] * config["hidden_size"] * (text + prompts)
    assert compared[1]["compressed"]["bytes_exact"] == 2 * values  # TP=2: half of it twice, 2 bytes each


def test_a_person_sees_the_texts_and_the_figures(compared):
    output = compared[0].stdout
    for part in ("The old house stood", "perplexity", "bytes sent", "x fewer", "same tokens", DEFAULT_SPEC):
        assert part in output
    assert "Traceback" not in output + compared[0].stderr and "Warning" not in compared[0].stderr


@pytest.fixture(scope="module", params=["deepspeed", "transformers"])
def other(request, tmp_path_factory):
    """The same comparison by another engine, with a codec that hardly changes the text."""
    file = tmp_path_factory.mktemp("json") / "out.json"
    done = run(
        "--engine", request.param, "--comm", "int8:g128", "--compare", "--dtype", "fp32", "--json", str(file), *SHORT
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return request.param, done, json.loads(file.read_text())


def test_every_engine_prints_the_same_comparison(compared, other):
    name, _, result = other
    mine, theirs = result["exact"], compared[1]["exact"]
    assert list(result) == list(compared[1]) and (result["engine"], result["tp"]) == (name, 2)
    assert {part: list(result[part]) for part in ("exact", "compressed")} == {
        part: list(compared[1][part]) for part in ("exact", "compressed")
    }
    assert (mine["texts"], mine["bytes_sent"]) == (theirs["texts"], theirs["bytes_sent"])
    assert mine["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-5)
    assert result["compressed"]["bytes_exact"] == compared[1]["compressed"]["bytes_exact"]
    assert result["compressed"]["bytes_exact"] > 1.9 * result["compressed"]["bytes_sent"]
    assert mine["perplexity"] != result["compressed"]["perplexity"] <= 1.005 * mine["perplexity"]
    assert result["compressed"]["token_agreement"] >= 0.95


@pytest.mark.slow
def test_the_same_tokens_agree_in_every_engine(other, tmp_path):
    file = tmp_path / "out.json"
    done = run("--comm", "int8:g128", "--compare", "--dtype", "fp32", "--json", str(file), *SHORT)
    assert done.returncode == 0, done.stderr
    megatron, result = json.loads(file.read_text()), other[2]
    for part in ("exact", "compressed"):
        assert result[part]["texts"] == megatron[part]["texts"]
        assert result[part]["bytes_sent"] == megatron[part]["bytes_sent"]
    assert result["compressed"]["token_agreement"] == megatron["compressed"]["token_agreement"]
    assert result["compressed"]["perplexity"] == pytest.approx(megatron["compressed"]["perplexity"], rel=1e-4)


def test_a_framework_prints_nothing_into_it(compared, other):
    """No line beside those that the Megatron engine has: text, texts side by side, figures."""
    _, done, _ = other
    assert done.stderr == "" and len(done.stdout.splitlines()) == len(compared[0].stdout.splitlines())


@pytest.mark.parametrize(
    "name, engine, flags",
    [
        ("qwen2 tied", "deepspeed", ["--compare"]),
        pytest.param("qwen2 tied", "transformers", ["--compare"], marks=pytest.mark.slow),
        pytest.param("qwen2 tied", "megatron", ["--compare"], marks=pytest.mark.slow),
        pytest.param("llama", "transformers", ["--compare", "--temperature", "0.8"], marks=pytest.mark.slow),
        pytest.param(
            "gemma2", "transformers", ["--dtype", "bf16", "--comm-sites", "layers.*.mlp"], marks=pytest.mark.slow
        ),
        pytest.param("gpt2", "deepspeed", ["--compare", "--top-p", "0.9"], marks=pytest.mark.slow),
        pytest.param("gpt_neox", "deepspeed", ["--comm", "int4:g32/int8:g64", "--compare"], marks=pytest.mark.slow),
    ],
)
def test_folders_that_nobody_here_made(name, engine, flags, tmp_path):
    """Several files with an index, tied embeddings, tokenizers of two kinds."""
    folder = hf_folders.save(name, tmp_path / "model")
    assert len(list(folder.glob("model-0*.safetensors"))) > 2 and not (folder / "model.safetensors").exists()
    file = tmp_path / "out.json"
    done = run("--model", str(folder), "--engine", engine, "--json", str(file), *SHORT, *flags)
    assert done.returncode == 0, done.stderr
    compressed = json.loads(file.read_text())["compressed"]
    assert compressed["bytes_sent"] < compressed["bytes_exact"] and compressed["perplexity"] > 1
    assert all(compressed["texts"])


@pytest.mark.slow
def test_an_encoder_decoder_has_texts_and_no_perplexity(tmp_path):
    folder, file = hf_folders.save("t5", tmp_path / "model"), tmp_path / "out.json"
    done = run("--model", str(folder), "--engine", "deepspeed", "--compare", "--json", str(file), *SHORT)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["exact"]["perplexity"] is result["compressed"]["perplexity"] is None
    assert result["compressed"]["bytes_sent"] < result["compressed"]["bytes_exact"]


@pytest.mark.slow
def test_under_deepspeeds_launcher(tmp_path):
    """Which puts --local_rank in front of the command."""
    file, launcher = tmp_path / "out.json", ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--module"]
    done = subprocess.run(
        [sys.executable, *launcher, *COMMAND[2:], "--engine", "deepspeed", "--json", str(file), *SHORT],
        capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_text())["tp"] == 2 and "AutoTP" not in done.stdout


def test_tp2_exact_equals_tp1(compared, tmp_path):
    file = tmp_path / "one.json"
    done = run("--comm", "exact", "--tp", "1", "--dtype", "fp32", "--json", str(file), *SHORT)
    assert done.returncode == 0, done.stderr
    one = json.loads(file.read_text())
    assert set(one) == {"model", "engine", "tp", "comm", "exact"} and one["exact"]["bytes_sent"] == 0
    assert one["exact"]["texts"] == compared[1]["exact"]["texts"]
    assert one["exact"]["perplexity"] == pytest.approx(compared[1]["exact"]["perplexity"], rel=1e-5)


def test_under_torchrun_with_sampling(tmp_path):
    file = tmp_path / "two-step.json"
    arguments = ["--comm", "int4:g32/int8:g128", "--comm-algorithm", "two-step", "--temperature", "0.8", "--seed", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *COMMAND[1:],
         *arguments, "--json", str(file), *SHORT],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert set(result) == {"model", "engine", "tp", "comm", "compressed"} and result["tp"] == 2
    sent, exact = result["compressed"]["bytes_sent"], result["compressed"]["bytes_exact"]
    assert exact / sent == pytest.approx(16 / ((5 + 8.25) / 2), rel=0.02)


def test_nothing_compressed_is_an_error():
    done = run("--comm-min-bytes", "1000000000", *SHORT)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "nothing was compressed: no message reached --comm-min-bytes 1000000000" in errors[0]


def test_a_killed_rank_ends_the_run_with_an_error():
    process = subprocess.Popen(
        [*COMMAND, "--max-new-tokens", "200", "--timeout", "20"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (ranks := _children(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.stdout.readline()  # both ranks are generating
    os.kill(ranks[-1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=90)
    assert process.returncode == 2
    assert "was killed by SIGKILL" in stderr and "Traceback" not in stderr


def _children(pid: int) -> list[int]:
    """Processes below `pid` that run a rank."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            if int(fields["PPid"]) == pid and b"generate" in (status.parent / "cmdline").read_bytes():
                found.append(int(fields["Pid"]))
        except (OSError, KeyError):
            pass  # it ended meanwhile
    return sorted(found)


BERT = '{"model_type": "bert"}'


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--comm", "int9"], "unknown codec 'int9' in spec 'int9': use one of bf16"),
        (
            ["--comm", "selective4"],
            "needs a calibration: make a file with 'megatron-lowbit calibrate'",
        ),
        (["--comm", "selective4", "--comm-calibration", "/nowhere"], "there is no calibration file /nowhere"),
        (["--comm-calibration", __file__], "makes no use of calibration="),
        (["--comm", "exact", "--comm-calibration", __file__], "--comm exact makes no use of --comm-calibration"),
        (["--comm", "selective4", "--comm-calibration", __file__], "cannot be read"),
        (["--comm", "int4:g48"], "group size 'g48'"),
        (
            ["--comm-algorithm", "ring"],
            "unknown algorithm 'ring': use one of auto, one-shot, two-step, hierarchical, exact",
        ),
        (["--comm-min-bytes", "-1"], "min_bytes is -1"),
        (["--comm", "exact", "--compare"], "compares exact with exact"),
        (["--engine", "vllm"], "unknown engine 'vllm': use one of megatron, deepspeed, transformers"),
        (["--engine", "deepspeed", "--model", "/nowhere"], "model folder /nowhere does not exist"),
        (["--engine", "deepspeed", "--model", "BERT"], "a bert is an encoder, which generates no text"),
        (["--engine", "transformers", "--tp", "3"], "TP=3 does not divide 8 attention heads"),
        (["--engine", "transformers", "--tp", "3"], "possible TP sizes: 1, 2, 4, 8"),
        (["--engine", "deepspeed", "--comm-sites", "x"], "--comm-sites x selects none of layers.0.attention"),
        (["--engine", "deepspeed", "--max-new-tokens", "512"], "the model has 512 positions"),
        (["--trust-remote-code"], "leave --trust-remote-code and --allow-pickled-weights out"),
        (["--tp", "3"], "TP=3 does not divide 8 attention heads"),
        (["--tp", "3"], "possible TP sizes: 1, 2, 4, 8"),
        (["--tp", "1"], "nothing to compress"),
        (["--model", "/nowhere"], "model folder /nowhere does not exist"),
        (["--model", "BERT"], "model_type 'bert' is not supported"),
        (["--text", "/nowhere.txt"], "--text /nowhere.txt cannot be read"),
        (["--prompts", "/nowhere.txt"], "--prompts /nowhere.txt cannot be read"),
        (["--prompts", "/dev/null"], "--prompts /dev/null is empty"),
        (["--prompt", " "], "--prompt is empty"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--temperature", "-1"], "--temperature is -1.0: give 0 for greedy"),
        (["--top-k", "5", "--top-p", "0.5"], "exclude each other"),
        (["--timeout", "0"], "--timeout is 0"),
        (
            ["--comm-sites", "layers.*.moe"],
            "--comm-sites layers.*.moe selects none of layers.0.attention, layers.0.mlp",
        ),
        (["--tp", "0"], "--tp is 0"),
        (["--model", __file__], "is a file; give the folder"),
        (["--timeout", "inf"], "--timeout is inf"),
        (["--seed", "-1"], "--seed is -1"),
        (["--json", "/nowhere/out.json"], "there is no folder /nowhere"),
        (["--json", "/tmp"], "--json /tmp is a folder"),
        (["--temperature", "0", "--top-k", "5"], "--temperature 0 is greedy"),
        (["--max-new-tokens", "100000"], "positions for the prompt and the new tokens together: lower it"),
        (["--top-k", "100000"], "below the vocabulary size"),
        (["--comm-algorithm", "exact"], "compresses nothing: give --comm exact"),
        (["--comm", "exact", "--comm-min-bytes", "-7"], "min_bytes is -7"),
        (["--comm", "exact", "--comm-outer", "int3"], "--comm exact makes no use of --comm-outer int3: leave it out"),
        (["--comm-outer", "int3", "--comm-algorithm", "two-step"], "'two-step' makes no use of outer_spec='int3:g32'"),
    ],
)
def test_bad_input_is_one_line_with_the_remedy(arguments, message, capsys, tmp_path):
    if "BERT" in arguments:
        (tmp_path / "config.json").write_text(BERT)
        shutil.copy(BUNDLED / "model" / "model.safetensors", tmp_path)
        arguments = [str(tmp_path) if argument == "BERT" else argument for argument in arguments]
    assert main(["generate", *arguments]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and message in stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate", "--colour"], "unrecognized arguments: --colour"),
        (["generate", "--mod", "x"], "unrecognized arguments: --mod x"),
        (["generate", "--tp", "two"], "invalid int value: 'two'"),
        (["train"], "invalid choice: 'train'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_unknown_flags_and_commands(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    stderr = capsys.readouterr().err
    assert stop.value.code == 2 and stderr.count("\n") == 1 and message in stderr and "--help" in stderr


@pytest.mark.parametrize(
    "engine, missing, extra",
    [
        ("deepspeed", "deepspeed", "deepspeed"),
        ("transformers", "accelerate", "hf"),
        ("megatron", "megatron", "megatron"),
    ],
)
def test_a_missing_framework_is_named_with_its_extra(engine, missing, extra, monkeypatch, capsys):
    from megatron_lowbit.engines import registry

    monkeypatch.setattr(registry, "find_spec", lambda name: None if name == missing else name)
    assert main(["generate", "--engine", engine]) == 2
    assert f"engine {engine} needs {missing}: pip install 'megatron-lowbit[{extra}]'" in capsys.readouterr().err


def test_deepspeeds_launcher_puts_a_flag_in_front(capsys):
    assert main(["--local_rank=1", "generate", "--comm", "int9"]) == 2
    assert "unknown codec 'int9'" in capsys.readouterr().err


def test_a_launcher_with_another_number_of_ranks(monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert main(["generate", "--tp", "2"]) == 2
    assert "--tp is 2, but the launcher started 4 ranks: start 2, or give --tp 4" in capsys.readouterr().err


def test_a_calibration_of_other_ranks_or_another_model_is_refused_before_any_rank_starts(tmp_path, capsys):
    sites = [f"layers.{layer}.{kind}" for layer in range(6) for kind in ("attention", "mlp")]
    calibration = random_calibration(sites, 2, 256, "1/64")
    other = Calibration(calibration.ranges, calibration.outliers, calibration.fraction, {"fingerprint": "0" * 64})
    for name, which in (
        ("right", calibration),
        ("other", other),
        ("few", random_calibration(sites[:5], 2, 256, "1/64")),
    ):
        which.save(tmp_path / name)
    for name, tp, message in (
        ("right", "4", "was made for TP 2, this group has 4 ranks: run calibrate --tp 4"),
        ("other", "2", "was made for another model"),
        ("few", "2", "lacks layers.2.mlp, layers.3.attention, layers.3.mlp and 4 more"),
    ):
        arguments = ["--comm", "selective4", "--comm-calibration", str(tmp_path / name), "--tp", tp]
        assert main(["generate", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_errors_found_inside_the_ranks_are_said_once(tmp_path):
    prompts = tmp_path / "long.txt"
    prompts.write_text("the old house " * 300)
    done = run("--prompts", str(prompts), "--comm-sites", "layers.*.mlp")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "shorten the prompt or lower max_new_tokens" in errors[0]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_unexpected_error_names_its_rank(rank, monkeypatch, capsys):
    from megatron_lowbit.cli import generate

    def fail(arguments):
        raise MemoryError("no more")

    monkeypatch.setattr(generate, "run", fail)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert main(["generate"]) == 1
    assert (
        capsys.readouterr().err
        == f"error: rank {rank}: MemoryError: no more; run again with --debug for the traceback\n"
    )


@pytest.mark.parametrize(
    ("engine", "generating"), [("megatron", False), ("megatron", True), ("deepspeed", True), ("transformers", True)]
)
def test_ctrl_c_ends_at_once(engine, generating):
    """As from a terminal: the signal goes to every process of the group."""
    process = subprocess.Popen(
        [*COMMAND, "--engine", engine, "--max-new-tokens", "200"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    if generating:
        process.stdout.readline()
    else:
        while not _children(process.pid):
            time.sleep(0.05)
        time.sleep(1)  # in the middle of the ranks' imports
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "perplexity" not in stdout  # which comes when all texts are there
    assert "interrupted" in stderr and "Traceback" not in stderr and "most recent call" not in stderr, stderr


def test_debug_shows_the_traceback(capsys):
    assert main(["generate", "--debug", "--comm", "int9"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_help_has_examples(capsys):
    for arguments in (["--help"], ["generate", "--help"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "examples:" in capsys.readouterr().out


def test_agreement_counts_positions():
    assert agreement([(1, 2, 3)], [(1, 2, 4)]) == pytest.approx(2 / 3)
    assert agreement([(1, 2), (3,)], [(1, 2), (3, 4)]) == pytest.approx(3 / 4)
