"""All-to-all of encoded rows: every rank sends each rank some of its rows along dim 0, maybe none.

One quantization. A piece's wire is as long as its number of rows and the trailing shape say, which sender and receiver
both know. Ranks know nothing of the other pieces: one that sends and receives nothing takes part all the same.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..codecs.base import Codec
from . import pieces
from .exchange import Workspace


def all_to_all(
    x: torch.Tensor,
    input_splits: list[int],
    output_splits: list[int],
    codec: Codec,
    group: dist.ProcessGroup,
    workspace: Workspace,
) -> tuple[torch.Tensor, int]:
    """x's first input_splits[0] rows go to rank 0, and so on -> (what all ranks sent here, in rank order, a new tensor
    of sum(output_splits) rows; bytes this rank sent)."""
    if dist.get_world_size(group) == 1:
        return x.clone(memory_format=torch.contiguous_format), 0
    out = x.new_empty((sum(output_splits), *x.shape[1:]))
    parts = out.split(output_splits)
    sizes = [codec.wire_nbytes(part.shape) for part in parts]
    wires, sent = pieces.scatter(x.split(input_splits), sizes, codec, group, workspace)
    pieces.decode(wires.split(sizes), codec, parts)
    return out, sent
