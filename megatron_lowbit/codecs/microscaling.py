"""Small floats with a scale per block: fp8, OCP's mxfp8, mxfp6 and mxfp4, NVIDIA's nvfp4.

    name    element  block  scale of a block                                                      bits per value
    fp8     E4M3     g      bf16: amax / 448, to nearest even                                     8 + 16/g
    mxfp8   E4M3     32     E8M0: 2**(floor(log2(amax)) - 8)                                      8.25
    mxfp6   E2M3     32     E8M0: 2**(floor(log2(amax)) - 2)                                      6.25
    mxfp4   E2M1     32     E8M0: 2**(floor(log2(amax)) - 2)                                      4.25
    nvfp4   E2M1     16     E4M3: amax / (6 * row scale); row scale fp32: row's amax / (448 * 6)  4.5 + 32/features

amax is a block's largest magnitude. Elements are `minifloat.encode(x * (1 / scale))`, in fp32 and with an IEEE
division: they round half to even, saturate, may be subnormal, and keep the sign of a zero. value = element * scale,
where the scale of nvfp4 is the product of both.

fp8 takes rows of any length, with a shorter last group. The others follow standards without short blocks: `features`
must be a multiple of the block. Sources: OCP Microscaling Formats (MX) v1.0, section 5.2 (formats), 5.3 (elements),
5.4.1 (E8M0: byte s is 2**(s - 127), 0xFF is NaN) and 6.3 (conversion); NVIDIA, "Pretraining Large Language Models with
NVFP4" (arXiv 2509.25149), appendix. Where the standard offers two elements, this is the one with more mantissa: the
block's scale supplies the range. On Gaussian data E5M2 loses 5 dB to E4M3, and E3M2 as much to E2M3.

Ends of the range. E8M0 is clamped to its smallest scale 2**-127, which is also that of a block of zeros; fp32 cannot
exceed its largest. An fp8 scale that is below 2**-126 before rounding is stored as 0, and its group decodes to 0. So is
an nvfp4 row scale below 2**-117, with block scales 0 throughout the row; from there on every product of the two is a
normal number. An nvfp4 block scale may round to 0, which loses a block below 2**-18.8 of the row's largest value.
An MX block saturates by the standard's own rule, as amax / scale may be anything up to 2**(emax + 1): an mxfp4 element
may be off by a quarter (8 becomes 6), an mxfp8 one by 1/8, an mxfp6 one by 1/16. This is why mxfp8 gains nothing over
mxfp6 on Gaussian data; its range pays where a block mixes large and small values.

A block that holds a NaN or an Inf gets a NaN scale (bf16 0x7FC0, E8M0 0xFF, E4M3 0x7F) and codes 0, and decodes to NaN
throughout. The row scale of nvfp4 is taken over the finite blocks, so the others do not notice.

NVIDIA's second scale is one per tensor. Here it is one per row, so that a token depends on its own values alone. The
cost: 32 bits per row, and a row cannot be cut: in two-step a message of fewer rows than ranks leaves ranks idle.

No step relies on what a processor does with subnormal fp32 numbers; where it flushes them, inputs and values that are
subnormal themselves become zeros, and nothing else changes. The E8M0 scale 2**-127, itself subnormal, is therefore
multiplied in as two factors that are normal.

Wire: planes of codes (codecs/packing.py), scales [rows, blocks] (2 bytes in fp8, else 1), then (nvfp4) row scales fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ConfigError
from ..spec import Leg
from . import packing
from .base import Codec, Kernel, quotient
from .minifloat import E2M1, E2M3, E4M3, Minifloat, exponent_of, power_of_two

SMALLEST_NORMAL = 2.0**-126
SMALLEST_ROW_SCALE = 2.0**-117  # times the smallest E4M3 scale, 2**-9: a normal number


@dataclass(frozen=True)
class Format:
    """scale: "bf16", "e8m0" or "e4m3"; block: values per scale, 0 where the spec says so and any row will do."""

    element: Minifloat
    scale: str
    block: int = 0


FORMATS = {
    "fp8": Format(E4M3, "bf16"),
    "mxfp8": Format(E4M3, "e8m0", 32),
    "mxfp6": Format(E2M3, "e8m0", 32),
    "mxfp4": Format(E2M1, "e8m0", 32),
    "nvfp4": Format(E2M1, "e4m3", 16),
}


class Microscaling(Codec):
    """format: element, scale and block; group: values per scale."""

    numba = "cpu_microscaling"

    def __init__(self, leg: Leg) -> None:
        self.spec = str(leg)
        self.format = FORMATS[leg.name]
        self.group = leg.group or self.format.block
        scale = ("bf16", "e8m0", "e4m3").index(self.format.scale)
        self.kernel = Kernel("microscaling", self.format.element.bits, max(self.group, 32), scale, rowwise=scale == 2)

    def granularity(self, features: int) -> int:
        return (features or self.group) if self.format.scale == "e4m3" else self.group

    def sections(self, rows: int, features: int) -> list[tuple[str, int]]:
        """Raises ConfigError for rows that are not a whole number of blocks."""
        block = self.format.block
        if block and features % block:
            raise ConfigError(
                f"{self.spec} takes rows of a multiple of {block} values, got {features}: use fp8 or int4, which take "
                "any, or pad the rows"
            )
        scales, element = rows * -(-features // self.group), self.format.element
        result = [(f"plane{w}", packing.plane_nbytes(rows, features, w)) for w in packing.planes(element.bits)]
        result.append(("scales", 2 * scales if self.format.scale == "bf16" else scales))
        if self.format.scale == "e4m3":
            result.append(("row_scales", 4 * rows if features else 0))
        return result

    def define_encode(self, x: torch.Tensor, wire: torch.Tensor) -> None:
        blocks, views = self._blocks(x.float()), self.split(wire, *x.shape)
        amax = blocks.abs().amax(-1)  # NaN wins
        finite = amax < torch.inf
        inverse = self._store_scales(amax, finite, views)
        codes = self.format.element.encode(torch.where(finite[..., None], blocks, 0.0) * inverse[..., None])
        codes = codes.flatten(1)[:, : x.shape[1]]
        packing.store(views, "plane", codes, self.format.element.bits)
        self.clear_gaps(wire, *x.shape)

    def define_reduce(self, wires: torch.Tensor, out: torch.Tensor) -> None:
        total = self._decode(wires[0], *out.shape)
        for wire in wires[1:]:
            total += self._decode(wire, *out.shape)
        out.copy_(total).masked_fill_(total.isnan(), torch.nan)  # conversions give NaNs of different bits

    def _blocks(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, features] -> [rows, blocks, group], a short last block filled up with zeros."""
        return torch.nn.functional.pad(x, (0, -x.shape[1] % self.group)).unflatten(1, (-1, self.group))

    def _store_scales(self, amax: torch.Tensor, finite: torch.Tensor, views: dict[str, torch.Tensor]) -> torch.Tensor:
        """Largest magnitudes fp32 [rows, blocks] -> scales in `views`; the factors that elements are encoded with."""
        element = self.format.element
        if self.format.scale == "bf16":
            scale = quotient(amax, element.largest)
            scale = scale.masked_fill(scale < SMALLEST_NORMAL, 0.0).bfloat16().masked_fill(~finite, torch.nan)
            views["scales"].view(torch.bfloat16).copy_(scale.flatten())
            return torch.where(scale > 0, 1.0 / scale.float(), 0.0)
        if self.format.scale == "e8m0":
            exponent = (exponent_of(amax) - element.highest).clamp(min=-127)
            views["scales"].copy_((exponent + 127).masked_fill(~finite, 0xFF).flatten())
            return power_of_two(-exponent)
        row = quotient(torch.where(finite, amax, 0.0).amax(-1, keepdim=True), E4M3.largest * element.largest)
        row = row.masked_fill(row < SMALLEST_ROW_SCALE, 0.0)
        code = E4M3.encode(torch.where(finite & (row > 0), amax / (row * element.largest), 0.0))
        views["scales"].copy_(code.masked_fill(~finite, E4M3.nan).flatten())
        views["row_scales"].view(torch.float32).copy_(row.flatten())
        return torch.where(code > 0, 1.0 / (E4M3.decode(code) * row), 0.0)

    def _decode(self, wire: torch.Tensor, rows: int, features: int) -> torch.Tensor:
        views = self.split(wire, rows, features)
        codes = packing.load(views, "plane", rows, features, self.format.element.bits)
        values = self.format.element.decode(self._blocks(codes))
        for factor in self._factors(views, rows):
            values = values * factor[..., None]
        return values.flatten(1)[:, :features]

    def _factors(self, views: dict[str, torch.Tensor], rows: int) -> list[torch.Tensor]:
        """fp32 [rows, blocks], each: what elements are multiplied with, one after the other."""
        if self.format.scale == "bf16":
            return [views["scales"].view(torch.bfloat16).view(rows, -1).float()]
        scale = views["scales"].view(rows, -1)
        if self.format.scale == "e8m0":
            first = scale.int() // 2 - 63
            second = scale.int() - 127 - first
            return [power_of_two(first).masked_fill(scale == 0xFF, torch.nan), power_of_two(second)]
        return [E4M3.decode(scale) * views["row_scales"].view(torch.float32).view(rows, 1)]
