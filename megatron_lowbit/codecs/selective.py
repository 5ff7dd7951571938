"""selective4: outlier features in bf16, the others in 4 bits with static ranges (Dong et al., arXiv 2411.07942, 3).

Which features are outliers, and every other feature's range on every rank, is known from calibration, so that neither
scales nor indices are sent: 4 * 63/64 + 16/64 = 4.1875 bits. The gather leg of two-step uses the ranges of the sum.

Definition, in fp32, for a feature with the range [low, high] on the rank that sends:

    scale = (high - low) / 15
    t     = (x - low) * (1 / scale)                   0 where the scale is no normal number
    code  = rint(t), 0 below the range and 15 above it
    value = low + code * scale

Values outside of the range are cut off at its ends: what calibration has not seen, this codec cannot send. A row that
holds a NaN or an Inf, which no code can tell (a NaN has code 0), gets NaN for all its outliers, and a row whose first
outlier is NaN decodes to NaN throughout.

Wire: the plane of 4-bit codes of the ordinary features (codecs/packing.py), then the outliers, bf16 [rows, k].
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import torch

from ..errors import ConfigError
from ..spec import Leg
from . import backend, packing
from .affine import SMALLEST_NORMAL
from .base import Codec, Kernel, copied, quotient
from .outliers import Outliers
from .statistics import Statistics


class Ranges(Codec):
    """4-bit codes of the ordinary features. low, scale, inverse: fp32 [senders, features]; sender: whose it is."""

    numba, bits = "cpu_selective", 4

    def __init__(self, leg: Leg, statistics: Statistics | None = None, sender: int = 0) -> None:
        self.spec, self.sender = f"{leg}, ordinary features", sender
        self.kernel = Kernel("selective", self.bits, 32, rowwise=True)
        if statistics is None:
            return
        self.kernel = replace(self.kernel, flag=int(len(statistics.low) > 1))
        kept = [f for f in range(statistics.features) if f not in set(statistics.outliers)]
        low, high = statistics.low[:, kept], statistics.high[:, kept]
        scale = quotient(high - low, 2**self.bits - 1)
        scale = torch.where(scale < SMALLEST_NORMAL, 0.0, scale)
        tables = (low, scale, torch.where(scale == 0, 0.0, 1.0 / scale))
        padding = (0, -len(kept) % 32)  # kernels read whole blocks
        self.low, self.scale, self.inverse = (torch.nn.functional.pad(table, padding) for table in tables)
        self._tables_of_all: dict[torch.device, torch.Tensor] = {}  # senders, and so all copies of this codec

    def granularity(self, features: int) -> int:
        return max(1, features)

    def sections(self, rows: int, features: int) -> list[tuple[str, int]]:
        return [(f"plane{self.bits}", packing.plane_nbytes(rows, features, self.bits))]

    def define_encode(self, x: torch.Tensor, wire: torch.Tensor) -> None:
        low, inverse = (table[self.sender, : x.shape[1]].to(x.device) for table in (self.low, self.inverse))
        t = (x.float() - low) * inverse
        t = torch.where(t > 0, t, 0.0)  # NaN too
        codes = torch.round(torch.where(t < 2**self.bits - 1, t, 2.0**self.bits - 1)).to(torch.uint8)
        packing.store(self.split(wire, *x.shape), "plane", codes, self.bits)

    def define_table(self) -> torch.Tensor:
        if not self.low.numel():
            return super().define_table()
        table = torch.stack((self.low, self.scale, self.inverse), 1)
        return table.view(len(self.low), 3, -1, 8, 4).transpose(2, 3).contiguous()  # kernels/triton_selective.py

    def table(self, device: torch.device) -> torch.Tensor:
        return copied(self._tables_of_all, device, self.define_table)

    def check(self, features: int, wires: int = 1) -> None:
        _check_senders(wires, len(self.low))

    def reduce_rows(self, wires: torch.Tensor, out: torch.Tensor) -> None:
        self.check(out.shape[1], len(wires))
        super().reduce_rows(wires, out)

    def define_reduce(self, wires: torch.Tensor, out: torch.Tensor) -> None:
        total = None
        for sender, wire in enumerate(wires, self.sender if len(wires) == 1 else 0):
            codes = packing.load(self.split(wire, *out.shape), "plane", *out.shape, self.bits).float()
            sender = sender if len(self.low) > 1 else 0
            low, scale = (table[sender, : out.shape[1]].to(out.device) for table in (self.low, self.scale))
            values = low + codes * scale
            total = values if total is None else total + values
        out.copy_(total)


class Selective(Outliers):
    """selective4. Bound, it is the codec of one rank at one site and on one leg."""

    def __init__(self, leg: Leg, statistics: Statistics | None = None, sender: int = 0) -> None:
        super().__init__(leg, Ranges(leg, statistics, sender), statistics)

    def bind(self, statistics: Statistics, rank: int) -> Codec:
        _check_senders(rank + 1, len(statistics.low))
        return Selective(self.leg, statistics, rank if len(statistics.low) > 1 else 0)

    @property
    def _key(self) -> tuple:
        return *super()._key, self.base.sender

    def sent_by(self, rank: int) -> Codec:
        if self.statistics is None or len(self.statistics.low) == 1 or rank == self.base.sender:
            return self
        _check_senders(rank + 1, len(self.statistics.low))
        other = copy(self)
        other.base = copy(self.base)
        other.base.sender = rank
        vars(other).pop("inner", None)  # which has this rank's base
        return other

    def define_encode(self, x: torch.Tensor, wire: torch.Tensor) -> None:
        super().define_encode(x, wire)
        usable = _finite(x)
        if not x.is_cpu or not usable.all():  # asking a GPU would wait for it
            self._outliers(wire, *x.shape).masked_fill_(~usable[:, None], torch.nan)

    def _join(self, ordinary: torch.Tensor, outliers: torch.Tensor, out: torch.Tensor) -> None:
        unusable = outliers[:, :1].isnan()
        if not out.is_cpu or unusable.any():
            ordinary, outliers = (part.masked_fill_(unusable, torch.nan) for part in (ordinary, outliers))
        super()._join(ordinary, outliers, out)


def _finite(x: torch.Tensor) -> torch.Tensor:
    """bool [rows]: whether all of a row's values are finite."""
    if backend.of(x.device) == "numba":
        from ..kernels import cpu_outliers

        return cpu_outliers.finite(x)
    return x.abs().amax(1) < torch.inf


def _check_senders(ranks: int, senders: int) -> None:
    if ranks > senders > 1:
        raise ConfigError(
            f"{ranks} ranks or more at a site that was calibrated with {senders}: use a calibration of this TP size"
        )
