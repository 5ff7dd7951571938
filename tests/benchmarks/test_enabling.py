"""The benchmark of enabling, from end to end; how long anything takes is not for a test to say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
def test_both_frameworks_are_measured(tmp_path):
    pytest.importorskip("deepspeed")
    path = tmp_path / "enabling.json"
    command = [sys.executable, str(BENCHMARKS / "enabling.py"), "--repeats", "3", "--json", str(path)]
    subprocess.run(command, check=True, timeout=200, capture_output=True)
    written = json.loads(path.read_text())
    assert [(row["framework"], row["sites"]) for row in written["rows"]] == [("deepspeed", 64), ("transformers", 64)]
    assert all(row["enable_ms"] > 0 for row in written["rows"])
    assert str(tmp_path) not in written["machine"]["command"]
