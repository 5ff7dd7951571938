"""The command as a user gives it; inside ranks it is called as their launcher would."""

import contextlib
import io
import json
import os
import socket
from dataclasses import replace
from unittest import mock

import pytest
import torch.distributed as dist

pytest.importorskip("rich")

from megatron_lowbit import tuned_lookup
from megatron_lowbit.__main__ import main
from megatron_lowbit.cli import launch
from megatron_lowbit.cli.tune import with_others
from megatron_lowbit.tuned_table import TunedTable
from tests.launched import launched
from tests.ranks import run_ranks
from tests.tuned_tables import KEY, table


def _command(*argv):
    """(exit code, what it printed)"""
    out, err = io.StringIO(), io.StringIO()
    with launched(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["tune", *argv])
    dist.barrier()
    return code, out.getvalue(), err.getvalue()


SHORT = ("--bytes", "16384", "262144", "--budget-seconds", "600")


def _tune(rank, world, folder):
    os.environ["XDG_CACHE_HOME"] = folder
    first = _command("--comm", "int4:g32", *SHORT)
    second = _command("--comm", "int8:g128", "--dtype", "fp32", *SHORT)
    named = _command("--comm", "int4:g32", *SHORT, "--out", f"{folder}/own.json", "--json")
    return [list(each) for each in (first, second, named)]


def test_writes_where_later_runs_look_and_keeps_what_an_earlier_run_found(tmp_path):
    (first, second, named), *others = run_ranks(2, _tune, str(tmp_path))
    for other in others:
        assert [each[:2] for each in other] == [[0, ""]] * 3, f"only rank 0 speaks: {other}"
    (file,) = (tmp_path / "megatron_lowbit/tuned").iterdir()
    made = TunedTable.load(file)
    assert list(made.rows) == [("int4:g32", "bf16"), ("int8:g128", "fp32")]
    assert first[0] == 0 and f"written to {file}: used from now on by such ranks" in first[1]
    assert "modelled: cpu, True, 2 in 1" in first[1] and "int4:g32, bf16" in first[1] and "262,144" in first[1]
    assert "kept there: int4:g32 bf16" in second[1] and "tuned" in first[2]
    found = json.loads(named[1])
    own = TunedTable.load(tmp_path / "own.json").as_json()
    assert {name: found[name] for name in own} == own
    assert found["file"] == str(tmp_path / "own.json") and found["not_measured"] == []


def _too_short(rank, world, folder):
    os.environ["XDG_CACHE_HOME"] = folder
    ticks = iter(range(10**9))
    with mock.patch("megatron_lowbit.tuning.tuner.time.monotonic", lambda: float(next(ticks))):
        sizes = ("--bytes", "16384", "65536", "262144")
        return list(_command("--comm", "int4:g32", "int8:g128", *sizes, "--budget-seconds", "90"))


def test_says_what_was_not_measured(tmp_path):
    (code, out, _), _ = run_ranks(2, _too_short, str(tmp_path))
    assert code == 0 and "not measured, as the time was over: int8:g128 bf16, " in out and "262,144 bytes" in out


def test_only_a_table_that_still_fits_is_added_to(tmp_path):
    path = tmp_path / "a.json"
    new, old = table({4096: "exact"}), table({4096: "one-shot/1"}, spec="int8:g128")
    assert with_others(new, path) == (new, None)
    old.save(path)
    whole, said = with_others(new, path)
    assert list(whole.rows) == [("int8:g128", "bf16"), ("int4:g32", "bf16")] and said == "kept there: int8:g128 bf16"
    replace(old, key=replace(KEY, versions={"torch": "1.0"})).save(path)
    whole, said = with_others(new, path)
    assert whole is new and "replaced what was there" in said and "made with torch 1.0, this is 2.13.0" in said
    path.write_text("something else")
    assert "cannot be read" in with_others(new, path)[1]
    table({4096: "two-step/1"}).save(path)
    assert with_others(new, path) == (new, None)  # of the same spec: measured anew


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--comm", "int1"], "unknown codec 'int1'"),
        (["--tp", "1"], "1 rank has nothing to communicate: start 2 or more"),
        (["--tp", "0"], "0 rank has nothing to communicate"),
        (["--bytes", "1"], "size 1: give bytes of messages"),
        (["--budget-seconds", "0"], "a budget of 0.0 s: give seconds"),
        (["--budget-seconds", "nan"], "a budget of nan s"),
        (["--timeout", "-1"], "--timeout is -1.0"),
        (["--out", "absent/a.json"], "--out absent/a.json: there is no folder"),
        (["--out", "."], "--out . is a folder"),
    ],
)
def test_wrong_arguments_are_said_in_one_line(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(launch, "start_ranks", None)  # it does not come to that
    assert main(["tune", *argv]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr and stderr.count("\n") == 1


def test_starts_ranks_where_no_launcher_did(monkeypatch):
    started = []
    monkeypatch.setattr(launch, "start_ranks", lambda ranks, argv, debug: started.append((ranks, argv)) or 0)
    assert main(["tune", "--tp", "3"]) == 0 and main(["tune"]) == 0
    assert started == [(3, ["tune", "--tp", "3"]), (2, ["tune"])]


@pytest.mark.parametrize("command", ["tune", "doctor"])
def test_a_rank_that_never_comes_is_an_error_and_no_hang(command, capsys, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    facts = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in facts.items():
        monkeypatch.setenv(name, value)
    assert main([command, "--timeout", "1"]) == 2
    stderr = capsys.readouterr().err
    assert f"rank 0 did not meet all 2 ranks at 127.0.0.1:{port} within 1 s: look whether all were started" in stderr


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["tune", "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "torchrun --nnodes 2" in out and "--budget-seconds" in out
    assert tuned_lookup.NONE in out
