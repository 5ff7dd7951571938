"""Speed of the Triton kernels on a GPU, beside a copy of as many bytes, the definition, torch.compile and peers.

An operation works on messages of --bytes in bf16, rows of 8192 values; `decode_reduce_encode` and `accumulate` read 8
wires, each of a message of that size. GB/s count what is read and written. A figure is median, p20 and p80 of a call,
eager (with all that Python does for it) and from a CUDA graph, with cold memory (kernel_clock.py). A candidate is timed
only after its outcome was checked: ours has to be, bit for bit, the definition's on the CPU.

    python benchmarks/kernels.py --json benchmarks/results/kernels.json --plot docs/kernels.png    # make bench-gpu
    python benchmarks/kernels.py --spec int4:g32 --op encode --bytes 64M --candidate ours --candidate compiled
    python benchmarks/kernels.py --predict --json benchmarks/results/kernels_predicted.json        # needs no GPU
    python benchmarks/kernels.py --dry-run --spec int4:g32 --op decode     # on the CPU; its times mean nothing

It ends after --seconds, and the JSON has whatever was measured until then: it is written after every figure. Called
again on the same machine with the same sources it goes on from there. It needs torch and triton, and no installation.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from pathlib import Path

from common import RESULTS

import megatron_lowbit as lowbit

# With this folder on the path, Transformers takes this file for a package of the Hub's; see kernels/__init__.py.
__version__ = "0"

SPECS = ["int4:g32", "int8:g128", "fp8:g128", "mxfp4", "gauss4:g128", "int4:g32:spike", "int2:g32", "nvfp4", "mxfp8",
         "gauss4:g256", "selective4", "int4:g32:outliers=1/64", "int3:g32", "int5:g32", "int6:g32", "int4:g128",
         "int4:g32:sym", "int8:g128:sym", "mxfp6", "gauss2:g128", "gauss6:g128", "gauss2:g128:trellis",
         "gauss4:g128:trellis", "int2:g32:spike"]  # fmt: skip
OPERATIONS = ["encode", "decode_reduce_encode", "decode", "accumulate", "decode_add_rmsnorm"]
KIB = (65536, 1024, 8, 524288, 256, 16384, 64, 4096, 262144)  # the sizes that say most come first
FEW_SPECS, FEW_KIB = SPECS[:6], KIB[:2]  # where compiling takes long
PEERS = ["deepspeed", "deepspeed-own", "torchao", "transformer-engine"]
CANDIDATES = ["ours", "definition", *PEERS, "compiled"]
LAST_START = 60  # seconds before the end, from which on nothing begins that may have to be compiled


def number_of_bytes(text: str) -> int:
    """Such as 8192, 8K or 64M."""
    unit = {"K": 10, "M": 20, "G": 30}.get(text[-1:].upper(), 0)
    size = int(text[:-1] if unit else text) << unit
    if size < 64 or size & (size - 1):
        raise argparse.ArgumentTypeError(f"{text} is no power of two from 64 bytes up: say 8K or 64M")
    return size


def tasks(arguments: argparse.Namespace) -> list[tuple[str, str, str, int]]:
    """(candidate, spec, operation, bytes), in order: what is quick and says much comes first."""
    found = []
    for candidate in arguments.candidate or CANDIDATES:
        few = candidate in ("definition", "compiled")
        sizes = [kib << 10 for kib in (2,) if arguments.dry_run] or [kib << 10 for kib in (FEW_KIB if few else KIB)]
        for size in arguments.bytes or sizes:
            for spec in arguments.spec or (FEW_SPECS if candidate == "compiled" else SPECS):
                found += [(candidate, spec, operation, size) for operation in arguments.op or OPERATIONS]
    return found


def measure(arguments: argparse.Namespace) -> dict:
    """-> the rows, those of earlier runs too."""
    import torch
    from kernel_bench import Bench, compile_all

    if not arguments.dry_run and not torch.cuda.is_available():
        raise SystemExit("error: there is no GPU here: use --predict, or --dry-run to see that everything runs")
    start, bench = time.monotonic(), Bench(arguments.json, arguments.dry_run, arguments.again)
    todo = [task for task in tasks(arguments) if task not in bench.rows]
    if arguments.jobs:
        compile_all(todo, arguments.jobs, arguments.seconds / 4, bench.device.type)
    gc.freeze()  # each capture of a graph collects garbage, which is slow with so many objects that are none
    for number, task in enumerate(todo):
        left = arguments.seconds - (time.monotonic() - start)
        if left < (LAST_START if task[0] not in ("ours", "definition") and not arguments.dry_run else 0):
            print(f"time is up with {len(todo) - number} of {len(todo)} left, from {' '.join(map(str, task))} on")
            break
        bench.run(task)
    for candidate, why in bench.missing.items():
        print(f"not here: {candidate} ({why})")
    return bench.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", action="append", help=f"may be repeated (default: {len(SPECS)} of them)")
    parser.add_argument("--op", action="append", choices=OPERATIONS, help="may be repeated (default: all)")
    parser.add_argument("--bytes", action="append", type=number_of_bytes, help="may be repeated: 8K, 64M (default: 9)")
    parser.add_argument("--candidate", action="append", choices=CANDIDATES, help="may be repeated (default: all)")
    parser.add_argument("--seconds", type=float, default=540, help="to end after (default: 540)")
    parser.add_argument("--jobs", type=int, help="processes that compile (default: most cores; 0: none)")
    parser.add_argument("--again", action="store_true", help="forget what the JSON has")
    parser.add_argument("--dry-run", action="store_true", help="run everything on the CPU, in Triton's interpreter")
    parser.add_argument("--predict", action="store_true", help="say what bytes and instructions would take on an H200")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    for spec in arguments.spec or []:
        try:
            lowbit.codec(spec)
        except lowbit.LowBitError as error:
            parser.error(str(error))
    if arguments.predict:
        os.environ.pop("TRITON_INTERPRET", None)  # which keeps Triton from compiling
        import kernel_predict

        return kernel_predict.main(arguments.spec or SPECS, arguments.op or OPERATIONS, arguments.json)
    if arguments.dry_run:
        if arguments.json and RESULTS in arguments.json.resolve().parents:
            parser.error(f"--json {arguments.json}: the times of a dry run mean nothing; write them elsewhere")
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    if arguments.jobs is None:
        arguments.jobs = 0 if arguments.dry_run else max(1, (os.cpu_count() or 1) - 2)
    import kernel_report

    rows = list(measure(arguments).values())
    kernel_report.show_summary(rows, arguments.dry_run)
    if arguments.plot:
        kernel_report.plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
