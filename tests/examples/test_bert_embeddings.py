"""The embeddings example: the sharded encoder agrees with the whole one, and fewer bits cost more."""

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "bert_embeddings.py"


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=SCRIPT.parents[1])


def test_compares_embeddings():
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(SCRIPT)]
    done = run(
        *ranks, "--engine", "deepspeed", "--spec", "int8:g128", "--spec", "int3:g128", "--text", "One.", "--text", "Two"
    )
    assert done.returncode == 0, done.stderr
    assert "A BERT with random weights" in done.stdout
    assert "2 sentences, deepspeed on 2 ranks, 8 sites a forward pass" in done.stdout
    rows = re.findall(r"^(exact|int\S+) +([\d.]+) +[\d.]+ +(\S+) +\S+ +(\S+)$", done.stdout, re.MULTILINE)
    assert [name for name, *_ in rows] == ["exact", "int8:g128", "int3:g128"]
    cosines, errors = ([float(row[at]) for row in rows] for at in (1, 2))
    assert errors[0] < 1e-5 < errors[1] < 0.01 < errors[2] < 0.5
    assert cosines[0] > 0.999999 and cosines[1] > 0.9999 and 0.9 < cosines[2] < cosines[1]
    assert rows[0][3] == "-" and 0.5 < float(rows[1][3]) < 0.55 and 0.18 < float(rows[2][3]) < 0.3


def test_wants_torchrun():
    done = run(sys.executable, str(SCRIPT))
    assert done.returncode == 2 and "start it with torchrun" in done.stderr
