"""The main job's figures: what `make demo` prints, kept with the machine they were measured on.

python benchmarks/demo.py --json benchmarks/results/demo.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import machine

ARGUMENTS = ["--compare", "--temperature", "0.6", "--top-k", "20"]  # as in the Makefile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "megatron_lowbit", "generate", *ARGUMENTS, "--json", file.name]
        subprocess.run(command, check=True)
        result = json.loads(Path(file.name).read_text())
    result["model"] = Path(result["model"]).name
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
