"""The command as a user gives it, on the bundled model and text."""

import json

import pytest

from megatron_lowbit.__main__ import main
from tests import hf_folders

FAST = ["--windows", "2", "--window-length", "48", "--dtype", "fp32", "--tp", "4"]


def sensitivity(*argv: str) -> int:
    return main(["sensitivity", *FAST, *argv])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sensitivity")
    argv = ["--comm", "int2:g32", "--progress", str(folder / "progress.safetensors")]
    assert sensitivity(*argv, "--json", str(folder / "a.json"), "--plot", str(folder / "a.png")) == 0
    return folder, argv, json.loads((folder / "a.json").read_text())


def test_the_json_is_as_documented(results):
    folder, _, found = results
    assert (found["spec"], found["tp"], found["algorithm"], found["windows"]) == ("int2:g32", 4, "two-step", 2)
    assert found["model"] == "model" and len(found["rows"]) == 12
    assert sum(row["share"] for row in found["rows"]) == pytest.approx(1)
    assert all(row["kl_mean"] > 1e-4 and 3 < row["sqnr_db"] < 8 for row in found["rows"])
    assert found["kl_sum"] == pytest.approx(sum(row["kl_mean"] for row in found["rows"]))
    assert 0.5 < found["kl_sum"] / found["kl_all"] < 2 and abs(found["kl_floor"]) < 1e-5
    assert "megatron-lowbit plan" in found["explanation"]
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")


def test_goes_on_where_it_stopped(results, monkeypatch):
    folder, argv, found = results
    monkeypatch.setattr("megatron_lowbit.evaluation.run.compare", None)  # nothing is left to do
    assert sensitivity(*argv, "--json", str(folder / "b.json")) == 0
    assert json.loads((folder / "b.json").read_text())["rows"] == found["rows"]


def test_by_kind_of_some_sites(results, capsys):
    folder, argv, _ = results
    more = ["--by", "kind", "--comm-sites", "layers.[01].*", "--json", str(folder / "c.json")]
    assert sensitivity(*argv, *more) == 0
    rows = json.loads((folder / "c.json").read_text())["rows"]
    assert [(row["site"], row["layer"], row["features"]) for row in rows] == [
        ("attention", None, 512), ("mlp", None, 512)
    ]  # fmt: skip
    assert "KL divergence" in capsys.readouterr().out


def test_one_window_has_no_errors_and_a_page_takes_them(tmp_path):
    path, comm = tmp_path / "a.json", ["--comm", "int2:g32", "--windows", "1"]
    assert sensitivity(*comm, "--comm-sites", "layers.0.*", "--json", str(path)) == 0
    rows = json.loads(path.read_text(), parse_constant=pytest.fail)["rows"]
    assert [row["kl_error"] for row in rows] == [None, None]
    page = ["--report", str(tmp_path / "page"), "--report-sensitivity", str(path)]
    assert main(["evaluate", *FAST, *comm, *page]) == 0 and (tmp_path / "page" / "index.html").exists()


def test_both_halves_of_a_model(tmp_path):
    folder, path = hf_folders.save("t5", tmp_path / "model"), tmp_path / "result.json"
    argv = ["--model", str(folder), "--comm", "int2:g32", "--json", str(path), "--plot", str(tmp_path / "a.png")]
    assert sensitivity(*argv, "--by", "kind") == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["site"] for row in rows} == {
        "encoder.attention", "encoder.mlp", "attention", "cross_attention", "mlp"
    }  # fmt: skip
    assert all(row["kl_mean"] > 0 for row in rows)


def test_says_that_no_engine_runs_a_size(results, tmp_path, capsys):
    argv = ["--tp", "16", "--comm", "int2:g32", "--by", "kind", "--json", str(tmp_path / "d.json")]
    assert sensitivity(*argv) == 0
    [note] = json.loads((tmp_path / "d.json").read_text())["notes"]
    assert "but not 8 attention heads" in note and f"note: {note}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tp", "1"], "--tp is 1"),
        (["--tp", "3"], "TP=3 does not divide"),
        (["--comm", "int9"], "int9"),
        (["--comm", "exact"], "compresses nothing"),
        (["--comm", "selective4"], "needs a calibration at TP 4"),
        (["--algorithm", "ring"], "'ring'"),
        (["--algorithm", "exact"], "'exact'"),
        (["--comm-sites", "nothing.*"], "selects none of"),
        (["--windows", "9999"], "and 9999 windows of 48 need"),
        (["--plot", "/nowhere/x.png"], "there is no folder"),
    ],
)
def test_refuses(argv, message, capsys):
    assert sensitivity(*argv) == 2
    error = capsys.readouterr().err
    assert "error: " in error and message in error and "Traceback" not in error


def test_an_encoder_decoder_has_sites_in_both_halves(tmp_path):
    path = tmp_path / "result.json"
    assert sensitivity("--model", str(hf_folders.save("t5", tmp_path / "model")), "--json", str(path)) == 0
    rows = {row["site"]: row for row in json.loads(path.read_text())["rows"]}
    assert len(rows) == 10 and {"encoder.layers.0.mlp", "layers.1.cross_attention"} < set(rows)
    assert all(row["sqnr_db"] > 10 for row in rows.values())
