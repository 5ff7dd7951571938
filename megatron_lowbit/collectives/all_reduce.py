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
from . import pieces
from .exchange import Workspace, all_gather, guarded
from .layout import Shards, shard


def one_shot(x: torch.Tensor, codec: Codec, group: dist.ProcessGroup, workspace: Workspace) -> tuple[torch.Tensor, int]:
    """x contiguous, not empty -> (sum over the group, a new tensor of x's shape and dtype; bytes this rank sent)."""
    wires, sent = pieces.gather(x, codec, group, workspace)
    out = torch.empty_like(x)
    codec.reduce_rows(wires, out.view(rows_of(x.shape)))
    return out, sent


def two_step(
    x: torch.Tensor, scatter: Codec, gather: Codec, group: dist.ProcessGroup, workspace: Workspace
) -> tuple[torch.Tensor, int]:
    """As `one_shot`, with one codec per hop."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    shards = shard(x.shape, (scatter, gather), world)
    size = scatter.wire_nbytes(shards.shape(rank))
    shares = [shards.of(x, peer) for peer in range(world)]
    received, sent = pieces.scatter(shares, [size] * world, scatter, group, workspace)

    slot = max(shards.wire_nbytes(gather))  # all-gather wants one length
    summed = workspace.bytes("send", slot, x.device)
    reduce_shard(received.view(world, -1), shards.shape(rank), scatter, gather, summed, workspace)
    gathered = workspace.bytes("receive", world * slot, x.device)
    all_gather(gathered, summed, group)
    out = torch.empty_like(x)
    decode_shards(gathered.view(world, slot), shards, gather, out)
    return out, sent + (world - 1) * slot


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
    pieces.decode(wires, gather, [shards.of(out, rank) for rank in range(len(wires))])


def exact(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """torch.distributed's own all-reduce, on a copy."""
    out = x.clone(memory_format=torch.contiguous_format)
    with guarded(group):
        dist.all_reduce(out, group=group)
    return out
