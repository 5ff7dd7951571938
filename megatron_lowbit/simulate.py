"""N ranks on one device: bit for bit what a group of N ranks would compute, in one process."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import policy
from .codecs import make
from .codecs.base import check_tensor, rows_of
from .collectives.all_reduce import decode_shards, reduce_shard
from .collectives.exchange import Workspace
from .collectives.layout import shard
from .config import CommConfig
from .errors import ConfigError


def all_reduce(partials: Sequence[torch.Tensor], spec: str, algorithm: str = "two-step") -> torch.Tensor:
    """partials: one tensor [..., features] per rank, of one shape and dtype -> the sum every rank would hold.

    algorithm: "one-shot", "two-step", "auto" (what ranks would choose for a message above min_bytes) or "exact" (an
    fp32 sum in rank order; torch's own all-reduce may add in another order). Raises ConfigError.
    """
    partials = _checked(partials)
    x = partials[0]
    config = CommConfig(spec=spec, algorithm=algorithm, min_bytes=0)
    algorithm = policy.choose(config, "simulate", x.numel() * x.itemsize, len(partials), x.device.type).algorithm
    if algorithm == "exact":
        total = x.float()
        for partial in partials[1:]:
            total = total + partial
        return total.to(x.dtype, copy=True)
    scatter, gather = make(config.legs.scatter), make(config.legs.gather)
    return _one_shot(partials, scatter) if algorithm == "one-shot" else _two_step(partials, scatter, gather)


def _one_shot(partials, codec):
    wires = torch.stack([codec.sent_by(rank).encode(x) for rank, x in enumerate(partials)])
    out = torch.empty_like(partials[0])
    codec.reduce_rows(wires, out.view(rows_of(out.shape)))
    return out


def _two_step(partials, scatter, gather):
    x, world, workspace = partials[0], len(partials), Workspace()
    shards = shard(x.shape, (scatter, gather), world)
    slot = max(shards.wire_nbytes(gather))
    gathered = x.new_empty((world, slot), dtype=torch.uint8)
    for rank in range(world):
        wires = torch.stack([scatter.sent_by(peer).encode(shards.of(x, rank)) for peer, x in enumerate(partials)])
        reduce_shard(wires, shards.shape(rank), scatter, gather, gathered[rank], workspace)
    out = torch.empty_like(x)
    decode_shards(gathered, shards, gather, out)
    return out


def _checked(partials: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    if not isinstance(partials, Sequence) or not partials:
        raise ConfigError(f"expected partial sums, got {type(partials).__name__}: pass a list with one tensor per rank")
    for rank, x in enumerate(partials):
        check_tensor(x)
        if x.shape != partials[0].shape or x.dtype != partials[0].dtype:
            raise ConfigError(
                f"rank {rank} has shape {tuple(x.shape)} of {x.dtype}, rank 0 {tuple(partials[0].shape)} of "
                f"{partials[0].dtype}: pass partial sums of one shape and dtype"
            )
    return [x.detach().contiguous() for x in partials]
