"""Why scales are bf16 to nearest, zeros bf16 downwards and symmetric scales signed: SQNR of the alternatives.

python benchmarks/scale_formats.py --json benchmarks/results/scale_formats.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import save, show

GROUP = 32
ROUND = {"bf16": torch.bfloat16, "fp16": torch.float16}
ASYMMETRIC = {  # name: (format, rounding of the scale, rounding of the zero)
    "bf16, zero down (ours)": ("bf16", "nearest", "down"),
    "bf16, zero nearest": ("bf16", "nearest", "nearest"),
    "bf16, scale up, zero down": ("bf16", "up", "down"),
    "fp16, zero nearest": ("fp16", "nearest", "nearest"),
}
SYMMETRIC = ("signed extreme (ours)", "absolute maximum / h", "absolute maximum / (h - 1)")


def rounded(x: torch.Tensor, kind: str, direction: str) -> torch.Tensor:
    """x to bf16 or fp16 and back: to nearest, or to the neighbour above or below."""
    y = x.to(ROUND[kind])
    if direction == "nearest":
        return y.float()
    limit = torch.full_like(y, torch.inf if direction == "up" else -torch.inf)
    wrong = (y.float() < x) if direction == "up" else (y.float() > x)
    return torch.where(wrong, torch.nextafter(y, limit), y).float()


def asymmetric(x: torch.Tensor, bits: int, kind: str, scale_rounding: str, zero_rounding: str) -> torch.Tensor:
    top = 2**bits - 1
    zero = rounded(x.amin(-1, keepdim=True), kind, zero_rounding)
    scale = rounded((x.amax(-1, keepdim=True) - zero) / top, kind, scale_rounding)
    codes = ((x - zero) / scale).round().clamp(0, top)
    return zero + codes.nan_to_num() * scale


def symmetric(x: torch.Tensor, bits: int, method: str) -> torch.Tensor:
    half, lowest = 2 ** (bits - 1), -(2 ** (bits - 1))
    lo, hi = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if method == SYMMETRIC[0]:
        scale = torch.where(-lo >= hi, lo, hi) / -half
    elif method == SYMMETRIC[1]:
        scale = torch.maximum(-lo, hi) / half
    else:
        scale, lowest = torch.maximum(-lo, hi) / (half - 1), 1 - half
    scale = scale.bfloat16().float()
    return (x / scale).round().clamp(lowest, half - 1).nan_to_num() * scale


def data(name: str) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(1 << 17, GROUP)
    if name == "Student t, 3 degrees":
        x = torch.distributions.StudentT(3.0).sample((1 << 17, GROUP))
    return {"offset groups": x + 100 * torch.randn(1 << 17, 1), "tiny (1e-5)": x * 1e-5}.get(name, x)


def sqnr(x: torch.Tensor, y: torch.Tensor) -> float:
    """Signal to quantization noise, dB."""
    return float(10 * torch.log10(x.square().sum() / (x - y).square().sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name in ("Gaussian", "Student t, 3 degrees", "offset groups", "tiny (1e-5)"):
        x = data(name)
        for bits in (2, 4, 6, 8):
            row = {method: sqnr(x, asymmetric(x, bits, *how)) for method, how in ASYMMETRIC.items()}
            row |= {method: sqnr(x, symmetric(x, bits, method)) for method in SYMMETRIC}
            rows.append({"data": name, "bits": bits, "sqnr_db": row})
    methods = [*ASYMMETRIC, *SYMMETRIC]
    show(f"SQNR in dB, fp32 data, groups of {GROUP}", ["data", "bits", *methods],
         [[r["data"], str(r["bits"]), *(f"{r['sqnr_db'][m]:.2f}" for m in methods)] for r in rows])  # fmt: skip
    save(arguments.json, rows, group=GROUP)


if __name__ == "__main__":
    main()
