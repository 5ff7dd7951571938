"""Megatron's collectives on hidden states [rows, ..., features], compressed, with the gradients of the exact ones.

Rows may be shared unevenly, as experts' tokens are. All-gather and reduce-scatter then pad every rank's rows with zeros
up to the longest, which is what travels and is counted.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import mappings

from megatron_lowbit.communicator import Communicator, communicator
from megatron_lowbit.config import CommConfig

from .compat import group_of
from .straight_through import straight_through

Splits = Iterable[int] | None  # also a tensor or an array
_EXACT = CommConfig(sites=("",))


def reduce(module: torch.nn.Module, partial: torch.Tensor, config: CommConfig, site: str) -> torch.Tensor:
    """The sum of what a row-parallel module made on each rank; with sequence parallelism this rank's rows of it."""
    collective = reduce_scatter if module.sequence_parallel else all_reduce
    return collective(partial, group_of(module), config, site)


def all_reduce(x: torch.Tensor, group: dist.ProcessGroup, config: CommConfig, site: str) -> torch.Tensor:
    comm = _communicator(group, config, site)
    return straight_through(x, lambda x: comm.all_reduce(x, site), lambda grad: grad)


def all_to_all(
    x: torch.Tensor,
    group: dist.ProcessGroup,
    config: CommConfig,
    site: str,
    output_splits: Splits = None,
    input_splits: Splits = None,
) -> torch.Tensor:
    comm, outputs, inputs = _communicator(group, config, site), _counts(output_splits), _counts(input_splits)
    return straight_through(
        x,
        lambda x: comm.all_to_all(x, outputs, inputs, site),
        lambda grad: mappings.all_to_all(group, grad, inputs, outputs),
    )


def all_gather(
    x: torch.Tensor, group: dist.ProcessGroup, config: CommConfig, site: str, splits: Splits = None
) -> torch.Tensor:
    """All ranks' rows, in rank order. splits: how many each has, if not as many as this one."""
    comm, counts = _communicator(group, config, site), _counts(splits)

    def gather(x: torch.Tensor) -> torch.Tensor:
        if counts is None or len(set(counts)) == 1:
            return comm.all_gather(x, 0, site)
        longest = max(counts)
        parts = comm.all_gather(_padded(x, longest), 0, site).split(longest)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    return straight_through(
        x,
        gather,
        lambda grad: mappings.reduce_scatter_to_sequence_parallel_region(grad, group=group, input_split_sizes=counts),
    )


def reduce_scatter(
    x: torch.Tensor, group: dist.ProcessGroup, config: CommConfig, site: str, splits: Splits = None
) -> torch.Tensor:
    """This rank's rows of the sum. splits: how many each rank keeps, if not all as many. x may be fp64, as the router's
    dtype is lent to sums of experts' outputs, which were of the model's; they travel as fp32 then."""
    comm, counts = _communicator(group, config, site), _counts(splits)

    def scatter(x: torch.Tensor) -> torch.Tensor:
        dtype = x.dtype
        x = x.float() if dtype is torch.float64 else x
        if counts is None or len(set(counts)) == 1:
            return comm.reduce_scatter(x, 0, site).to(dtype)
        longest = max(counts)
        x = torch.cat([_padded(part, longest) for part in x.split(counts)])
        return comm.reduce_scatter(x, 0, site)[: counts[group.rank()]].to(dtype)

    return straight_through(
        x,
        scatter,
        lambda grad: mappings.gather_from_sequence_parallel_region(grad, group=group, output_split_sizes=counts),
    )


def _communicator(group: dist.ProcessGroup, config: CommConfig, site: str) -> Communicator:
    """For unselected sites one without a calibration, which would be for another number of ranks than experts'."""
    return communicator(group, config if not config.calibrated or config.selects(site) else _EXACT)


def _padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, rows - x.shape[0]))


def _counts(splits: Splits) -> list[int] | None:
    return None if splits is None else [int(rows) for rows in splits]
