"""The benchmark of evaluating, from end to end; how long anything takes is not for a test to say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
def test_every_spec_is_measured(tmp_path):
    pytest.importorskip("transformers")
    path = tmp_path / "evaluating.json"
    command = [sys.executable, str(BENCHMARKS / "evaluating.py"), "--windows", "1", "--repeats", "1"]
    subprocess.run([*command, "--json", str(path)], check=True, timeout=300, capture_output=True)
    written = json.loads(path.read_text())
    assert len(written["rows"]) == 5 * 3 * 2 and all(row["ratio"] > 0 for row in written["rows"])
    assert {row["spec"] for row in written["rows"]} >= {"int4:g32", "gauss4:g128:trellis", "selective4"}
