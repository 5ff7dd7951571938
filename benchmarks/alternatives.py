"""What else could be done with the same bits: variants of the codecs that were tried, kept or not.

Gaussian values and Student's t (3 degrees of freedom), one hop, SQNR in dB. Everything here is plain PyTorch on
normalized groups; bits count a 16-bit scale per group (32 for asymmetric integers), or what replaces it.

    python benchmarks/alternatives.py --json benchmarks/results/alternatives.json
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from common import save, show
from lloyd_max import lloyd_max
from rich.progress import track

from megatron_lowbit.codecs import hadamard
from megatron_lowbit.codecs.affine import dequantize, quantize

VALUES = 1 << 19
SUBSETS = {  # of the transitions [(subset, next state)] of each state (Ungerboeck)
    4: [[(0, 0), (2, 1)], [(1, 2), (3, 3)], [(2, 0), (0, 1)], [(3, 2), (1, 3)]],
    8: [[(0, 0), (2, 1)], [(1, 2), (3, 3)], [(2, 4), (0, 5)], [(3, 6), (1, 7)],
        [(2, 0), (0, 1)], [(3, 2), (1, 3)], [(0, 4), (2, 5)], [(1, 6), (3, 7)]],
}  # fmt: skip


def full(positive: torch.Tensor) -> torch.Tensor:
    return torch.cat([-positive.flip(0), positive]).float()


def nearest(u: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    return torch.bucketize(u, (levels[1:] + levels[:-1]) / 2)


def retrained(u: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Lloyd's iteration on a sample."""
    for _ in range(60):
        index = nearest(u, levels).flatten()
        sums = torch.zeros_like(levels).index_add(0, index, u.flatten())
        levels = sums / torch.zeros_like(levels).index_add(0, index, torch.ones_like(u).flatten()).clamp(min=1)
        levels = (levels - levels.flip(0)) / 2
    return levels


