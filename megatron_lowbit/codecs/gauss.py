"""Rotation, one scale per group, and the Lloyd-Max codebook of the unit Gaussian: gauss2 to gauss7 (ours).

Definition, in fp32, per group of n values: z = the rotated group (codecs/hadamard.py); all sums in the order of `_sum`.

    e     = exponent of max |z|, kept within [-126, 126];  w = z * 2**-e, so that squares neither overflow nor vanish
    rms   = sqrt(sum(w * w) / n)
    u     = |w| * (1 / rms)
    k     = number of thresholds below u; thresholds are midway between neighbouring levels
    scale = bf16(sum(|w| * level[k]) / sum(level[k] * level[k]) * 2**e): the one that fits these codes best
    code  = 2**(bits - 1) + k if w >= 0, else 2**(bits - 1) - 1 - k
    value = level[k] * scale, negative for codes below 2**(bits - 1); then the group is rotated back

Groups of 256 (all but a row's shorter last one) hide their scale and have no metadata: scale = bf16(rms * 2**e) comes
first, u = |w| * (1 / (scale * 2**-e)), and bit i of the scale is the parity of the codes of the values i, i + 16, ...,
i + 240. Where a parity is wrong, the code whose move to the second nearest level costs least moves, the first of equals
(as video coders hide signs: HEVC's sign data hiding). It costs 0.07 dB, and 1/16 bit is worth 0.38 dB.

A scale below 2**-126 is 0, with codes 2**(bits - 1). A group that holds a NaN or an Inf, or whose rotation overflows
(values above 2**119), has a NaN scale and decodes to NaN throughout.

Bound: for a group of n values and its decoded values y before the rounding of the scale (2**-8 of |x|) and of fp32,
|x - y|_2 <= |x|_2 * sqrt(D**2 / 4 + max(0, 1 - t / sqrt(n))**2), where t is the top level and D the largest distance of
neighbouring levels: no error is larger than D / 2, or else than what lies beyond t, and u <= sqrt(n). Groups of 256
have D**2 / 16 + D / (32 * t) more under the root, the price of at most one move in each 16 codes.

Wire: planes of codes (codecs/packing.py), then scales bf16, row by row, of the groups that do not hide theirs.
"""

from __future__ import annotations

import torch

from ..spec import Leg
from . import hadamard, packing
from .affine import SMALLEST_NORMAL
from .base import Codec, Kernel, quotient, rounded
from .lloyd_max import LEVELS

HIDING = 256  # values of a group that hides its scale
_LANES = 32


