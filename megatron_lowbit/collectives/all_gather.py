"""All-gather of encoded tensors: every rank decodes what every rank sent, itself included.

One quantization, (N - 1) M bytes sent per rank, of a tensor of M encoded bytes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..codecs.base import Codec
from . import pieces
from .exchange import Workspace


def all_gather(
    x: torch.Tensor, dim: int, codec: Codec, group: dist.ProcessGroup, workspace: Workspace
) -> tuple[torch.Tensor, int]:
    """x, of one shape on all ranks -> (all of them along `dim` (from 0 up), a new tensor; bytes this rank sent)."""
    world = dist.get_world_size(group)
    if world == 1 or not x.numel():
        return torch.cat([x.contiguous()] * world, dim), 0
    wires, sent = pieces.gather(x, codec, group, workspace)
    parts = x.new_empty((world, *x.shape))
    pieces.decode(wires, codec, parts)
    return parts.movedim(0, dim).flatten(dim, dim + 1).contiguous(), sent  # along dim 0 nothing is copied
