"""What the collectives share: pieces of values, encoded into one buffer, exchanged, and decoded as their sender's.

A rank's own piece takes the same way as everybody's. Ranks may hold different codecs (`Codec.sent_by`), whose wires are
of one length; so what a rank receives is always decoded by the codec of the rank that encoded it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from ..codecs.base import Codec, rows_of
from .exchange import Workspace, all_gather, all_to_all


def scatter(
    pieces: Sequence[torch.Tensor],
    received: list[int],
    codec: Codec,
    group: dist.ProcessGroup,
    workspace: Workspace,
) -> tuple[torch.Tensor, int]:
    """pieces[r], any strides, maybe empty, goes to rank r -> (wires, `received[r]` bytes from each; bytes sent)."""
    device, sizes = pieces[0].device, [codec.wire_nbytes(piece.shape) for piece in pieces]
    wires = workspace.bytes("send", sum(sizes), device)
    for piece, wire in zip(pieces, wires.split(sizes)):
        if wire.numel():
            codec.encode_rows(piece.contiguous().view(rows_of(piece.shape)), wire)
    output = workspace.bytes("receive", sum(received), device)
    all_to_all(output, wires, received, sizes, group)
    return output, sum(sizes) - sizes[dist.get_rank(group)]


def gather(x: torch.Tensor, codec: Codec, group: dist.ProcessGroup, workspace: Workspace) -> tuple[torch.Tensor, int]:
    """x, any strides, not empty, goes to every rank -> (everybody's wires, uint8 [ranks, bytes]; bytes sent)."""
    world, size = dist.get_world_size(group), codec.wire_nbytes(x.shape)
    wire = workspace.bytes("send", size, x.device)
    codec.encode_rows(x.contiguous().view(rows_of(x.shape)), wire)
    wires = workspace.bytes("receive", world * size, x.device)
    all_gather(wires, wire, group)
    return wires.view(world, size), (world - 1) * size


def decode(wires: Iterable[torch.Tensor], codec: Codec, pieces: Iterable[torch.Tensor]) -> None:
    """wires[r], uint8, at least as long as rank r's wire -> pieces[r], contiguous, maybe empty, written in place."""
    for rank, (wire, piece) in enumerate(zip(wires, pieces)):
        if size := codec.wire_nbytes(piece.shape):
            codec.sent_by(rank).reduce_rows(wire[:size].view(1, size), piece.view(rows_of(piece.shape)))
