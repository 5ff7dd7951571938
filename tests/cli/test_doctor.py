"""What the doctor finds, and that it says so when something is wrong."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_lowbit import handshake, tuned_lookup
from megatron_lowbit.__main__ import main
from megatron_lowbit.cli import doctor
from megatron_lowbit.codecs import backend
from tests.launched import launched
from tests.ranks import run_ranks
from tests.tuned_tables import table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "SECONDS", 0.001)
    for name in doctor.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(backend, "_chosen", {})


def found(capsys, code=0) -> dict:
    """(topic, name) -> (value, problem)"""
    assert main(["doctor", "--json"]) == code
    read = json.loads(capsys.readouterr().out)
    assert read["healthy"] == (code == 0)
    return {(each["topic"], each["name"]): (each["value"], each["problem"]) for each in read["findings"]}


def test_a_healthy_machine(capsys):
    findings = found(capsys)
    assert all(problem is None for _, problem in findings.values())
    assert findings["packages", "torch"][0] == torch.__version__
    assert findings["codecs", "on cpu"][0] == f"{backend.of(torch.device('cpu'))}, the default"
    assert "GB/s" in findings["codecs", "int4:g32 on cpu"][0] and "gloo" in findings["machine", "transports"][0]
    assert findings["machine", "cpu"][0].endswith(f"{os.cpu_count()} cores")
    assert findings["tuned tables", "none"][0].endswith("'megatron-lowbit tune' measures")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("packages\n") and out.endswith("no problems\n") and "on cpu " in out


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("LOWBIT_BACKEND", "cuda", "LOWBIT_BACKEND='cuda' is unknown: use one of reference, numba, triton"),
        ("LOWBIT_CHECK", "yes", "LOWBIT_CHECK='yes' is unknown: set it to 1 or 0"),
        ("LOWBIT_LINK", "quick", "link 'quick' is unknown: use one of"),
        ("LOWBIT_TRANSPORT", "udp", "LOWBIT_TRANSPORT='udp' is unknown: use tcp or torch"),
        ("LOWBIT_TUNED", "absent.json", "there is no tuned table absent.json: make one with"),
        ("LOWBIT_BAKEND", "numba", "LOWBIT_BAKEND is unknown: unset it; there are LOWBIT_BACKEND, "),
    ],
)
def test_settings_that_nobody_understands(name, value, message, capsys, monkeypatch):
    monkeypatch.setenv(name, value)
    shown, problem = found(capsys, code=1)["settings", name]
    assert shown == repr(value) and message in problem
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert f"PROBLEM: {message}" in out and ("1 problem\n" in out or "2 problems\n" in out)


def test_settings_that_are_fine(capsys, monkeypatch):
    for name, value in {"LOWBIT_BACKEND": "reference", "LOWBIT_CHECK": "1", "LOWBIT_TUNED": "none"}.items():
        monkeypatch.setenv(name, value)
    findings = found(capsys)
    assert findings["codecs", "on cpu"] == ("reference, as LOWBIT_BACKEND asks", None)
    assert findings["settings", "LOWBIT_CHECK"] == ("'1'", None)


def test_without_numba_the_codecs_are_slow_and_that_is_a_problem(capsys, monkeypatch):
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    value, problem = found(capsys, code=1)["codecs", "on cpu"]
    assert value.startswith("reference") and "pip install 'megatron-lowbit[cpu]'" in problem


def test_tuned_tables_and_whether_they_fit(capsys):
    folder = tuned_lookup.folder()
    folder.mkdir(parents=True)
    here = tuned_lookup.key_of(torch.device("cpu"), 4, (2, 2), "gloo", handshake.PROTOCOL)
    keys = {
        "fits": here,
        "stale": replace(here, versions=dict(here.versions) | {"torch": "1.0"}),
        "foreign": replace(here, device="an abacus", backend="nccl"),
    }
    for name, key in keys.items():
        table({4096: "exact"}, key).save(folder / f"{name}.json")
    (folder / "damaged.json").write_text("{")
    findings = found(capsys)  # of these none is needed
    assert findings["tuned tables", "fits.json"][0] == "fits groups of 4 ranks (by node: 2 + 2): int4:g32 bf16"
    assert "made with torch 1.0, this is" in findings["tuned tables", "stale.json"][0]
    assert "made for device an abacus, this is" in findings["tuned tables", "foreign.json"][0]
    assert "cannot be read" in findings["tuned tables", "damaged.json"][0]


def test_it_imports_nothing_that_it_reports_on():
    """So it also runs where nothing but torch is installed: what others import on their way is none of its business."""
    code = """
        import sys
        from megatron_lowbit.__main__ import main
        code = main(["doctor"])
        heavy = {"transformers", "deepspeed", "accelerate", "matplotlib", "rich", "safetensors"}
        print(code, sorted(heavy & sys.modules.keys()))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


def _examined(rank, world, folder):
    os.environ["XDG_CACHE_HOME"] = folder
    doctor.SECONDS = 0.001
    if rank:
        os.environ["LOWBIT_CHEK"] = "1"
    import contextlib
    import io

    out = io.StringIO()
    with launched(), contextlib.redirect_stdout(out):
        code = main(["doctor"])
    return [code, out.getvalue()]


def test_under_a_launcher_the_links_too(tmp_path):
    (code, out), (other, nothing) = run_ranks(2, _examined, str(tmp_path))
    assert "2 ranks (by node: 2), gloo" in out and "Gbit/s per rank" in out and "modelled: cpu, True, 2 in 1" in out
    assert nothing == "" and (code, other) == (1, 1)
    assert "rank 1 " in out and "PROBLEM: LOWBIT_CHEK is unknown" in out  # which rank 0 has not


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    assert "megatron-lowbit doctor --json" in capsys.readouterr().out


def test_gpus_and_how_they_reach_each_other(monkeypatch):
    """Of a machine that is made up: two pairs of GPUs with a bridge each."""
    facts = SimpleNamespace(name="NVIDIA L40S", total_memory=48 << 30, major=8, minor=9)
    for name, answer in {
        "is_available": lambda: True,
        "device_count": lambda: 4,
        "get_device_properties": lambda index: facts,
        "can_device_access_peer": lambda one, other: one // 2 == other // 2,
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    findings = {each.name: each.value for each in doctor.machine()}
    assert findings["gpu 3"] == "NVIDIA L40S, 48 GiB, compute capability 8.9"
    assert (findings["peer access"], findings["symmetric memory"]) == ("4 of 12 pairs of GPUs", "not possible")
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: True)
    findings = {each.name: each.value for each in doctor.machine()}
    assert (findings["peer access"], findings["symmetric memory"]) == ("12 of 12 pairs of GPUs", "possible")
