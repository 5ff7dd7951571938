"""Uncompressed values on the wire: bf16, fp16, fp32.

One section: the values, row by row. Conversion is PyTorch's own: round to nearest even, and a finite value beyond
fp16's range becomes infinite (seen, not saturated silently). NaN and Inf pass.
"""

from __future__ import annotations

import torch

from ..spec import Leg
from .base import ALIGNMENT, Codec, Kernel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Passthrough(Codec):
    numba = "cpu_passthrough"

    def __init__(self, leg: Leg) -> None:
        self.spec = str(leg)
        self.dtype = DTYPES[leg.name]
        self.kernel = Kernel("passthrough", 8 * self.dtype.itemsize, 0, int(self.dtype == torch.float16))

    def granularity(self, features: int) -> int:
        return ALIGNMENT // self.dtype.itemsize  # shards of whole 16-byte words

    def sections(self, rows: int, features: int) -> list[tuple[str, int]]:
        return [("values", rows * features * self.dtype.itemsize)]

    def define_encode(self, x: torch.Tensor, wire: torch.Tensor) -> None:
        self._values(wire, x.shape).copy_(x)
        self.clear_gaps(wire, *x.shape)

    def define_reduce(self, wires: torch.Tensor, out: torch.Tensor) -> None:
        total = self._values(wires[0], out.shape).to(torch.float32, copy=True)
        for wire in wires[1:]:
            total += self._values(wire, out.shape)
        out.copy_(total)

    def _values(self, wire: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        return self.split(wire, *shape)["values"].view(self.dtype).view(shape)
