"""The example with the one call: text from every rank's part of the model, and every reduce compressed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "deepspeed_generate.py"


def _run(*command):
    return subprocess.run(
        [sys.executable, *command, "--max-new-tokens", "12"],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=SCRIPT.parents[1],
    )


@pytest.mark.slow
def test_one_call_compresses():
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(SCRIPT)]
    exact, compressed = _run(*ranks), _run(*ranks, "--comm", "int8:g128")
    assert exact.returncode == compressed.returncode == 0, exact.stderr + compressed.stderr
    prompt = "The old house stood alone upon the hill, and the house was "
    assert prompt in exact.stdout and prompt in compressed.stdout and "bytes" not in exact.stdout
    line = r"^(layers\.\d\.\w+) +(\d+) bytes sent, +(\d+) in bf16, {'one-shot': 12}$"
    sent = re.findall(line, compressed.stdout, re.MULTILINE)
    assert len(sent) == 12 and all(1.8 * int(ours) < int(plain) for _, ours, plain in sent)


def test_wants_torchrun():
    done = _run(str(SCRIPT))
    assert done.returncode == 2 and "start it with torchrun" in done.stderr
