"""How a message is cut into one shard per rank, so that no quantization group is cut."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ..codecs.base import Codec, rows_of


@dataclass(frozen=True)
class Shards:
    """A message seen as [rows, features], with rows [bounds[r], bounds[r + 1]) belonging to rank r."""

    rows: int
    features: int
    bounds: tuple[int, ...]

    def shape(self, rank: int) -> tuple[int, int]:
        return self.bounds[rank + 1] - self.bounds[rank], self.features

    def of(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        """Rank's rows of x, contiguous in any of its shapes -> a view [rows of the shard, features]."""
        return x.view(self.rows, self.features)[self.bounds[rank] : self.bounds[rank + 1]]

    def wire_nbytes(self, codec: Codec) -> list[int]:
        return [codec.wire_nbytes(self.shape(rank)) for rank in range(len(self.bounds) - 1)]


def shard(shape: torch.Size, codecs: tuple[Codec, ...], world: int) -> Shards:
    """Cut as finely as the codecs' granularity allows, so that one token already spreads over all ranks.

    Where a row is not a whole number of groups it stays whole. Shards differ by at most one row.
    """
    rows, features = rows_of(shape)
    return _shard(rows, features, max(codec.granularity(features) for codec in codecs), world)


@lru_cache(maxsize=4096)
def _shard(rows: int, features: int, unit: int, world: int) -> Shards:
    if features % unit == 0:
        rows, features = rows * features // unit, unit
    return Shards(rows, features, tuple(rows * rank // world for rank in range(world + 1)))
