"""`evaluate --report` as a user gives it, on the bundled model and text."""

import argparse
import html
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from megatron_lowbit.__main__ import main
from megatron_lowbit.cli.evaluate_page import command
from megatron_lowbit.cli.files import BUNDLED
from megatron_lowbit.errors import ModelError
from tests import evaluations

FAST = ["evaluate", "--windows", "2", "--window-length", "64", "--dtype", "fp32"]


def written(folder, *argv):
    """(exit code, text of the page without its elements)"""
    code = main([*FAST, "--report", str(folder), *argv])
    text = (folder / "index.html").read_text(encoding="utf-8")
    return code, html.unescape(re.sub(r"<[^>]*>", " ", text))


def test_writes_a_page_of_what_was_found(tmp_path, capsys):
    sites = tmp_path / "sites.json"
    assert main(["sensitivity", *FAST[1:], "--tp", "2", "--comm", "int4:g32", "--json", str(sites)]) == 0
    other = tmp_path / "other.txt"
    other.write_text("It was the best of houses, and the rain fell upon its roof for many a day. " * 60)
    argv = ["--tp", "2,4", "--comm", "selective4", "int8:g128", "int4:g32/int8:g128", "--calibration-text", str(other)]
    argv += ["--json", str(tmp_path / "all.json"), "--report-sensitivity", str(sites)]
    code, text = written(tmp_path / "page", *argv)
    assert code == 0 and f"report: {tmp_path}/page/index.html" in capsys.readouterr().out.replace("\n", "")
    for row in json.loads((tmp_path / "all.json").read_text())["rows"]:
        assert f" {row['kl_mean']:.5f} " in text and f" {row['loss']:+.2%} " in text
    for expected in (
        "costs in accuracy: model", "sample_text.txt", "2 windows are few",
        json.loads(sites.read_text())["explanation"].split("`")[0],
        "In two halves of 2 windows", "Of the calibration's outliers, which come from other text,",
        "--comm selective4 int8:g128 int4:g32/int8:g128 --calibration-text other.txt --json all.json "
        "--report-sensitivity sites.json",
    ):  # fmt: skip
        assert expected in text, expected
    assert str(tmp_path) not in text and str(BUNDLED) not in text


def test_a_gate_that_fails_leaves_a_page(tmp_path):
    code, text = written(tmp_path, "--comm", "int2:g32:sym", "--fail-above", "1%")
    assert code == 3 and "int2:g32:sym" in text and "Not measured." in text


def test_a_size_that_no_engine_runs_is_said_on_the_page(tmp_path):
    code, text = written(tmp_path, "--tp", "16", "--comm", "int8:g128")
    assert code == 0 and "Note: TP 16 divides the features of every site, but not 8 attention heads" in text


def test_a_page_that_fails_leaves_the_json(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise ModelError("a partial sum is not finite")

    monkeypatch.setattr("megatron_lowbit.evaluation.consistency.consistency", fail)
    argv = ["--comm", "int8", "--json", str(tmp_path / "all.json"), "--report", str(tmp_path / "page")]
    assert main([*FAST, *argv]) == 2 and "a partial sum is not finite" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "all.json").read_text())["rows"]) == 1


def test_the_command_names_files_but_not_where_they_are():
    argv = ["evaluate", "--text=/home/me/a b.txt", "--model", "../models/small/", "--comm", "int4:g32/int8:g128"]
    argv += ["--comm-plan", "/x/p.json", "--comm-plan", "q.json", "--trust-remote-code"]
    values = {"text": Path("/home/me/a b.txt"), "model": Path("../models/small/"), "comm": ["int4:g32/int8:g128"]}
    values |= {"comm_plan": [Path("/x/p.json"), Path("q.json")], "argv": argv, "tp": [2]}
    assert command(argparse.Namespace(**values)) == (
        "megatron-lowbit evaluate '--text=a b.txt' --model small --comm int4:g32/int8:g128 --comm-plan p.json "
        "--comm-plan q.json --trust-remote-code"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no --json of sensitivity"),
        ("[", "is no --json of sensitivity"),
        ("[]", "is no --json of sensitivity"),
        (json.dumps(evaluations.sensitivity() | {"rows": []}), "there are no rows"),
        (json.dumps(evaluations.sensitivity() | {"kl_all": "much"}), "kl_all is 'much'"),
        (json.dumps(evaluations.sensitivity()), "is of another model"),
    ],
)
def test_refuses_what_is_no_sensitivity(content, message, tmp_path, capsys):
    path = tmp_path / "sites.json"
    if content is not None:
        path.write_text(content)
    assert main([*FAST, "--report", str(tmp_path / "page"), "--report-sensitivity", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --report-sensitivity") and message in error
    assert not (tmp_path / "page").exists()


def test_refuses_what_could_not_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    for argv, message in {
        ("--report", str(tmp_path / "file")): "is a file: give a folder",
        ("--report", str(tmp_path / "no" / "page")): "there is no folder",
        ("--report-sensitivity", "sites.json"): "give --report DIR as well",
    }.items():
        assert main([*FAST, *argv]) == 2
        assert message in capsys.readouterr().err
