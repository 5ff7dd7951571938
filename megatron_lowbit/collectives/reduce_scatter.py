"""Reduce-scatter of encoded partial sums: the first half of a two-step all-reduce, cut where the caller says.

Every chunk is encoded as a tensor of its own, so along the last dimension, too, groups start anew with each chunk. One
quantization, (N - 1) / N of the message's encoded bytes sent per rank. Sums are fp32, in rank order, rounded once.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..codecs.base import Codec, rows_of
from . import pieces
from .exchange import Workspace


def reduce_scatter(
    chunks: list[torch.Tensor], codec: Codec, group: dist.ProcessGroup, workspace: Workspace
) -> tuple[torch.Tensor, int]:
    """chunks[r], of one shape: what this rank adds to rank r's sum -> (this rank's sum, a new tensor; bytes sent)."""
    world, own = dist.get_world_size(group), chunks[dist.get_rank(group)]
    if world == 1 or not own.numel():
        return own.clone(memory_format=torch.contiguous_format), 0
    size = codec.wire_nbytes(own.shape)
    wires, sent = pieces.scatter(chunks, [size] * world, codec, group, workspace)
    out = own.new_empty(own.shape)
    codec.reduce_rows(wires.view(world, size), out.view(rows_of(out.shape)))
    return out, sent
