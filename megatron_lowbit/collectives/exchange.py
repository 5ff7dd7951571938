"""Moving bytes between ranks over torch.distributed, and the buffers they move through."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist

from ..errors import RankError


class Workspace:
    """Named uint8 buffers that grow to the largest size asked for and are then reused."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device], torch.Tensor] = {}

    def bytes(self, name: str, nbytes: int, device: torch.device) -> torch.Tensor:
        """The first `nbytes` of the buffer, contents undefined."""
        buffer = self._buffers.get((name, device))
        if buffer is None or buffer.numel() < nbytes:
            buffer = self._buffers[name, device] = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return buffer[:nbytes]

    def floats(self, name: str, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
        """An fp32 tensor of `shape`, contents undefined."""
        return self.bytes(name, 4 * shape[0] * shape[1], device).view(torch.float32).view(shape)


def all_gather(output: torch.Tensor, piece: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Every rank's `piece` (uint8, of one length on all ranks) -> output, in rank order."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    gather(output, piece, group=group)


def all_to_all(
    output: torch.Tensor, pieces: torch.Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup
) -> None:
    """pieces: `sent[r]` bytes for each rank r, in order -> output: `received[r]` bytes from each."""
    dist.all_to_all_single(output, pieces, received, sent, group=group)


def compare(facts: dict, group: dist.ProcessGroup) -> None:
    """Check that all ranks hold the same JSON-able `facts`.

    Raises RankError on every rank, naming two ranks and what each of them has, if they do not.
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    cuda = "nccl" in str(dist.get_backend(group))
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    mine = torch.frombuffer(bytearray(json.dumps(facts, sort_keys=True).encode()), dtype=torch.uint8).to(device)
    sizes = torch.empty(world, dtype=torch.int64, device=device)
    all_gather(sizes, torch.tensor([mine.numel()], device=device), group)
    longest = int(sizes.max())
    gathered = torch.zeros(world * longest, dtype=torch.uint8, device=device)
    all_gather(gathered, torch.nn.functional.pad(mine, (0, longest - mine.numel())), group)
    everyone = [
        json.loads(bytes(row[:size].tolist()))
        for row, size in zip(gathered.view(world, longest).cpu(), sizes.tolist(), strict=True)
    ]
    for other, theirs in enumerate(everyone):
        for key in sorted(everyone[0].keys() | theirs.keys()):
            if everyone[0].get(key) != theirs.get(key):
                raise RankError(
                    f"ranks disagree on {key}: rank 0 has {everyone[0].get(key)!r}, rank {other} has "
                    f"{theirs.get(key)!r}; start every rank with the same setting (this is rank {rank})"
                )
