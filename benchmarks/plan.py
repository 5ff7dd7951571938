"""Plans under several budgets against the same spec everywhere, all on windows that nothing was chosen on.

`megatron-lowbit plan` for each budget, then `evaluate`'s figures for the specs of at most a plan's bits. An interrupted
run goes on where it stopped if it keeps its --progress.

    python benchmarks/plan.py --text held-out.txt --json benchmarks/results/plan.json
    python benchmarks/plan.py --model DIR --text held-out.txt --tp 4 --windows 8 --held-out-windows 16
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from common import save

from megatron_lowbit.__main__ import main as lowbit
from megatron_lowbit.__main__ import parser as command_line
from megatron_lowbit.cli.evaluating import evaluated
from megatron_lowbit.cli.plan_job import check
from megatron_lowbit.evaluation.metrics import summary
from megatron_lowbit.evaluation.planning import Setting

BUDGETS = (("bits", "3.25"), ("bits", "4.25"), ("bits", "5.25"), ("perplexity", "1%"), ("perplexity", "4%"))
OTHERS = ("gauss4:g256", "gauss4:g128:trellis", "gauss4:g64", "int4:g128", "int3:g32", "mxfp4", "int4:g32")
FACTS = ("model", "fingerprint", "text", "text_sha256", "window_length", "stride", "dtype", "candidates", "probe")
FIGURES = ("kl_mean", "kl_error", "perplexity", "perplexity_exact", "loss", "loss_interval", "tokens", "windows")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: the bundled one")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tp", default="8")
    parser.add_argument("--windows", default="16", help="to plan on")
    parser.add_argument("--held-out-windows", default="32")
    parser.add_argument("--progress", type=Path, help="a file that keeps what was found")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        progress = arguments.progress or Path(folder) / "progress.safetensors"
        argv = ["plan", "--tp", arguments.tp, "--algorithm", "two-step", "--dtype", "fp32", "--progress", str(progress)]
        argv += ["--text", str(arguments.text), "--out", str(Path(folder) / "plan.json")]
        argv += ["--windows", arguments.windows, "--held-out-windows", arguments.held_out_windows]
        argv += ["--model", str(arguments.model)] if arguments.model else []
        path, rows = Path(folder) / "found.json", []
        for kind, value in BUDGETS:
            if lowbit([*argv, f"--budget-{kind}", value, "--json", str(path)]) == 2:
                return 2
            found = json.loads(path.read_text())
            rows.append(_planned(kind, value, found))
        rows += [{"plan": None} | row for row in found["uniform"]] + _uniform([*argv, "--budget-bits", "4"])
    facts = {name: found[name] for name in FACTS} | {"tp": found["tp"], "algorithm": found["algorithm"]}
    save(arguments.json, rows, **facts)
    return 0


def _planned(kind: str, value: str, found: dict) -> dict:
    planning, held_out = found["planning"], found["held_out"]
    return {
        "plan": f"{kind} {value}",
        "holds": found["holds"],
        "specs": len({*found["sites"].values()}),
        "bits_per_value": found["bits_per_value"],
        "bytes_per_token": found["bytes_per_token"],
        "kl_predicted": planning["kl_predicted"],
        "kl_planning": planning["kl_mean"],
        **{name: held_out[name] for name in FIGURES},
    }


def _uniform(argv: list[str]) -> list[dict]:
    """Of specs that are no candidates, over the same held-out windows."""
    job = check(command_line().parse_args(argv))
    _, of, windows, first = job.windows()
    setting = Setting(job.tp, job.algorithm, of.features)
    cases = {spec: setting.uniform(spec) for spec in OTHERS}
    found = evaluated(of, list(cases.values()), windows, job.progress, first)
    return [
        {
            "plan": None,
            "spec": spec,
            "bits_per_value": case.bits_per_value(setting.features),
            "bytes_per_token": case.bytes_per_token(setting.features),
            **{name: getattr(summary(found[case]), name) for name in FIGURES},
        }
        for spec, case in cases.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
