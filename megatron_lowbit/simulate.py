"""N ranks on one device: bit for bit what a group of N ranks would compute, in one process."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import policy
from .codecs import Codec, make
from .codecs.base import check_tensor, rows_of
from .collectives import layout
from .collectives.all_reduce import decode_shards, reduce_shard
from .collectives.exchange import Workspace
from .config import CommConfig
from .errors import ConfigError
from .spec import parse


def all_reduce(partials: Sequence[torch.Tensor], spec: str, algorithm: str = "two-step") -> torch.Tensor:
    """partials: one tensor [..., features] per rank, of one shape and dtype -> the sum every rank would hold.

    algorithm: "one-shot", "two-step", "auto" (what ranks would choose for a message above min_bytes) or "exact" (an
    fp32 sum in rank order; torch's own all-reduce may add in another order). Raises ConfigError.
    """
    partials = _checked(partials, "partial sums")
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


def reduce_scatter(partials: Sequence[torch.Tensor], spec: str, dim: int = 0) -> list[torch.Tensor]:
    """partials: one tensor per rank, of one shape and dtype -> what each rank would keep. Raises ConfigError."""
    partials, codec = _checked(partials, "partial sums"), make(parse(spec).scatter)
    cut = [layout.chunks(x, dim, len(partials)) for x in partials]
    if len(partials) == 1 or not partials[0].numel():
        return [chunk.clone() for chunk in cut[0]]
    return [_one_shot(chunks, codec) for chunks in zip(*cut)]


def all_gather(parts: Sequence[torch.Tensor], spec: str, dim: int = 0) -> torch.Tensor:
    """parts: one tensor per rank, of one shape and dtype -> what every rank would hold. Raises ConfigError."""
    parts, codec = _checked(parts, "tensors"), make(parse(spec).gather)
    dim = layout.dimension(parts[0], dim)
    return torch.cat([_received(x, codec, rank, len(parts)) for rank, x in enumerate(parts)], dim)


def all_to_all(
    inputs: Sequence[torch.Tensor], spec: str, input_splits: Sequence[Sequence[int]] | None = None
) -> list[torch.Tensor]:
    """inputs: one tensor per rank, of one dtype, and of one shape but for dim 0 -> what each rank would receive.

    input_splits: one list per rank, of the rows it sends to each; None: equal parts. Raises ConfigError.
    """
    inputs, codec = _checked(inputs, "tensors", rows_differ=True), make(parse(spec).scatter)
    world = len(inputs)
    if input_splits is None:
        input_splits = [None] * world
    if not isinstance(input_splits, list | tuple) or len(input_splits) != world:
        raise ConfigError(f"input_splits is {input_splits!r}: give a list of {world} lists, one per rank")
    cut = [x.split(layout.rows_sent(x, splits, world)) for x, splits in zip(inputs, input_splits)]
    return [
        torch.cat([_received(pieces[rank], codec, peer, world) for peer, pieces in enumerate(cut)])
        for rank in range(world)
    ]


def _received(x: torch.Tensor, codec: Codec, sender: int, world: int) -> torch.Tensor:
    codec = codec.sent_by(sender)
    return x if world == 1 else codec.decode(codec.encode(x), x.shape, x.dtype)


def _one_shot(partials, codec):
    wires = torch.stack([codec.sent_by(rank).encode(x) for rank, x in enumerate(partials)])
    out = partials[0].new_empty(partials[0].shape)
    codec.reduce_rows(wires, out.view(rows_of(out.shape)))
    return out


def _two_step(partials, scatter, gather):
    x, world, workspace = partials[0], len(partials), Workspace()
    shards = layout.shard(x.shape, (scatter, gather), world)
    slot = max(shards.wire_nbytes(gather))
    gathered = x.new_empty((world, slot), dtype=torch.uint8)
    for rank in range(world):
        wires = torch.stack([scatter.sent_by(peer).encode(shards.of(x, rank)) for peer, x in enumerate(partials)])
        reduce_shard(wires, shards.shape(rank), scatter, gather, gathered[rank], workspace)
    out = torch.empty_like(x)
    decode_shards(gathered, shards, gather, out)
    return out


def _checked(tensors: Sequence[torch.Tensor], what: str, rows_differ: bool = False) -> list[torch.Tensor]:
    if not isinstance(tensors, Sequence) or not tensors:
        raise ConfigError(f"expected {what}, got {type(tensors).__name__}: pass a list with one tensor per rank")
    for rank, x in enumerate(tensors):
        check_tensor(x)
        alike = x.shape[1:] == tensors[0].shape[1:] if rows_differ else x.shape == tensors[0].shape
        if not alike or x.dtype != tensors[0].dtype:
            raise ConfigError(
                f"rank {rank} has shape {tuple(x.shape)} of {x.dtype}, rank 0 {tuple(tensors[0].shape)} of "
                f"{tensors[0].dtype}: pass {what} of one shape{' behind dim 0' if rows_differ else ''} and dtype"
            )
    return [x.detach().contiguous() for x in tensors]
