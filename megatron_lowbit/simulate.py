"""N ranks on one device: bit for bit what a group of N ranks would compute, in one process.

calibration, site: for a spec that needs them, the file (or Calibration) and the site whose statistics apply.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache, partial

import torch

from . import policy
from .calibration_file import Calibration
from .codecs import Codec
from .codecs.base import check_tensor, rows_of
from .collectives import layout
from .collectives.all_reduce import decode_shards, reduce_shard
from .collectives.exchange import Workspace
from .collectives.topology import Nodes
from .config import CommConfig
from .errors import ConfigError

Given = str | os.PathLike | Calibration | None


def all_reduce(
    partials: Sequence[torch.Tensor],
    spec: str,
    algorithm: str = "two-step",
    calibration: Given = None,
    site: str | None = None,
    nodes: int | Sequence[object] = 1,
    outer_spec: str | None = None,
) -> torch.Tensor:
    """partials: one tensor [..., features] per rank, of one shape and dtype -> the sum every rank would hold.

    algorithm: "one-shot", "two-step", "hierarchical", "auto" (what ranks would choose for a message above min_bytes) or
    "exact" (an fp32 sum in rank order; torch's own all-reduce may add in another order). nodes: how many equal ones
    there are, the first ranks being on the first, or the name of each rank's node; as for the ranks, "hierarchical" is
    two-step on one. outer_spec: as in CommConfig. Raises ConfigError.
    """
    config = CommConfig(spec, algorithm, min_bytes=0, calibration=calibration, outer_spec=outer_spec)
    return reduced(partials, config, site, nodes)


def reduced(
    partials: Sequence[torch.Tensor],
    config: CommConfig,
    site: str | None = None,
    nodes: int | Sequence[object] = 1,
) -> torch.Tensor:
    """`all_reduce` as a communicator with `config` does it at `site`, which may have a spec of its own in a plan."""
    partials = _checked(partials, "partial sums")
    x, name, world = partials[0], "simulate" if site is None else site, len(partials)
    members = Nodes.among(world, nodes)
    algorithm = policy.choose(config, name, x.nbytes, policy.Facts(world, x.device.type, nodes=members)).algorithm
    if algorithm == "exact":
        total = x.float()
        for partial in partials[1:]:
            total = total + partial
        return total.to(x.dtype, copy=True)
    scatter = _codec(config, "scatter", site, world)
    if algorithm == "one-shot":
        return _one_shot(partials, scatter)
    if algorithm == "hierarchical":
        outer = (_codec(config, leg, site, world) for leg in ("outer scatter", "outer gather"))
        return _hierarchical(partials, members, scatter, *outer)
    return _two_step(partials, scatter, _codec(config, "gather", site, world))


def reduce_scatter(
    partials: Sequence[torch.Tensor], spec: str, dim: int = 0, calibration: Given = None, site: str | None = None
) -> list[torch.Tensor]:
    """partials: one tensor per rank, of one shape and dtype -> what each rank would keep. Raises ConfigError."""
    partials, config = _checked(partials, "partial sums"), CommConfig(spec=spec, calibration=calibration)
    cut = [layout.chunks(x, dim, len(partials)) for x in partials]
    if len(partials) == 1 or not partials[0].numel():
        return [chunk.clone() for chunk in cut[0]]
    codec = _codec(config, "scatter", site, len(partials))
    return [_one_shot(chunks, codec) for chunks in zip(*cut)]


def all_gather(
    parts: Sequence[torch.Tensor], spec: str, dim: int = 0, calibration: Given = None, site: str | None = None
) -> torch.Tensor:
    """parts: one tensor per rank, of one shape and dtype -> what every rank would hold. Raises ConfigError."""
    parts, config = _checked(parts, "tensors"), CommConfig(spec=spec, calibration=calibration)
    codec = _codec(config, "gather", site, len(parts))
    dim = layout.dimension(parts[0], dim)
    return torch.cat([_received(x, codec, rank, len(parts)) for rank, x in enumerate(parts)], dim)


def all_to_all(
    inputs: Sequence[torch.Tensor],
    spec: str,
    input_splits: Sequence[Sequence[int]] | None = None,
    calibration: Given = None,
    site: str | None = None,
) -> list[torch.Tensor]:
    """inputs: one tensor per rank, of one dtype, and of one shape but for dim 0 -> what each rank would receive.

    input_splits: one list per rank, of the rows it sends to each; None: equal parts. Raises ConfigError.
    """
    inputs, config = _checked(inputs, "tensors", rows_differ=True), CommConfig(spec=spec, calibration=calibration)
    world = len(inputs)
    codec = _codec(config, "scatter", site, world)
    if input_splits is None:
        input_splits = [None] * world
    if not isinstance(input_splits, list | tuple) or len(input_splits) != world:
        raise ConfigError(f"input_splits is {input_splits!r}: give a list of {world} lists, one per rank")
    cut = [x.split(layout.rows_sent(x, splits, world)) for x, splits in zip(inputs, input_splits)]
    return [
        torch.cat([_received(pieces[rank], codec, peer, world) for peer, pieces in enumerate(cut)])
        for rank in range(world)
    ]


@lru_cache(maxsize=1024)
def _codec(config: CommConfig, leg: str, site: str | None, world: int) -> Codec:
    """Rank 0's; `sent_by` makes the others'. Kept, as a calibrated one takes time to make; equal configs have equal
    digests of all that they read."""
    for statistics in (config.calibrated, config.planned):
        if statistics is not None and world > 1:
            statistics.check(tp=world)
    return config.codec(leg, site, rank=0)


def _received(x: torch.Tensor, codec: Codec, sender: int, world: int) -> torch.Tensor:
    codec = codec.sent_by(sender)
    return x if world == 1 else codec.decode(codec.encode(x), x.shape, x.dtype)


def _encoded(partials: Sequence[torch.Tensor], codec: Codec) -> torch.Tensor:
    """Every rank's wire of what is cut alike on all: uint8 [ranks, bytes]."""
    rows = rows_of(partials[0].shape)
    wires = partials[0].new_empty((len(partials), codec.wire_nbytes(rows)), dtype=torch.uint8)
    if wires.numel():
        for rank, (x, wire) in enumerate(zip(partials, wires, strict=True)):
            codec.sent_by(rank).encode_rows(x.contiguous().view(rows), wire)
    return wires


def _one_shot(partials, codec):
    wires = _encoded(partials, codec)
    out = partials[0].new_empty(partials[0].shape)
    codec.reduce_rows(wires, out.view(rows_of(out.shape)))
    return out


def _two_step(partials, scatter, gather):
    """Which rank reduces which rows makes no difference to them: so there are as few shards as memory allows, with the
    wires of one no larger than a partial sum. Ranks have N of them, and N times N calls of the codec would be slow."""
    return _by_shards(partials, (scatter, gather), partial(_encoded, codec=scatter))


def _hierarchical(partials, nodes, inside, scatter, gather):
    """As `_two_step`, of each node's sum in place of each rank's values."""

    def between(pieces):
        shape, workspace = rows_of(pieces[0].shape), Workspace()
        wires = pieces[0].new_empty((len(nodes.members), scatter.wire_nbytes(shape)), dtype=torch.uint8)
        for members, wire in zip(nodes.members, wires):
            own = _encoded([pieces[rank] for rank in members], inside)
            reduce_shard(own, shape, inside, scatter, wire, workspace)
        return wires

    return _by_shards(partials, (scatter, gather, inside), between)


def _by_shards(partials, codecs, encoded):
    """codecs: of the wires that `encoded` makes of a shard, of all ranks; of what their sum travels as; and others."""
    (x, *_), (scatter, gather, *_), workspace = partials, codecs, Workspace()
    wires = len(partials) * max(codec.wire_nbytes(x.shape) for codec in codecs)
    parts = min(len(partials), max(1, -(-wires // max(1, x.nbytes))))
    shards = layout.shard(x.shape, codecs, parts)
    slot = max(shards.wire_nbytes(gather))
    gathered = x.new_empty((parts, slot), dtype=torch.uint8)
    for part in range(parts):
        wires = encoded([shards.of(x, part) for x in partials])
        reduce_shard(wires, shards.shape(part), scatter, gather, gathered[part], workspace)
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
