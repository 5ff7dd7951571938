"""The accuracy table's command on the project's own text, as short as it gets."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import accuracy  # noqa: E402
import accuracy_tables  # noqa: E402

from megatron_lowbit.spec import parse  # noqa: E402


def test_every_family_on_the_projects_own_text(tmp_path):
    path = tmp_path / "accuracy.json"
    command = [sys.executable, str(BENCHMARKS / "accuracy.py"), "--tp", "2", "--json", str(path)]
    command += ["--windows", "2", "--window-length", "32"]
    subprocess.run(command, check=True, timeout=280, capture_output=True)
    found = json.loads(path.read_text())
    assert found["text"] == "sample_text.txt" and str(tmp_path) not in found["machine"]["command"]
    specs = [str(parse(spec)) for group in accuracy.FAMILIES.values() for spec in group]
    expected = {(s, algorithm) for s in specs if not parse(s).calibrated for algorithm in ("one-shot", "two-step")}
    rows = {(row["spec"], row["algorithm"]): row for row in found["rows"]}
    assert set(rows) == expected and {row["family"] for row in rows.values()} <= set(accuracy.FAMILIES)
    for algorithm in ("one-shot", "two-step"):
        divergence = [rows[spec, algorithm]["kl_mean"] for spec in accuracy_tables.PLAIN]  # from many bits to few
        assert divergence == sorted(divergence) and divergence[0] < 0.01 < 0.1 < divergence[-1]
    _, lines = accuracy_tables.losses(found["rows"])
    assert len(lines) == len(expected) // 2
