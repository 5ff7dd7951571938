"""What compression costs in scores of tasks: the two made of a text, question by question against the exact run.

`megatron-lowbit evaluate --tasks local_cloze,local_choice` of the specs below. selective4 is calibrated on the
project's own text; without --text it is left out, as it would be asked what it was calibrated on. An interrupted run
goes on where it stopped if there is a --progress file.

    python benchmarks/tasks.py --text held-out.txt --json benchmarks/results/tasks.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import save
from evaluation import evaluated

FACTS = ("model", "fingerprint", "text", "tasks_text_sha256", "dtype", "task_limit", "lm_eval")
SPECS = ["int8:g128", "int4:g32", "gauss4:g128:trellis", "selective4", "int2:g32:sym"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: the bundled one")
    parser.add_argument("--text", type=Path, help="default: the project's own")
    parser.add_argument("--tp", default="8")
    parser.add_argument("--windows", type=int, default=16, help="for perplexity, beside the tasks (default: 16)")
    parser.add_argument("--task-limit", type=int, default=500)
    parser.add_argument("--progress", type=Path, help="a file that keeps what was found")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    options = ("model", "text", "tp", "windows", "task_limit", "progress")
    found = evaluated(arguments, options, SPECS, ["--tasks", "local_cloze,local_choice"])
    losses = [
        {name: row[name] for name in ("spec", "tp", "bits_per_value", "loss", "kl_mean")} for row in found["rows"]
    ]
    save(arguments.json, found["tasks"], perplexity=losses, **{name: found[name] for name in FACTS})


if __name__ == "__main__":
    main()
