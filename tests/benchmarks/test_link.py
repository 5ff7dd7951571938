"""The benchmark on a link as its user starts it, with messages so small that it takes seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import shaped_network  # noqa: E402


def link(tmp_path, *argv: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "link.py"), "--repeats", "3", "--json", str(tmp_path / "link.json")]
    environment = os.environ | environment
    return subprocess.run([*command, *argv], capture_output=True, text=True, timeout=200, env=environment)


def test_every_operation_in_turn(tmp_path):
    done = link(tmp_path, "--bytes", "16384", "262144", "--comm", "int4:g32", "--algorithm", "auto", "gate")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "link.json").read_text())["rows"]
    found = {(row["bytes"], row["spec"], row["algorithm"]): row for row in rows}
    assert len(found) == len(rows) == 2 * (3 + 2)
    try:
        shaped_network.check()
        rate = 1.0
    except shaped_network.NetworkError:
        rate = None
        assert "measuring on loopback" in done.stderr
    for (nbytes, spec, algorithm), row in found.items():
        assert row["ranks"] == 2 and row["rate_gbit"] == rate and row["median_ms"] > 0
        exact = spec != "int4:g32" or (algorithm == "gate" and nbytes < 1 << 17)
        assert row["path"] == ("exact" if exact else "one-shot")
        sent = nbytes * (5 / 16 if not exact else 2 if spec == "fp32" else 1)
        assert row["bytes_sent"] == pytest.approx(sent)
        assert row["wire_ms"] == (pytest.approx(sent * 8e-6 / rate) if rate else None)
        base = found[nbytes, "bf16", "exact"]["median_ms"]
        assert row["ratio_to_gloo_bf16"] == pytest.approx(base / row["median_ms"])