def fit(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """y times the scale that suits it best, rounded to bf16."""
    scale = (z * y).sum(-1, keepdim=True) / y.square().sum(-1, keepdim=True)
    return y * scale.bfloat16().float()


def scalar(z: torch.Tensor, bits: int, fitted: bool, own: bool = False) -> torch.Tensor:
    """Lloyd-Max, scaled by the group's rms or fitted; own: a codebook for groups of this size, of rms exactly 1."""
    rms, levels = z.square().mean(-1, keepdim=True).sqrt(), full(lloyd_max(bits)[0])
    if own:
        sample = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
        levels = retrained(sample / sample.square().mean(-1, keepdim=True).sqrt(), levels)
    y = levels[nearest(z / rms, levels)]
    return fit(z, y) if fitted else y * rms.bfloat16().float()


def parity(z: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """Lloyd-Max with one bit hidden in the parity of the codes of each block: the D_n lattice, on bent axes."""
    rms, levels = z.square().mean(-1, keepdim=True).sqrt().bfloat16().float(), full(lloyd_max(bits)[0])
    u = z / rms
    code = nearest(u, levels)
    other = code + torch.where(u > levels[code], 1, -1)
    other = torch.where((other < 0) | (other >= 2**bits), 2 * code - other, other)
    cost = ((u - levels[other]) ** 2 - (u - levels[code]) ** 2).unflatten(-1, (-1, block))
    hidden = torch.randint(2, cost.shape[:-1], generator=torch.Generator().manual_seed(2))
    wrong = code.unflatten(-1, (-1, block)).sum(-1) % 2 != hidden
    least = torch.nn.functional.one_hot(cost.argmin(-1), block).bool() & wrong[..., None]
    return levels[torch.where(least.flatten(-2), other, code)] * rms


def trellis(z: torch.Tensor, bits: int, states: int) -> torch.Tensor:
    """Trellis-coded, with a codebook made from a sample in a few rounds."""
    levels = full(lloyd_max(bits + 1)[0])
    sample = torch.randn(500, z.shape[-1], generator=torch.Generator().manual_seed(3))
    for _ in range(8):
        index = path(sample, levels, states).flatten()
        sums = torch.zeros_like(levels).index_add(0, index, sample.flatten())
        counts = torch.zeros_like(levels).index_add(0, index, torch.ones(sample.numel()))
        means = torch.where(counts > 20, sums / counts.clamp(min=1), levels)
        levels = ((means - means.flip(0)) / 2).sort().values
    u = z / z.square().mean(-1, keepdim=True).sqrt()
    return fit(z, levels[path(u.flatten(0, -2), levels, states)].view(z.shape))


def path(u: torch.Tensor, levels: torch.Tensor, states: int) -> torch.Tensor:
    """Viterbi: values [groups, n] -> the level numbers of the best path from state 0."""
    index = torch.stack([4 * nearest(u, levels[d::4].contiguous()) + d for d in range(4)], -1)
    distance = (u[..., None] - levels[index]) ** 2
    cost = torch.full((len(u), states), 1e9)
    cost[:, 0] = 0
    history = []
    for t in range(u.shape[1]):
        new, before, number = torch.full_like(cost, math.inf), cost.long(), cost.long()
        for state, ways in enumerate(SUBSETS[states]):
            for subset, target in ways:
                way = cost[:, state] + distance[:, t, subset]
                better = way < new[:, target]
                new[:, target] = torch.where(better, way, new[:, target])
                before[:, target] = torch.where(better, state, before[:, target])
                number[:, target] = torch.where(better, index[:, t, subset], number[:, target])
        cost = new
        history.append((before, number))
    state, found = cost.argmin(1, keepdim=True), []
    for before, number in reversed(history):
        found.append(number.gather(1, state))
        state = before.gather(1, state)
    return torch.cat(found[::-1], 1)


def clipped(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Asymmetric integers whose range is cut at both ends by the part, of 9, that errs least in each group."""
    best, error = None, None
    for part in torch.linspace(0, 0.2, 9):
        low, high = x.amin(-1, keepdim=True) * (1 - part), x.amax(-1, keepdim=True) * (1 - part)
        y = integers(x.maximum(low).minimum(high), bits)
        now = (x - y).square().sum(-1, keepdim=True)
        best, error = (y, now) if best is None else (torch.where(now < error, y, best), now.minimum(error))
    return best


def integers(x: torch.Tensor, bits: int) -> torch.Tensor:
    rows = x.flatten(0, -2)
    codes, scale, zero = quantize(rows, bits, rows.shape[1], False)
    return dequantize(codes, scale, zero, bits, rows.shape[1]).view(x.shape)


def entropy_coded(z: torch.Tensor, bits: int) -> tuple[torch.Tensor, float]:
    """A uniform quantizer and a perfect entropy code: variable length, so no wire of ours; its bits are the entropy."""
    u, low, high = z / z.square().mean(-1, keepdim=True).sqrt(), 1e-3, 4.0
    for _ in range(30):  # the step whose codes have this entropy
        step = math.sqrt(low * high)
        counts = torch.unique(torch.round(u / step), return_counts=True)[1] / u.numel()
        entropy = float(-(counts * counts.log2()).sum())
        low, high = (step, high) if entropy > bits else (low, step)
    return fit(z, torch.round(u / step)), entropy + 16 / z.shape[-1]


def variants(bits: int) -> dict[str, tuple[int, bool, float, Callable]]:
    """name -> (group, rotated, bits, function of groups [..., group])."""
    return {
        f"int{bits}, g32": (32, False, bits + 1, lambda x: integers(x, bits)),
        f"int{bits}, g32, clipped for the least error": (32, False, bits + 1, lambda x: clipped(x, bits)),
        "Lloyd-Max, rms as scale, g128": (128, True, bits + 16 / 128, lambda z: scalar(z, bits, False)),
        "… scale fitted to the codes (gauss, g128)": (128, True, bits + 16 / 128, lambda z: scalar(z, bits, True)),
        "… the same, not rotated": (128, False, bits + 16 / 128, lambda z: scalar(z, bits, True)),
        "… fitted, g32": (32, True, bits + 0.5, lambda z: scalar(z, bits, True)),
        "… fitted, g32, codebook for groups of 32": (32, True, bits + 0.5, lambda z: scalar(z, bits, True, own=True)),
        "… scale hidden in parities, g64": (64, True, bits, lambda z: parity(z, bits, 4)),
        "… scale hidden in parities, g128": (128, True, bits, lambda z: parity(z, bits, 8)),
        "… scale hidden in parities (gauss, g256)": (256, True, bits, lambda z: parity(z, bits, 16)),
        "trellis, 4 states (gauss, g128, trellis)": (128, True, bits + 16 / 128, lambda z: trellis(z, bits, 4)),
        "trellis, 8 states, g128": (128, True, bits + 16 / 128, lambda z: trellis(z, bits, 8)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, action="append", help="may be repeated (default: 2 and 4)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    generator, rows = torch.Generator().manual_seed(0), []
    gaussian = torch.randn(VALUES, generator=generator)
    heavy = (
        torch.randn(VALUES, generator=generator) / torch.randn(3, VALUES, generator=generator).square().mean(0).sqrt()
    )
    cases = [(bits, *case) for bits in arguments.bits or [2, 4] for case in variants(bits).items()]
    for bits, name, (group, rotated, size, function) in track(cases, "trying"):
        found = {}
        for data, x in (("Gaussian", gaussian), ("Student t(3)", heavy)):
            z = x.view(-1, group)
            z = hadamard.rotate(z) if rotated else z
            found[data] = 10 * math.log10(float(z.double().square().sum() / (z - function(z)).double().square().sum()))
        rows.append({"bits": bits, "variant": name, "bits_per_value": size, "sqnr_db": found})
    for bits in arguments.bits or [2, 4]:
        y, size = entropy_coded(gaussian.view(-1, 128), bits)
        error = float((gaussian.view(-1, 128) - y).double().square().sum())
        ideal = {"Gaussian": 10 * math.log10(float(gaussian.double().square().sum()) / error)}
        name = "uniform with a perfect entropy code, g128 (not for a wire of fixed length)"
        rows.append({"bits": bits, "variant": name, "bits_per_value": size, "sqnr_db": ideal})
    show("Variants: SQNR in dB, one hop", ["variant", "bits", "Gaussian", "Student t(3)"],
         [[r["variant"], f"{r['bits_per_value']:.3f}", *(f"{v:.2f}" for v in r["sqnr_db"].values())]
          for r in rows])  # fmt: skip
    save(arguments.json, rows, values=VALUES)


if __name__ == "__main__":
    main()
