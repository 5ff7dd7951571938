"""The benchmark on a link as its user starts it, with messages so small that it takes seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import link as link_benchmark  # noqa: E402
import shaped_network  # noqa: E402


def link(tmp_path, *argv: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "link.py"), "--repeats", "3", "--json", str(tmp_path / "link.json")]
    environment = os.environ | environment
    return subprocess.run([*command, *argv], capture_output=True, text=True, timeout=200, env=environment)


def test_every_operation_in_turn(tmp_path):
    argv = ["--bytes", "16384", "1048576", "--comm", "int4:g32", "--algorithm", "auto", "gate"]
    done = link(tmp_path, *argv, LOWBIT_LINK="medium")  # which else is measured, and a busy machine looks slower
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "link.json").read_text())["rows"]
    found = {(row["bytes"], row["spec"], row["algorithm"]): row for row in rows}
    assert len(found) == len(rows) == 2 * (4 + 2)
    try:
        shaped_network.check()
        rate = 1.0
    except shaped_network.NetworkError:
        rate = None
        assert "measuring on loopback" in done.stderr
    for (nbytes, spec, algorithm), row in found.items():
        assert row["ranks"] == 2 and row["rate_gbit"] == rate and row["median_ms"] > 0
        exact = spec != "int4:g32" or (algorithm == "gate" and nbytes < 1 << 18)
        assert row["path"] == ("exact" if exact else "one-shot")
        sent = nbytes * (5 / 16 if not exact else 2 if spec == "fp32" else 1)
        assert row["bytes_sent"] == pytest.approx(sent, rel=1e-3)  # each chunk's wire is whole words
        assert row["wire_ms"] == (pytest.approx(row["bytes_sent"] * 8e-6 / rate) if rate else None)
        base = found[nbytes, "bf16", "exact"]["median_ms"]
        assert row["ratio_to_gloo_bf16"] == pytest.approx(base / row["median_ms"])


def test_two_nodes_of_two_ranks(tmp_path):
    argv = ["--nodes", "2x2", "--rate-gbit", "2", "--outer-gbit", "0.5", "--bytes", "65536", "--comm", "int4:g32"]
    done = link(tmp_path, *argv, "--algorithm", "auto", "two-step", "--outer", "int2:g32")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "link.json").read_text())["rows"]
    found = {row["spec"] if row["path"] == "exact" else row["algorithm"]: row for row in rows}
    assert len(found) == len(rows) == 3 + 3 and all(row["ranks"] == 4 and row["nodes"] == 2 for row in rows)
    assert found["auto"]["path"] == found["hierarchical int2:g32"]["path"] == "hierarchical"  # not one-shot in disguise
    assert found["two-step"]["path"] == "two-step" and found["bf16"]["path"] == "exact"
    message = 65536 * 5 / 16  # encoded
    assert found["bf16"]["uplink_bytes"] == 65536 * 3 / 2
    assert found["two-step"]["uplink_bytes"] == 2 * message
    assert found["auto"]["uplink_bytes"] == message
    assert found["hierarchical int2:g32"]["uplink_bytes"] == message * 3 / 5
    assert found["auto"]["bytes_sent"] == found["two-step"]["bytes_sent"] == message * 3 / 2
    assert found["hierarchical int2:g32"]["bytes_sent"] == message / 2 + message * 3 / 5
    if found["bf16"]["rate_gbit"]:
        assert found["auto"]["wire_ms"] == pytest.approx(message * 8e-6 / 0.5)
        assert found["auto"]["outer_gbit"] == 0.5
    else:
        assert "measuring on loopback" in done.stderr


def test_what_are_no_nodes(tmp_path):
    done = link(tmp_path, "--nodes", "two")
    assert done.returncode == 2 and "'two' is no number of nodes and of ranks on each, such as 2x3" in done.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--comm", "int9"], "int9"),
        (["--outer", "int9"], "int9"),
        (["--ranks", "1"], "--ranks 1: it must be at least 2"),
        (["--bytes", "0"], "--bytes 0: it must be at least 2"),
        (["--repeats", "0"], "--repeats 0: it must be at least 1"),
        (["--rate-gbit", "1", "0"], "--rate-gbit 0: a rate is above 0"),
        (["--delay-ms", "-1"], "--delay-ms -1: a delay is not negative"),
        (["--algorithm", "three-step"], "--algorithm three-step: use gate or one of auto, one-shot"),
    ],
)
def test_bad_input_is_an_error_and_no_traceback(argv, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["link.py", *argv])
    monkeypatch.setattr(shaped_network, "run_ranks", lambda *_: pytest.fail("ranks were started"))
    assert link_benchmark.main() == 1
    assert "error: " in (said := capsys.readouterr().err) and message in said
