"""What every family of codecs costs in accuracy at 2 to 8 bits, TP 2, 4 and 8, one-shot and two-step.

`megatron-lowbit evaluate` of the specs below. Those that need a calibration get one at each TP size from the project's
own text; without --text their cases are left out, as they would be predicting what they were calibrated on. An
interrupted run goes on where it stopped.

    python benchmarks/accuracy.py --text held-out.txt --json benchmarks/results/accuracy.json
    python benchmarks/accuracy.py --model DIR --text held-out.txt --tp 4 --windows 16
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import save
from evaluation import evaluated

from megatron_lowbit.spec import parse

FACTS = ("model", "fingerprint", "text", "text_sha256", "window_length", "stride", "dtype")
FAMILIES = {
    "integers": [
        "int8:g128", "int8:g32", "int7:g32", "int6:g128", "int6:g32", "int5:g128", "int5:g32", "int4:g128", "int4:g64",
        "int4:g32", "int4:g32:sym", "int3:g32", "int2:g32", "int2:g32:sym", "int4:g32/int8:g128",
    ],
    "spikes apart": ["int4:g64:spike", "int3:g64:spike", "int2:g128:sym:spike"],
    "rotated, Lloyd-Max": [
        "gauss7:g256", "gauss6:g256", "gauss5:g256", "gauss4:g256", "gauss4:g128", "gauss3:g256", "gauss2:g256",
    ],
    "trellis": ["gauss5:g128:trellis", "gauss4:g128:trellis", "gauss3:g128:trellis", "gauss2:g128:trellis"],
    "floats": ["fp8", "mxfp8", "mxfp6", "mxfp4", "nvfp4"],
    "outlier features": [
        "selective4", "int4:g128:outliers=1/64", "gauss4:g128:trellis:outliers=1/64", "int3:g128:outliers=1/64",
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: the bundled one")
    parser.add_argument("--text", type=Path, help="default: the project's own")
    parser.add_argument("--tp", default="2,4,8")
    parser.add_argument("--windows", type=int, help="default: what the text has, at most 64")
    parser.add_argument("--window-length", type=int)
    parser.add_argument("--progress", type=Path, help="a file that keeps what was found")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    specs = [spec for family in FAMILIES.values() for spec in family]
    options = ("model", "text", "tp", "windows", "window_length", "progress", "plot")
    found = evaluated(arguments, options, specs, ["--algorithm", "one-shot", "two-step"])
    family = {str(parse(spec)): name for name, group in FAMILIES.items() for spec in group}
    rows = [{"family": family[row["spec"]]} | row for row in found["rows"]]
    save(arguments.json, rows, **{name: found[name] for name in FACTS})


if __name__ == "__main__":
    main()
