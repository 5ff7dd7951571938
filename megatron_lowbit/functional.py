"""The collectives as functions, in place of torch.distributed's: one call, one spec.

spec: one leg for all, or "scatter/gather": reduce_scatter and all_to_all use the first leg, all_gather the second,
all_reduce both. group: default all ranks. Results are new tensors of x's dtype. The first call of a group with other
settings is where its ranks compare them. Each raises ConfigError (value and remedy in the message) and RankError, as
the method of `Communicator` does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from .codecs.base import check_tensor
from .communicator import communicator
from .config import CommConfig


def all_reduce(
    x: torch.Tensor,
    spec: str,
    group: dist.ProcessGroup | None = None,
    algorithm: str = "auto",
    min_bytes: int | None = None,
    outer_spec: str | None = None,
) -> torch.Tensor:
    """Sum of x [..., features] (bf16, fp16 or fp32) over `group`. algorithm … outer_spec: as in CommConfig."""
    check_tensor(x)
    config = CommConfig(spec=spec, algorithm=algorithm, min_bytes=min_bytes, outer_spec=outer_spec)
    return communicator(group, config).all_reduce(x)


def all_reduce_add_rmsnorm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    spec: str,
    group: dist.ProcessGroup | None = None,
    algorithm: str = "auto",
    min_bytes: int | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    outer_spec: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(RMSNorm of the new residual, new residual), where that is all_reduce(x) + residual; see Communicator."""
    check_tensor(x)
    config = CommConfig(spec=spec, algorithm=algorithm, min_bytes=min_bytes, outer_spec=outer_spec)
    return communicator(group, config).all_reduce_add_rmsnorm(x, residual, weight, eps, offset)


def reduce_scatter(x: torch.Tensor, spec: str, group: dist.ProcessGroup | None = None, dim: int = 0) -> torch.Tensor:
    """Sum of x over `group`, of which rank r keeps the r-th of N equal chunks along `dim`."""
    check_tensor(x)
    return communicator(group, CommConfig(spec=spec)).reduce_scatter(x, dim)


def all_gather(x: torch.Tensor, spec: str, group: dist.ProcessGroup | None = None, dim: int = 0) -> torch.Tensor:
    """All ranks' x, of one shape, along `dim` in rank order."""
    check_tensor(x)
    return communicator(group, CommConfig(spec=spec)).all_gather(x, dim)


def all_to_all(
    x: torch.Tensor,
    spec: str,
    group: dist.ProcessGroup | None = None,
    output_splits: Sequence[int] | None = None,
    input_splits: Sequence[int] | None = None,
) -> torch.Tensor:
    """Along dim 0, input_splits[r] rows of x go to rank r, and output_splits[r] rows come from it.

    Without input_splits x is cut into equal parts; without both, so is what comes.
    """
    check_tensor(x)
    return communicator(group, CommConfig(spec=spec)).all_to_all(x, output_splits, input_splits)
