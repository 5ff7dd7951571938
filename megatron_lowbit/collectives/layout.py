"""How a message is cut into one piece per rank.

All-reduce cuts shards where it likes, but never through a quantization group; the other collectives cut where the
caller says. Raises ConfigError for a cut that cannot be made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..codecs.base import Codec, rows_of
from ..errors import ConfigError


@dataclass(frozen=True)
class Shards:
    """A message seen as [rows, features], with rows [bounds[r], bounds[r + 1]) belonging to rank r."""

    rows: int
    features: int
    bounds: tuple[int, ...]

    def shape(self, rank: int) -> tuple[int, int]:
        return self.bounds[rank + 1] - self.bounds[rank], self.features

    def of_all(self, x: torch.Tensor) -> torch.Tensor:
        """x, contiguous in any of its shapes -> a view [rows, features]."""
        return x.view(self.rows, self.features)

    def of(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        """Rank's rows of x -> a view [rows of the shard, features]."""
        return self.of_all(x)[self.bounds[rank] : self.bounds[rank + 1]]

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


def dimension(x: torch.Tensor, dim: int) -> int:
    """`dim` counted from the front."""
    if x.dim() == 0:
        raise ConfigError("x has shape (), and no dimension to work along: pass x.reshape(1)")
    if isinstance(dim, bool) or not isinstance(dim, int) or not -x.dim() <= dim < x.dim():
        raise ConfigError(
            f"dim is {dim!r}, and x has shape {tuple(x.shape)}: give a whole number from {-x.dim()} to {x.dim() - 1}"
        )
    return dim % x.dim()


def chunks(x: torch.Tensor, dim: int, world: int) -> list[torch.Tensor]:
    """`world` equal parts of x along `dim`, as views."""
    dim = dimension(x, dim)
    if x.shape[dim] % world:
        raise ConfigError(
            f"x has size {x.shape[dim]} along dim {dim}, which {world} ranks cannot share equally: pad it to "
            f"{-(-x.shape[dim] // world) * world}"
        )
    size = x.shape[dim] // world
    return [x.narrow(dim, rank * size, size) for rank in range(world)]


def rows_sent(x: torch.Tensor, input_splits: Sequence[int] | None, world: int) -> list[int]:
    """How many rows of x, along dim 0, go to each rank; None: equal parts."""
    if input_splits is None:
        return [chunk.shape[0] for chunk in chunks(x, 0, world)]
    splits = _counts(input_splits, world, "input_splits")
    if sum(splits) != x.shape[dimension(x, 0)]:
        raise ConfigError(
            f"input_splits is {splits}, {sum(splits)} in all, but x has size {x.shape[0]} along dim 0: give splits "
            "that sum up to it"
        )
    return splits


def rows_exchanged(
    x: torch.Tensor, input_splits: Sequence[int] | None, output_splits: Sequence[int] | None, world: int, rank: int
) -> tuple[list[int], list[int]]:
    """How many rows go to each rank, and how many come from each. Without splits: as many as go to each."""
    sends = rows_sent(x, input_splits, world)
    if output_splits is None and input_splits is not None:
        raise ConfigError(f"input_splits is {sends} without output_splits: give both, as ranks know only their own")
    receives = sends if output_splits is None else _counts(output_splits, world, "output_splits")
    if sends[rank] != receives[rank]:
        raise ConfigError(
            f"rank {rank} sends itself {sends[rank]} rows (input_splits) but expects {receives[rank]} (output_splits): "
            "give one number for both"
        )
    return sends, receives


def _counts(given: Sequence[int], world: int, name: str) -> list[int]:
    if not isinstance(given, list | tuple) or not all(type(rows) is int and rows >= 0 for rows in given):
        value = given if isinstance(given, list | tuple) else type(given).__name__  # a tensor's text takes many lines
        raise ConfigError(f"{name} is {value}: give a list of whole numbers from 0 up, one per rank")
    if len(given) != world:
        raise ConfigError(f"{name} is {list(given)}, {len(given)} numbers for {world} ranks: give one per rank")
    return list(given)
