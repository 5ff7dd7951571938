"""All-reduce of encoded partial sums (two-step: Flash Communication V1, Algorithm 1; one-shot: Dong et al., section 3).

    one-shot   encode; all-gather the wires; every rank decodes and sums all of them.
               1 quantization, (N - 1) M bytes sent per rank.
    two-step   encode one shard per rank; all-to-all; decode, sum and encode the own shard; all-gather; decode.
               2 quantizations, 2 (N - 1) / N M bytes.

Sums are fp32, in rank order, of decoded wires only: a rank's own values go through the codec like everybody's, so every
rank ends with the same bits. A shard's result depends on nothing but that shard's values.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..codecs.base import Codec, rows_of
from .exchange import Workspace, all_gather, all_to_all, guarded
from .layout import Shards, shard


def one_shot(x: torch.Tensor, codec: Codec, group: dist.ProcessGroup, workspace: Workspace) -> tuple[torch.Tensor, int]:
    """x contiguous, not empty -> (sum over the group, a new tensor of x's shape and dtype; bytes this rank sent)."""
    world, size = dist.get_world_size(group), codec.wire_nbytes(x.shape)
    wire = workspace.bytes("send", size, x.device)
    wires = workspace.bytes("receive", world * size, x.device)
    codec.encode_rows(x.view(rows_of(x.shape)), wire)
    all_gather(wires, wire, group)
    out = torch.empty_like(x)
    codec.reduce_rows(wires.view(world, size), out.view(rows_of(x.shape)))
    return out, (world - 1) * size


def two_step(
    x: torch.Tensor, scatter: Codec, gather: Codec, group: dist.ProcessGroup, workspace: Workspace
) -> tuple[torch.Tensor, int]:
    """As `one_shot`, with one codec per hop."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    shards = shard(x.shape, (scatter, gather), world)
    sizes = shards.wire_nbytes(scatter)
    pieces = workspace.bytes("send", sum(sizes), x.device)
    for peer, piece in enumerate(pieces.split(sizes)):
        if piece.numel():
            scatter.encode_rows(shards.of(x, peer), piece)
    received = workspace.bytes("receive", world * sizes[rank], x.device)
    all_to_all(received, pieces, [sizes[rank]] * world, sizes, group)

    slot = max(shards.wire_nbytes(gather))  # all-gather wants one length
    summed = workspace.bytes("send", slot, x.device)
    reduce_shard(received.view(world, -1), shards.shape(rank), scatter, gather, summed, workspace)
    gathered = workspace.bytes("receive", world * slot, x.device)
    all_gather(gathered, summed, group)
    out = torch.empty_like(x)
    decode_shards(gathered.view(world, slot), shards, gather, out)
    return out, sum(sizes) - sizes[rank] + (world - 1) * slot


def reduce_shard(
    wires: torch.Tensor, shape: tuple[int, int], scatter: Codec, gather: Codec, out: torch.Tensor, workspace: Workspace
) -> None:
    """The middle of two-step: wires uint8 [ranks, bytes] of one shard -> its sum's wire, at the start of `out`."""
    size = gather.wire_nbytes(shape)
    if size:
        if scatter.transform == gather.transform:  # a transform that both legs share stays on in between
            scatter, gather = scatter.inner, gather.inner
        total = workspace.floats("sum", shape, out.device)
        scatter.reduce_rows(wires, total)
        gather.encode_rows(total, out[:size])
    out[size:] = 0


def decode_shards(wires: torch.Tensor, shards: Shards, gather: Codec, out: torch.Tensor) -> None:
    """The end of two-step: wires uint8 [ranks, slot], each holding its rank's shard -> out, of the message's shape."""
    for peer, size in enumerate(shards.wire_nbytes(gather)):
        if size:
            gather.sent_by(peer).reduce_rows(wires[peer : peer + 1, :size], shards.of(out, peer))


def exact(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """torch.distributed's own all-reduce, on a copy."""
    out = x.clone(memory_format=torch.contiguous_format)
    with guarded(group):
        dist.all_reduce(out, group=group)
    return out
