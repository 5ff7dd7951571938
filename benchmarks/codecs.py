"""Speed of encode and decode per backend and spec, on one core.

GB/s are bf16-equivalent: 2 bytes per value, whatever the input's dtype and the wire's size. Decode means
decode-accumulate: the sum of 4 wires into one tensor, counted per value decoded. The first call compiles (numba) or
loads what an earlier run compiled, and is shown apart.

    python benchmarks/codecs.py --json benchmarks/results/codecs.json
    python benchmarks/codecs.py --spec int4:g32 --spec int8:g128 --backend numba --dtype bf16
    python benchmarks/codecs.py --quality ...      # accuracy instead: benchmarks/quality.py with its options
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from common import save, show, time_calls
from rich.progress import track

import megatron_lowbit as lowbit

SPECS = [*(f"int{bits}:g32" for bits in range(2, 9)), "int4:g128", "int8:g128", "int4:g32:sym", "int8:g128:sym"]
SPECS += ["fp8:g128", "mxfp8", "mxfp6", "mxfp4", "nvfp4", "int2:g32:spike", "int4:g32:spike",
          *(f"gauss{bits}:g128" for bits in range(2, 8)), "gauss4:g256", "gauss7:g256",
          *(f"gauss{bits}:g128:trellis" for bits in range(2, 6)), "bf16"]  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIRES = 4


def measure(spec: str, backend: str, dtype: str, values: int, repeats: int) -> dict:
    """One row of the table."""
    os.environ["LOWBIT_BACKEND"] = backend
    codec = lowbit.codec(spec)
    x = torch.randn(values // 4096, 4096, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    wires = torch.empty(WIRES, codec.wire_nbytes(x.shape), dtype=torch.uint8)
    start = time.perf_counter()
    codec.encode_rows(x[:1], wires[0, : codec.wire_nbytes(x[:1].shape)])
    codec.reduce_rows(wires[:, : codec.wire_nbytes(x[:1].shape)], x[:1].clone())
    first = time.perf_counter() - start
    encode = time_calls(lambda: codec.encode_rows(x, wires[0]), repeats)
    wires[1:] = wires[0]
    out = torch.empty_like(x)
    decode = time_calls(lambda: codec.reduce_rows(wires, out), repeats)
    gigabytes = 2 * x.numel() / 1e9
    return {
        "spec": spec,
        "backend": backend,
        "dtype": dtype,
        "bits_per_value": codec.bits_per_value(x.shape),
        "encode_gb_s": gigabytes / encode["median"],
        "encode_gb_s_p20_p80": [gigabytes / encode["p80"], gigabytes / encode["p20"]],
        "decode_gb_s": WIRES * gigabytes / decode["median"],
        "decode_gb_s_p20_p80": [WIRES * gigabytes / decode["p80"], WIRES * gigabytes / decode["p20"]],
        "first_call_s": first,
    }


def main() -> None:
    if "--quality" in sys.argv[1:]:
        import quality

        return quality.main([argument for argument in sys.argv[1:] if argument != "--quality"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", action="append", help="may be repeated (default: a set of 31)")
    parser.add_argument("--backend", action="append", choices=["numba", "reference"])
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--values", type=int, default=4 << 20)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quality", action="store_true", help="accuracy instead, with the options of quality.py")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = [
        (spec, backend, dtype)
        for backend in arguments.backend or ["numba", "reference"]
        for spec in arguments.spec or SPECS
        for dtype in arguments.dtype or (["fp32", "bf16"] if backend == "numba" else ["bf16"])
    ]
    rows = []
    for spec, backend, dtype in track(cases, "measuring"):
        repeats = arguments.repeats if backend == "numba" else min(3, arguments.repeats)
        rows.append(measure(spec, backend, dtype, arguments.values, repeats))
    show(
        f"Codecs, one core, {arguments.values:,} values (GB/s bf16-equivalent, median)",
        ["spec", "backend", "input", "bits/value", "encode", "decode-accumulate", "first call, s"],
        [
            [r["spec"], r["backend"], r["dtype"], f"{r['bits_per_value']:.3f}", f"{r['encode_gb_s']:.2f}",
             f"{r['decode_gb_s']:.2f}", f"{r['first_call_s']:.2f}"]
            for r in rows
        ],
    )  # fmt: skip
    save(arguments.json, rows, values=arguments.values, repeats=arguments.repeats, wires=WIRES)


if __name__ == "__main__":
    main()
