"""`evaluate --tasks` as a user gives it, on the bundled model and text, without a network."""

import json
import socket

import pytest

from megatron_lowbit.__main__ import main
from megatron_lowbit.errors import ConfigError
from megatron_lowbit.evaluation import harness
from tests import hf_folders

FAST = ["--windows", "2", "--window-length", "64", "--dtype", "fp32", "--tp", "8"]
LOCAL = ["--tasks", "local_cloze,local_choice", "--task-limit", "6"]
SPECS = ["fp32", "int2:g32:sym"]


def evaluate(*argv: str) -> int:
    return main(["evaluate", *FAST, *argv])


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refused(*args, **options):
        raise OSError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    argv = [*LOCAL, "--comm", *SPECS, "--progress", str(folder / "p.safetensors")]
    assert evaluate(*argv, "--json", str(folder / "all.json")) == 0
    return folder, argv, json.loads((folder / "all.json").read_text())


def test_the_json_is_as_documented(results):
    found = results[2]
    assert found["tasks_text"] == "sample_text.txt" and found["tasks_text_sha256"] == found["text_sha256"]
    assert found["task_limit"] == 6 and found["lm_eval"] == harness.installed()
    rows = found["tasks"]
    assert {(row["task"], row["metric"]) for row in rows} == {
        ("local_cloze", "acc"), ("local_cloze", "perplexity"), ("local_choice", "acc"), ("local_choice", "acc_norm"),
    }  # fmt: skip
    assert len(rows) == 8 and len(found["rows"]) == 2
    for row in rows:
        assert (row["tp"], row["algorithm"], row["samples"]) == (8, "two-step", 6) and row["spec"] in SPECS
        assert row["change"] == pytest.approx(row["value"] - row["exact"])
        low, high = row["change_interval"]
        assert low <= row["change"] <= high and 0 < row["p_value"] <= 1


def test_passing_values_on_is_told_from_a_bad_spec(results):
    good, bad = (
        {(row["task"], row["metric"]): row for row in results[2]["tasks"] if row["spec"] == spec} for spec in SPECS
    )
    for key, row in good.items():
        assert row["change"] == (pytest.approx(0, abs=0.1) if row["kind"] == "perplexity" else 0), key
    cloze = "local_cloze", "perplexity"
    assert abs(bad[cloze]["change"]) > 100 * abs(good[cloze]["change"])


def test_goes_on_where_it_stopped(results, monkeypatch, capsys):
    folder, argv, found = results
    monkeypatch.setattr(harness.Harness, "scores", None)  # nothing is left to ask
    assert evaluate(*argv, "--json", str(folder / "again.json")) == 0
    assert json.loads((folder / "again.json").read_text())["tasks"] == found["tasks"]
    out = capsys.readouterr().out
    assert "local_choice acc: 6 questions leave changes of ±" in out and "local_cloze perplexity" in out
    assert evaluate(*argv[:3], "5", *argv[4:]) == 2
    assert "its task_limit is 6, now 5" in capsys.readouterr().err


def test_what_cannot_be_had_costs_nothing_else(results, tmp_path, monkeypatch, capsys):
    """arc_easy's data are not here."""
    argv = results[1]
    for module in ("huggingface_hub.constants", "datasets.config"):  # as HF_HUB_OFFLINE=1 does: no second attempts
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    path = tmp_path / "some.json"
    argv = ["--tasks", "arc_easy,local_choice", *argv[2:]]
    assert evaluate(*argv, "--json", str(path)) == 2
    captured = capsys.readouterr()
    assert "error: the task arc_easy cannot be loaded (" in captured.err and "Traceback" not in captured.err
    assert "local_choice" in captured.out
    rows = json.loads(path.read_text())
    assert len(rows["rows"]) == 2 and {row["task"] for row in rows["tasks"]} == {"local_choice"}


def test_nothing_is_left_on_disk(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert evaluate("--tasks", "local_cloze", "--task-limit", "2", "--comm", "int8:g128") == 0
    assert not list(tmp_path.glob("megatron-lowbit-tasks-*"))
    shown = capsys.readouterr().err
    assert "pretrained" not in shown and "loglikelihood" not in shown  # lm_eval's own words


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks", "local_cloz"], "--tasks has 'local_cloz', which lm_eval"),
        (["--task-limit", "5"], "--task-limit is for --tasks"),
        (["--batch-size", "5"], "--batch-size is for --tasks"),
        ([*LOCAL, "--batch-size", "0"], "--batch-size is 0"),
        ([*LOCAL[:3], "0"], "--task-limit is 0"),
        (["--tasks", "arc_easy", "--tasks-text", "x.txt"], "is for local_cloze and local_choice"),
        ([*LOCAL, "--tasks-text", "nowhere.txt"], "--tasks-text nowhere.txt cannot be read"),
        ([*LOCAL, "--tasks-text", "SHORT"], "the text has no question for local_cloze"),
        (
            [*LOCAL, "--tasks-text", "OTHER", "--calibration-text", "OTHER", "--comm", "selective4"],
            "the text of the tasks",
        ),
    ],
)
def test_refuses(argv, message, capsys, tmp_path):
    (tmp_path / "SHORT").write_text("It is short.")
    (tmp_path / "OTHER").write_text("It was the best of houses, and the rain fell upon its roof for many a day. " * 60)
    argv = [str(tmp_path / arg) if arg in ("SHORT", "OTHER") else arg for arg in argv]
    assert evaluate(*argv) == 2
    error = capsys.readouterr().err
    assert "error: " in error and message in error and "Traceback" not in error


def test_refuses_models_that_continue_nothing(tmp_path, capsys):
    assert evaluate("--model", str(hf_folders.save("bert", tmp_path / "model")), "--tasks", "local_cloze") == 2
    assert "--tasks asks models that continue a text" in capsys.readouterr().err


def test_says_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--tasks needs lm_eval: pip install 'megatron-lowbit\[eval\]'"):
        harness.check_installed()
