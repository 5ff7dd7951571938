"""Compute the codebooks of the unit Gaussian and write them to megatron_lowbit/codecs/lloyd_max.py.

Scalar: a level is the mean of the Gaussian over its cell, a cell's ends are midway between levels; iterated in fp64 to
the fixed point (Max, "Quantizing for Minimum Distortion", 1960; Lloyd, "Least Squares Quantization in PCM", 1982).
Trellis: a level is the mean of the values that the best path gives it, over a fixed sample, iterated likewise.

    python benchmarks/lloyd_max.py            # print the distortions
    python benchmarks/lloyd_max.py --write    # and write the file (minutes)
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch

TARGET = Path(__file__).resolve().parents[1] / "megatron_lowbit" / "codecs" / "lloyd_max.py"
BITS, TRELLIS_BITS = range(2, 8), range(2, 6)
HEADER = '''"""Lloyd-Max codebooks of the unit Gaussian: the positive levels, ascending, for 2**bits levels in all.

Written by benchmarks/lloyd_max.py; distortions {distortions} dB.
TRELLIS: the positive ones of 2**(bits + 1) levels for codecs/trellis.py; distortions {trellis} dB on
the sample they are made from.
"""

from __future__ import annotations

'''


def density(t: torch.Tensor) -> torch.Tensor:
    return torch.exp(-t * t / 2) / math.sqrt(2 * math.pi)


def tail(t: torch.Tensor) -> torch.Tensor:
    """Probability above t; accurate far out."""
    return torch.erfc(t / math.sqrt(2)) / 2


def lloyd_max(bits: int) -> tuple[torch.Tensor, float]:
    """Positive levels of the best 2**bits levels, fp64, and the distortion in dB."""
    levels = torch.linspace(0.1, 1.0 + 0.6 * bits, 2 ** (bits - 1), dtype=torch.float64)
    while True:
        ends = torch.cat([levels.new_zeros(1), (levels[1:] + levels[:-1]) / 2, levels.new_full((1,), math.inf)])
        mass = tail(ends[:-1]) - tail(ends[1:])
        better = (density(ends[:-1]) - density(ends[1:])) / mass
        if float((better - levels).abs().max()) < 1e-13:
            return better, -10 * math.log10(1 - 2 * float((mass * better**2).sum()))
        levels = better


def trellis(bits: int, groups: int = 4000, length: int = 128, rounds: int = 25) -> tuple[torch.Tensor, float]:
    """Positive ones of the 2**(bits + 1) levels, fp64, and the distortion in dB on the sample."""
    from megatron_lowbit.codecs.trellis import best_path, level_index

    sample = torch.randn(groups, length, generator=torch.Generator().manual_seed(0))
    positive = lloyd_max(bits + 1)[0]
    for _ in range(rounds):
        levels = torch.cat([-positive.flip(0), positive])
        index = level_index(best_path(sample, levels.float())).flatten()
        error = sample.double() - levels[index].view(sample.shape)
        sums = torch.zeros_like(levels).index_add(0, index, sample.double().flatten())
        counts = torch.zeros_like(levels).index_add(0, index, torch.ones_like(error).flatten())
        sums, counts = sums - sums.flip(0), counts + counts.flip(0)  # the codebook is symmetric
        means = torch.where(counts > 0, sums / counts.clamp(min=1), levels)
        positive = means[len(means) // 2 :]
    return positive, -10 * math.log10(float(error.square().mean()))


def table(name: str, books: dict[int, tuple[torch.Tensor, float]]) -> str:
    text = f"{name}: dict[int, tuple[float, ...]] = {{\n"
    for bits, (levels, _) in books.items():
        text += f"    {bits}: (\n"
        numbers = [str(np.float32(level)) for level in levels]
        for start in range(0, len(numbers), 8):
            text += "        " + ", ".join(numbers[start : start + 8]) + ",\n"
        text += "    ),\n"
    return text + "}  # fmt: skip\n"


def decibels(books: dict[int, tuple[torch.Tensor, float]]) -> str:
    return ", ".join(f"{figure:.2f}" for _, figure in books.values())


def source() -> str:
    """The text of codecs/lloyd_max.py."""
    scalar = {bits: lloyd_max(bits) for bits in BITS}
    trellises = {bits: trellis(bits) for bits in TRELLIS_BITS}
    header = HEADER.format(distortions=decibels(scalar), trellis=decibels(trellises))
    return header + table("LEVELS", scalar) + "\n" + table("TRELLIS", trellises)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        TARGET.write_text(source())
    for bits in BITS:
        print(f"{bits} bits: {lloyd_max(bits)[1]:.3f} dB")


if __name__ == "__main__":
    main()
