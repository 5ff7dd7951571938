"""The benchmark of the patch's overhead, from end to end; how long anything takes is not for a test to say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
def test_every_route_is_measured_and_undone(tmp_path):
    pytest.importorskip("megatron.core")
    path = tmp_path / "overhead.json"
    command = [sys.executable, str(BENCHMARKS / "megatron_overhead.py"), "--repeats", "20", "--json", str(path)]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    written = json.loads(path.read_text())
    assert [row["route"] for row in written["rows"]] == ["one model", "process-wide"]
    assert all(row["original_is_back"] and row["compressed_us"] > 0 for row in written["rows"])
    assert str(tmp_path) not in written["machine"]["command"]
