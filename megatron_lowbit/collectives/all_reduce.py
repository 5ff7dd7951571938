"""All-reduce of encoded partial sums (two-step: Flash Communication V1, Algorithm 1; one-shot: Dong et al., section 3).

    one-shot   encode; all-gather the wires; every rank decodes and sums all of them.
               1 quantization, (N - 1) M bytes sent per rank.
    two-step   encode one shard per rank; all-to-all; decode, sum and encode the own shard; all-gather; decode.
               2 quantizations, 2 (N - 1) / N M bytes.

Sums are fp32, in rank order, of decoded wires only: a rank's own values go through the codec like everybody's, so every
rank ends with the same bits. A shard's result depends on nothing but that shard's values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..codecs import fused
from ..codecs.base import Codec, rows_of
from . import pieces, results
from .exchange import Workspace, all_gather, all_to_all, guarded
from .layout import Shards, shard


@dataclass(frozen=True)
class Summands:
    """What an all-reduce leaves on every rank: wires uint8 [ranks, bytes], the same everywhere, yet to be decoded.

    shards: how the message was cut, with one shard in each wire; None: each wire is a whole message, and the sum of all
    is the result. sent: bytes this rank handed to the network.
    """

    wires: torch.Tensor
    codec: Codec
    shards: Shards | None
    sent: int

    def result(self, x: torch.Tensor) -> torch.Tensor:
        """The sum, a new contiguous tensor of x's shape and dtype."""
        out = results.empty_like(x)
        if self.shards is None:
            self.codec.reduce_rows(self.wires, out.view(rows_of(x.shape)))
        else:
            decode_shards(self.wires, self.shards, self.codec, out)
        return out

    def add_rmsnorm(
        self, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(RMSNorm of the sum + residual, the sum + residual): new tensors like residual, contiguous."""
        normed, summed, shape = results.empty_like(residual), results.empty_like(residual), rows_of(residual.shape)
        tensors = residual.view(shape), weight.contiguous(), eps, offset, normed.view(shape), summed.view(shape)
        fused.reduce_add_rmsnorm(self.codec, self.wires, self.shards and self.shards.bounds, *tensors)
        return normed, summed


def one_shot(x: torch.Tensor, codec: Codec, group: dist.ProcessGroup, workspace: Workspace) -> Summands:
    """x contiguous, not empty."""
    wires, sent = pieces.gather(x, codec, group, workspace)
    return Summands(wires, codec, None, sent)


def two_step(
    x: torch.Tensor, scatter: Codec, gather: Codec, group: dist.ProcessGroup, workspace: Workspace
) -> Summands:
    """As `one_shot`, with one codec per hop."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    shards = shard(x.shape, (scatter, gather), world)
    lengths = shards.wire_nbytes(scatter)
    wires = workspace.bytes("send", sum(lengths), x.device)
    fused.encode_shards(scatter, shards.of_all(x), shards.bounds, wires)
    received = workspace.bytes("receive", world * lengths[rank], x.device)
    all_to_all(received, wires, [lengths[rank]] * world, lengths, group)

    slot = max(shards.wire_nbytes(gather))  # all-gather wants one length
    summed = workspace.bytes("send", slot, x.device)
    reduce_shard(received.view(world, -1), shards.shape(rank), scatter, gather, summed, workspace)
    gathered = workspace.bytes("receive", world * slot, x.device)
    all_gather(gathered, summed, group)
    sent = sum(lengths) - lengths[rank] + (world - 1) * slot
    return Summands(gathered.view(world, slot), gather, shards, sent)


def reduce_shard(
    wires: torch.Tensor, shape: tuple[int, int], scatter: Codec, gather: Codec, out: torch.Tensor, workspace: Workspace
) -> None:
    """The middle of two-step: wires uint8 [ranks, bytes] of one shard -> its sum's wire, at the start of `out`."""
    if size := gather.wire_nbytes(shape):
        scratch = lambda: workspace.floats("sum", shape, out.device)  # noqa: E731
        fused.reduce_encode(scatter, wires, gather, shape, out[:size], scratch)
    out[size:] = 0


def decode_shards(wires: torch.Tensor, shards: Shards, gather: Codec, out: torch.Tensor) -> None:
    """The end of two-step: wires uint8 [ranks, slot], each holding its rank's shard -> out, of the message's shape."""
    fused.decode_shards(gather, wires, shards.bounds, shards.of_all(out))


def exact(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """torch.distributed's own all-reduce, on a copy."""
    out = results.empty_like(x).copy_(x)
    with guarded(group):
        dist.all_reduce(out, group=group)
    return out
