"""Compiles kernels for test_triton_compile.py, which cannot: Triton is interpreted there. Two processes share the work.

Standard input: a JSON list of cases, "spec shape capability operation ...". Standard output: for each, in that order, a
line of JSON, operation -> figures, or {"error": ...}.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor

# rows, features (the first that the codec takes), dtype, destinations, wires to sum up
SHAPES = {
    "aligned": (512, (4096,), "bfloat16", 8, 1),
    "ragged": (13, (100, 112, 256), "float32", 3, 8),
    "token": (1, (4096,), "float16", 1, 8),  # Triton takes arguments of 1 for constants
    "tiny": (1, (1, 16, 32, 64), "bfloat16", 1, 1),
    "long": (1 << 19, (8192,), "float32", 8, 1),  # some arguments take 64 bits
}
# Roundings other than the definition's: fused, approximate, without subnormal numbers.
INEXACT = re.compile(r"\b\w+\S*\.(?:approx|ftz|full)\S*|\bfma\.\S*")


def main() -> None:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), initializer=_start) as pool:
        for result in pool.map(_figures, json.load(sys.stdin)):
            print(json.dumps(result), flush=True)


def _start() -> None:
    os.dup2(2, 1)  # Triton prints code that does not assemble


def _figures(case: str) -> dict:
    from megatron_lowbit.kernels.triton_ahead import compiled

    spec, shape, capability, *operations = case.split()
    try:
        launches = _launches(spec, shape)
        return {name: _read(compiled(launches[name], int(capability))) for name in operations if name in launches}
    except Exception as error:  # whatever it is, it is the test that must say so
        chain = []
        while error:
            chain.append(f"{type(error).__name__}: {error}")
            error = error.__cause__
        return {"error": "\n".join(chain[-3:])}


def _read(kernel) -> dict:
    figures = {name: getattr(kernel, name) for name in ("registers", "local", "shared")}
    return figures | {
        "loads": sorted(kernel.loads),
        "stores": sorted(kernel.stores),
        "inexact": sorted(set(INEXACT.findall(kernel.ptx))),
    }


def _launches(spec: str, shape: str) -> dict:
    """Every operation as a collective would launch it, on tensors without values."""
    import torch

    import megatron_lowbit as lowbit
    from megatron_lowbit.kernels import triton_launch
    from tests.codecs.test_every_codec import SENDERS, bound, fits

    rows, choices, dtype, world, senders = SHAPES[shape]
    features = next(n for n in choices if fits(lowbit.codec(spec), n))
    codec, meta = bound(spec, features), torch.device("meta")
    most = SENDERS if codec.kernel.spoils else 8  # as many as its ranges are of
    x = torch.empty(rows, features, dtype=getattr(torch, dtype), device=meta)
    sizes = codec.wire_nbytes((rows // world, features)), codec.wire_nbytes((-(-rows // world), features))
    shards = torch.empty(min(senders, most), world * max(sizes), dtype=torch.uint8, device=meta)
    wires = torch.empty(most, codec.wire_nbytes(x.shape), dtype=torch.uint8, device=meta)
    norm = (x, x[0], 1e-6, 0.0, x, x)
    launches = {
        "encode": triton_launch.encode(codec, x, shards[0], world, sizes),
        "reduce": triton_launch.reduce(codec, shards, x, world, sizes),
        "reduce_encode": triton_launch.reduce_encode(codec.inner, wires, codec.inner, (rows, features), wires[0]),
    }
    if codec.kernel.fits(features):
        launches["reduce_add_rmsnorm"] = triton_launch.reduce_add_rmsnorm(codec, shards, rows, world, max(sizes), *norm)
    return launches


if __name__ == "__main__":
    main()
