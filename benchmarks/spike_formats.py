"""What `spike` is good for, and why it stores its scales and zeros as it does: SQNR of specs, and of alternatives.

The specs come in pairs of about the same size. The alternatives all send the same spikes, and differ in how they
quantize the rest.

python benchmarks/spike_formats.py --json benchmarks/results/spike_formats.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from common import save, show

import megatron_lowbit as lowbit

GROUP, GROUPS = 32, 1 << 14
SPECS = ["int4:g32", "int4:g64:spike", "int4:g64", "int4:g128:spike", "int3:g32", "int3:g64:spike", "int2:g32:sym",
         "int2:g128:sym:spike"]  # fmt: skip


def short(x: torch.Tensor, mantissa: int, direction: str) -> torch.Tensor:
    """x rounded to a float with that many bits of mantissa: up, down, or to nearest."""
    unit = torch.exp2(torch.floor(torch.log2(x.abs().clamp(min=1e-30))) - mantissa)
    return {"up": torch.ceil, "down": torch.floor, "nearest": torch.round}[direction](x / unit) * unit


def octaves(x: torch.Tensor) -> torch.Tensor:
    """x rounded up to a power of 2 ** (1/8)."""
    return torch.exp2(torch.ceil(torch.log2(x.clamp(min=1e-30)) * 8) / 8)


def asymmetric(
    beyond: float,
    zero_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    scale_of: Callable[[torch.Tensor], torch.Tensor],
) -> Callable:
    """beyond: steps between the outer levels and the ends of the rest; zero_of and scale_of round."""

    def quantized(x, low, high, lo, hi, bits):
        top = 2**bits - 1
        zero = zero_of(lo + beyond * (hi - lo) / (top + 2 * beyond), low.clamp(min=0) + high.clamp(max=0))
        scale = scale_of((hi - zero) / (top + beyond))
        return zero + ((x - zero) / scale).round().clamp(0, top).nan_to_num() * scale

    return quantized


def symmetric(reach: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]) -> Callable:
    """reach(larger, smaller magnitude of the two ends, 2 ** (bits - 1)) is the scale."""

    def quantized(x, low, high, lo, hi, bits):
        half, larger = 2 ** (bits - 1), torch.maximum(-lo, hi)
        scale = short(reach(larger, torch.minimum(-lo, hi).clamp(min=0), half), 3, "up") * torch.where(-lo >= hi, 1, -1)
        return (x / scale).round().clamp(-half, half - 1).nan_to_num() * scale

    return quantized


def ours(options: str) -> Callable:
    def quantized(x, low, high, lo, hi, bits):
        codec = lowbit.codec(f"int{bits}:g{GROUP}:spike{options}")
        return codec.decode(codec.encode(x), x.shape, torch.float32)

    return quantized


METHODS = {
    "asymmetric (ours), 16": ours(""),
    "no half step, 16": asymmetric(0, lambda v, a: a + short(v - a, 3, "down"), lambda v: short(v, 4, "up")),
    "no anchor, 16": asymmetric(0.5, lambda v, a: short(v, 3, "down"), lambda v: short(v, 4, "up")),
    "to nearest, 16": asymmetric(0.5, lambda v, a: a + short(v - a, 3, "nearest"), lambda v: short(v, 4, "nearest")),
    "1/8 octaves, 16": asymmetric(0.5, lambda v, a: a + short(v - a, 3, "down"), octaves),
    "bf16, 32": asymmetric(0.5, lambda v, a: short(v, 7, "down"), lambda v: short(v, 7, "up")),
    "symmetric (ours), 8": ours(":sym"),
    "no half step, 8": symmetric(lambda larger, smaller, h: larger / h),
    "half steps on both sides, 8": symmetric(
        lambda larger, smaller, h: torch.maximum(larger / (h + 0.5), smaller / (h - 0.5))
    ),
}


def data(name: str) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(GROUPS, GROUP)
    if name == "one value 1000 times":
        x[torch.arange(GROUPS), torch.randint(GROUP, (GROUPS,))] *= 1000
    if name in DISTRIBUTIONS:
        x = DISTRIBUTIONS[name].sample((GROUPS, GROUP))
    return {"mean 50": x + 50, "ReLU": x.relu()}.get(name, x).bfloat16().float()


DISTRIBUTIONS = {
    "Laplace": torch.distributions.Laplace(0.0, 1.0),
    "Student t, 3 degrees": torch.distributions.StudentT(3.0),
    "uniform": torch.distributions.Uniform(-1.0, 1.0),
}
DATA = ("Gaussian", *DISTRIBUTIONS, "one value 1000 times", "mean 50", "ReLU")


def sqnr(x: torch.Tensor, method: Callable, bits: int) -> float:
    """Of the values that are no spikes: signal to quantization noise, dB."""
    (low, low_at), (high, high_at) = x.min(1, keepdim=True), x.max(1, keepdim=True)
    spike = torch.zeros_like(x, dtype=torch.bool).scatter_(1, low_at, True).scatter_(1, high_at, True)
    lo = x.masked_fill(spike, torch.inf).amin(1, keepdim=True)
    hi = x.masked_fill(spike, -torch.inf).amax(1, keepdim=True)
    y = method(x, low, high, lo, hi, bits)
    return float(10 * torch.log10(x[~spike].square().sum() / (x - y)[~spike].square().sum()))


def features() -> torch.Tensor:
    """One feature in 64 is 10 to 40 times larger."""
    torch.manual_seed(1)
    large = torch.where(torch.rand(4096) < 1 / 64, 10 + 30 * torch.rand(4096), 1.0)
    return (torch.randn(256, 4096) * large).bfloat16()


def compare_specs() -> list[dict]:
    values = {name: data(name).bfloat16().view(-1, 4096) for name in ("Gaussian", "Student t, 3 degrees")}
    values["large features"] = features()
    rows = []
    for spec in SPECS:
        codec, row = lowbit.codec(spec), {}
        for name, x in values.items():
            y = codec.decode(codec.encode(x), x.shape, torch.float32)
            row[name] = float(10 * torch.log10(x.float().square().sum() / (x.float() - y).square().sum()))
        rows.append({"spec": spec, "bits_per_value": codec.bits_per_value(x.shape), "sqnr_db": row})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name in DATA:
        x = data(name)
        for bits in (2, 3, 4):
            row = {method: sqnr(x, quantized, bits) for method, quantized in METHODS.items()}
            rows.append({"data": name, "bits": bits, "sqnr_db": row})
    show(f"SQNR in dB of what are no spikes, groups of {GROUP}; bits of scale and zero", ["data", "bits", *METHODS],
         [[r["data"], str(r["bits"]), *(f"{v:.2f}" for v in r["sqnr_db"].values())] for r in rows])  # fmt: skip
    specs = compare_specs()
    figures = [[r["bits_per_value"], *r["sqnr_db"].values()] for r in specs]
    show("SQNR in dB of specs", ["spec", "bits/value", *specs[0]["sqnr_db"]],
         [[r["spec"], *(f"{v:.2f}" for v in row)] for r, row in zip(specs, figures, strict=True)])  # fmt: skip
    save(arguments.json, rows, group=GROUP, specs=specs)


if __name__ == "__main__":
    main()
