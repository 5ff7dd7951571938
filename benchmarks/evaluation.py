"""`megatron-lowbit evaluate` as benchmarks call it: on a text of the user's or the project's own."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_lowbit.__main__ import main as lowbit
from megatron_lowbit.spec import parse

OWN_TEXT = Path(__file__).resolve().parents[1] / "examples" / "sample_text.txt"


def evaluated(arguments: argparse.Namespace, options: Sequence[str], specs: Sequence[str], argv: Sequence[str]) -> dict:
    """What its --json has. options: names of `arguments` that are passed on if they are given. Ends if it fails.

    Specs that need a calibration get one from the project's own text; without --text they are left out, as they would
    be predicting what they were calibrated on.
    """
    argv = ["evaluate", "--dtype", "fp32", *argv]
    if arguments.text is None:
        specs = [spec for spec in specs if not parse(spec).calibrated]
    else:
        argv += ["--calibration-text", str(OWN_TEXT)]
    for name in options:
        if (value := getattr(arguments, name)) is not None:
            argv += [f"--{name.replace('_', '-')}", str(value)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        if code := lowbit([*argv, "--json", str(path), "--comm", *specs]):
            sys.exit(code)
        return json.loads(path.read_text())