class Gauss(Codec):
    """bits, group: as in the spec. rotates: whether it works on values, or on what is rotated already."""

    numba = "cpu_gauss"

    def __init__(self, leg: Leg, rotates: bool = True) -> None:
        self.spec = str(leg)
        self.bits, self.group, self.rotates, self.hides = leg.bits, leg.group, rotates, leg.group == HIDING
        self.levels = torch.tensor(LEVELS[leg.bits])
        self.thresholds = (self.levels[1:] + self.levels[:-1]) * 0.5
        self.transform = ("hadamard", leg.group) if rotates else None
        self._inner = type(self)(leg, rotates=False) if rotates else self
        self.kernel = Kernel("gauss", leg.bits, leg.group, int(rotates))

    @property
    def zero(self) -> int:
        """The code of a group whose scale is 0."""
        return 2 ** (self.bits - 1)

    @property
    def _key(self) -> tuple:
        return self.spec, self.rotates

    @property
    def inner(self) -> Codec:
        return self._inner

    def granularity(self, features: int) -> int:
        return self.group

    def scales_per_row(self, features: int) -> int:
        """Groups of a row whose scale is stored."""
        return bool(features % HIDING) if self.hides else -(-features // self.group)

    def sections(self, rows: int, features: int) -> list[tuple[str, int]]:
        result = [(f"plane{w}", packing.plane_nbytes(rows, features, w)) for w in packing.planes(self.bits)]
        scales = 2 * rows * self.scales_per_row(features)
        return [*result, ("scales", scales)] if scales else result

    def define_encode(self, x: torch.Tensor, wire: torch.Tensor) -> None:
        codes, scales = [], []
        for part in self._groups(x.float()):
            z = hadamard.rotate(part) if self.rotates else part
            hides = self.hides and z.shape[-1] == HIDING
            c, scale = (self._hide if hides else self._fit)(z)
            codes.append(c.flatten(1))
            scales.append(scale[:, :0] if hides else scale)
        views = self.split(wire, *x.shape)
        packing.store(views, "plane", torch.cat(codes, 1), self.bits)
        if "scales" in views:
            views["scales"].view(torch.bfloat16).copy_(torch.cat(scales, 1).flatten())
        self.clear_gaps(wire, *x.shape)

    def define_reduce(self, wires: torch.Tensor, out: torch.Tensor) -> None:
        total = self._decode(wires[0], *out.shape)
        for wire in wires[1:]:
            total += self._decode(wire, *out.shape)
        if self.rotates:
            total = torch.cat([hadamard.unrotate(part).flatten(1) for part in self._groups(total)], 1)
        out.copy_(rounded(total, out.dtype))

    def define_table(self) -> torch.Tensor:
        """Levels by code; pairs of a boundary and a number; where scales are hidden, other pairs. Boundaries are the
        thresholds, there with all but the last level in between.

        Pair i is for all that is rounded to i multiples of a power of two: the one boundary that may be among it, and
        the number of those below. The other pairs are for the number of boundaries below: the middle between the level
        and the one to which the code may move, and their distance.
        """
        levels, boundaries, bits = self.levels, self.thresholds, self.bits
        if self.hides:
            boundaries, bits = torch.stack([levels[:-1], boundaries], 1).flatten(), bits + 1
        edges = (torch.arange(2 ** (bits + 3)) - 0.5) * 2.0 ** (2 - bits)
        below = torch.bucketize(edges, boundaries, out_int32=True)
        first = torch.cat([boundaries, torch.tensor([torch.inf])])[below]
        parts = [self._level(torch.arange(2**self.bits)), torch.stack([first, below.view(torch.float32)], 1)]
        if self.hides:
            i = torch.arange(len(boundaries) + 1)
            k, other = i // 2, i // 2 + i % 2 * 2 - 1
            other = torch.where(other < 0, -levels[0], levels[other.clamp(min=0)])
            parts.append(torch.stack([(other + levels[k]) * 0.5, (other - levels[k]).abs()], 1))
        return torch.cat([part.flatten() for part in parts])

    def _groups(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x [rows, features] -> its full groups [rows, groups, group] and its shorter last ones [rows, 1, n]."""
        full = x.shape[1] // self.group * self.group
        parts = [x[:, :full].unflatten(1, (-1, self.group)) if full else None, x[:, None, full:]]
        return [part for part in parts if part is not None and part.numel()]

    def _fit(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Groups [rows, groups, n] -> codes uint8, alike; scales bf16 [rows, groups]."""
        w, rms, power, finite = _normalize(z)
        codes = self._quantize(w * torch.where(rms == 0, 0.0, 1.0 / rms))
        level = self._level(codes)
        scale = _storable((_sum(w * level) / _sum(level * level) * power).bfloat16(), finite)
        return torch.where(scale > 0, codes, self.zero).to(torch.uint8), scale.squeeze(-1)

    def _quantize(self, u: torch.Tensor) -> torch.Tensor:
        """Values of rms 1 -> codes."""
        return self._code(self._nearest(u.abs()), u < 0)

    def _level(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes of whole groups -> levels."""
        levels = self.levels.to(codes.device)
        return torch.cat([-levels.flip(0), levels])[codes.int()]

    def _hide(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_fit`, with every scale also hidden in the codes' parities."""
        w, rms, power, finite = _normalize(z)
        scale = _storable((rms * power).bfloat16(), finite)
        inverse = torch.where(scale > 0, 1.0 / (scale.float() * (1.0 / power)), 0.0)
        u, levels, half = w.abs() * inverse, self.levels.to(z.device), 2 ** (self.bits - 1)
        k = self._nearest(u)
        up = (u > levels[k]) & (k < half - 1)
        neighbour = torch.where(up, levels[(k + 1).clamp(max=half - 1)], levels[(k - 1).clamp(min=0)])
        neighbour = torch.where(~up & (k == 0), -levels[0], neighbour)  # across zero
        cost = (neighbour - levels[k]).abs() * (u - (neighbour + levels[k]) * 0.5).abs()
        code = self._code(k, w < 0)
        moved = code + torch.where(up ^ (w < 0), 1, -1)
        zero = ~(scale > 0)
        code, cost = torch.where(zero, half, code), torch.where(zero, torch.arange(HIDING, device=z.device), cost)
        moved = torch.where(zero, half + 1, moved)

        code, moved, cost = (t.unflatten(-1, (-1, 16)) for t in (code, moved, cost))  # [..., values, bit of the scale]
        bits = scale.view(torch.int16).int() >> torch.arange(16, dtype=torch.int32, device=z.device) & 1
        wrong = code.sum(-2) % 2 != bits
        least = torch.arange(16, device=z.device)[:, None] == cost.argmin(-2, keepdim=True)
        return torch.where(least & wrong[..., None, :], moved, code).flatten(-2).to(torch.uint8), scale.squeeze(-1)

    def _nearest(self, u: torch.Tensor) -> torch.Tensor:
        return torch.bucketize(u, self.thresholds.to(u.device))

    def _code(self, k: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        half = 2 ** (self.bits - 1)
        return torch.where(negative, half - 1 - k, half + k)

    def _decode(self, wire: torch.Tensor, rows: int, features: int) -> torch.Tensor:
        """One wire -> values, still rotated, fp32 [rows, features]."""
        views = self.split(wire, rows, features)
        codes = packing.load(views, "plane", rows, features, self.bits)
        scales = views["scales"].view(torch.bfloat16).view(rows, -1) if "scales" in views else None
        parts = []
        for part in self._groups(codes):
            if self.hides and part.shape[-1] == HIDING:
                parity = part.unflatten(-1, (-1, 16)).sum(-2, dtype=torch.int32) & 1
                bits = (parity << torch.arange(16, dtype=torch.int32, device=wire.device)).sum(-1, dtype=torch.int32)
                scale = bits.to(torch.int16).view(torch.bfloat16)
            else:
                scale = scales[:, -1:] if part.shape[-1] < self.group else scales[:, : part.shape[1]]
            parts.append((self._level(part) * scale.float()[..., None]).flatten(1))
        return torch.cat(parts, 1)


def _normalize(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Groups [..., n] -> w, rms of w, 2**e, and whether the group is finite; the latter three [..., 1]."""
    largest = z.abs().amax(-1, keepdim=True)
    finite = largest < torch.inf  # false for NaN
    exponent = (largest.view(torch.int32) >> 23).clamp(1, 253)  # biased; of an Inf or a NaN 253 too, which is not used
    power, inverse = (bits.to(torch.int32).view(torch.float32) for bits in (exponent << 23, (254 - exponent) << 23))
    w = torch.where(finite, z * inverse, 0.0)
    mean = quotient(_sum(w * w), z.shape[-1])
    return w, mean.double().sqrt().float(), power, finite  # MKL's fp32 root, PyTorch's on CPU, is often off by an ulp


def _storable(scale: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
    scale = scale.masked_fill(scale.float() < SMALLEST_NORMAL, 0.0)
    return scale.masked_fill(~finite | ~scale.isfinite(), torch.nan)


def _sum(x: torch.Tensor) -> torch.Tensor:
    """Sum of the last dimension, [..., 1]: 32 running sums of every 32nd value, then their halves folded together."""
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % _LANES)).unflatten(-1, (-1, _LANES))
    total = x[..., 0, :]
    for block in range(1, x.shape[-2]):
        total = total + x[..., block, :]
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total
