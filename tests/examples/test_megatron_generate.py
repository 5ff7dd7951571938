"""The example with the two lines: the same text as without them, and every reduce compressed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "megatron_generate.py"


def _run(*flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(SCRIPT)]
    done = subprocess.run(
        [*command, "--max-new-tokens", "12", *flags], capture_output=True, text=True, timeout=200, cwd=SCRIPT.parents[1]
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("\n\nlayers.")[0].strip(), done.stdout


@pytest.mark.slow
def test_two_lines_compress_and_the_text_stays():
    exact, shown = _run()
    assert exact.startswith("The old house stood alone upon the hill, and ") and "bytes" not in shown
    compressed, shown = _run("--lowbit-comm", "int8:g128", "--lowbit-comm-min-bytes", "0")
    assert compressed == exact
    sent = re.findall(r"^(layers\.\d\.\w+) +(\d+) bytes sent, +(\d+) in bf16, {'one-shot': 12}$", shown, re.MULTILINE)
    assert len(sent) == 12 and all(1.8 * int(ours) < int(plain) for _, ours, plain in sent)
