"""Static outlier features (Dong et al., "Towards Low-bit Communication", arXiv 2411.07942, section 3).

The features with the widest ranges, known from calibration, travel in bf16; the others go through any other codec,
which then has no outliers to stretch its groups. As every rank knows which features they are, no index is sent.

Definition: k = max(1, floor(features * fraction)). A row is split into the features - k ordinary ones, in their order,
and the k outliers. The ordinary ones are rows of the base codec, the outliers are bf16, rounded to nearest even; NaN
and Inf pass. Splitting is linear: legs with the same outliers and the same base transform stay split in between.

Wire: that of the base codec, then the outliers, bf16 [rows, k]. A feature's place in the row matters, so rows are never
cut: `granularity` is the whole row, and a message of fewer rows than ranks leaves ranks idle in the middle of two-step.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import replace
from functools import cached_property

import torch

from ..errors import ConfigError
from ..spec import Leg
from . import backend
from .base import Codec, copied, rounded
from .statistics import Statistics


class Outliers(Codec):
    """leg: with its `outliers` fraction; base: the codec of the other features. Encodes only once it is bound."""

    whole = True  # whether rows come as they are, or split already, as ordinary features followed by outliers

    def __init__(self, leg: Leg, base: Codec, statistics: Statistics | None = None) -> None:
        self.spec, self.leg, self.base, self.statistics = str(leg), leg, base, statistics
        self.kernel = base.kernel and replace(base.kernel, outliers=1)
        if statistics is None:
            return
        if len(statistics.outliers) != (k := self.count(statistics.features)):
            raise ConfigError(
                f"{self.spec} has {k} outliers among {statistics.features} features, the calibration has "
                f"{len(statistics.outliers)}: calibrate with --fraction {leg.outliers}"
            )
        self.transform = ("outliers", statistics.features, statistics.outliers, base.transform)
        self.outliers = statistics.outliers
        chosen = torch.zeros(statistics.features, dtype=torch.bool)
        chosen[list(statistics.outliers)] = True
        self._picked, self._kept = chosen.nonzero().squeeze(1), (~chosen).nonzero().squeeze(1)
        self._indices: dict[tuple[int, int], dict[torch.device, torch.Tensor]] = {}  # of all copies of this codec

    def bind(self, statistics: Statistics, rank: int) -> Codec:
        return Outliers(self.leg, self.base, statistics)

    @property
    def _key(self) -> tuple:
        return self.spec, self.whole, id(self.statistics)

    @cached_property
    def inner(self) -> Codec:
        other = copy(self)
        other.base, other.transform, other.whole = self.base.inner, None, False
        other.kernel = other.base.kernel and replace(other.base.kernel, outliers=2)
        return other

    @property
    def sender(self) -> int:
        return self.base.sender

    def table(self, device: torch.device) -> torch.Tensor:
        return self.base.table(device)

    def index(self, device: torch.device, row: int, tile: int) -> torch.Tensor:
        """Places of a tensor's values, on `device`, int32, for kernels with tiles of `tile` values: nvfp4 is encoded
        in other ones than decoded.

        First those of ordinary values, in `row` places for each row of the tensor: -1 where there are no more features.
        They go on to the row + tile-th, through more rows if need be. Then those of a row's outliers.
        """
        return copied(self._indices.setdefault((row, tile), {}), device, lambda: self._define_index(row, tile))

    def _define_index(self, row: int, tile: int) -> torch.Tensor:
        features = self.statistics.features
        kept = torch.full((-(-(row + tile) // row), row), -1)
        kept[:, : len(self._kept)] = self._kept + features * torch.arange(len(kept))[:, None]
        return torch.cat([kept.flatten()[: row + tile], self._picked]).int()

    def count(self, features: int) -> int:
        """Outliers among so many features."""
        return max(1, math.floor(features * self.leg.outliers)) if features else 0

    def granularity(self, features: int) -> int:
        return max(1, features)

    def sections(self, rows: int, features: int) -> list[tuple[str, int]]:
        if self.statistics is not None and features:  # every rank asks for sizes, even one that has nothing to send
            self._check_features(features)
        k = self.count(features)
        try:
            ordinary = self.base.sections(rows, features - k)
        except ConfigError as error:
            raise ConfigError(f"{features - k} of {features} features are no outliers: {error}") from error
        return [*ordinary, ("outliers", 2 * rows * k)]

    def check(self, features: int, wires: int = 1) -> None:
        self._check_features(features)
        self.base.check(features - self.count(features), wires)

    def define_encode(self, x: torch.Tensor, wire: torch.Tensor) -> None:
        ordinary, picked = self._split(x)
        if size := self.base.wire_nbytes(ordinary.shape):
            self.base.encode_rows(ordinary, wire[:size])
        self._outliers(wire, *x.shape).copy_(rounded(picked, torch.bfloat16))
        self.clear_gaps(wire, *x.shape)

    def define_reduce(self, wires: torch.Tensor, out: torch.Tensor) -> None:
        rows, features = out.shape
        self._check_features(features)
        total = self._outliers(wires[0], rows, features).float()
        for wire in wires[1:]:
            total = total + self._outliers(wire, rows, features)
        count = features - total.shape[1]
        ordinary = torch.empty(rows * count + 32, dtype=torch.float32, device=out.device)  # kernels read whole blocks
        ordinary = ordinary[: rows * count].view(rows, count)
        if size := self.base.wire_nbytes(ordinary.shape):
            self.base.reduce_rows(wires[:, :size], ordinary)
        self._join(ordinary, total, out)

    def _outliers(self, wire: torch.Tensor, rows: int, features: int) -> torch.Tensor:
        """A view of that section, bf16 [rows, k]."""
        return self.split(wire, rows, features)["outliers"].view(torch.bfloat16).view(rows, -1)

    def _split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [rows, features] -> ordinary features, contiguous; outliers."""
        self._check_features(x.shape[1])
        if not self.whole:
            count = x.shape[1] - self.count(x.shape[1])
            return x[:, :count].contiguous(), x[:, count:]
        picked = x[:, self._picked.to(x.device)]
        if backend.of(x.device) == "numba":
            from ..kernels import cpu_outliers

            return cpu_outliers.split(x, self._runs, len(self._kept)), picked
        return x[:, self._kept.to(x.device)], picked

    def _join(self, ordinary: torch.Tensor, outliers: torch.Tensor, out: torch.Tensor) -> None:
        """The inverse, rounded to the dtype of out."""
        if not self.whole:
            out[:, : ordinary.shape[1]] = rounded(ordinary, out.dtype)
            out[:, ordinary.shape[1] :] = rounded(outliers, out.dtype)
            return
        if backend.of(out.device) == "numba":
            from ..kernels import cpu_outliers

            cpu_outliers.join(ordinary, self._runs, out)
        else:
            out[:, self._kept.to(out.device)] = rounded(ordinary, out.dtype)
        out[:, self._picked.to(out.device)] = rounded(outliers, out.dtype)

    @cached_property
    def _runs(self) -> torch.Tensor:
        from ..kernels import cpu_outliers

        return cpu_outliers.segments(self._kept)

    def _check_features(self, features: int) -> None:
        if self.statistics is None:
            raise ConfigError(
                f"{self.spec} needs a calibration: make a file with 'megatron-lowbit calibrate' and pass it as "
                "CommConfig(calibration=FILE), or bind the codec to a site's statistics"
            )
        if features != self.statistics.features:
            raise ConfigError(
                f"a tensor of {features} features at a site that was calibrated with {self.statistics.features}: use "
                "a calibration of this model"
            )
