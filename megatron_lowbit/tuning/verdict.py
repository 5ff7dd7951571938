"""Whether an algorithm computes what it should, on every rank: asked before it is timed.

A result must be finite; the same bits on every rank; on some rows, which lie in every part of the message, bit for bit
what one process computes from all ranks' values (simulate.py); and on every other row no farther from the exact sum
than on those, but for chance. As values are random, a row that went astray is as wrong as the values are large.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
import torch.distributed as dist

from ..collectives import exchange

ROWS = 128
TOLERANCE = 1.5  # of squared errors of rows of thousands of values, which scatter by some 10 %
FLAWS = ("not finite", "not what one process computes from the same values", "too far from the exact sum")


class Message:
    """One message, what exact reduction makes of it, and some rows of what each rank holds. Made by a collective call.

    x, total: [rows, features], of one dtype and device.
    """

    def __init__(self, x: torch.Tensor, total: torch.Tensor, group: dist.ProcessGroup) -> None:
        self.x, self.total, self._group = x, total, group
        self._world = dist.get_world_size(group)
        self._rows = torch.linspace(0, len(x) - 1, min(ROWS, len(x)), dtype=torch.float64).long().to(x.device)
        own = x[self._rows].contiguous()
        everyone = own.new_empty((self._world, *own.shape))
        exchange.all_gather(everyone.view(torch.uint8).view(-1), own.view(torch.uint8).view(-1), group)
        self._partials = list(everyone)

    def expected(self, simulate: Callable[[list[torch.Tensor]], torch.Tensor]) -> torch.Tensor:
        """What `simulate` makes of some rows of all ranks."""
        return simulate(self._partials)

    def flaw(self, result: torch.Tensor, expected: torch.Tensor) -> str | None:
        """Why `result` is wrong, in the same words on every rank; None if it is right on all. A collective call."""
        errors = (result.float() - self.total.float()).square().sum(-1)
        passed = (
            bool(result.isfinite().all()),
            torch.equal(result[self._rows], expected),
            bool(errors.max() <= TOLERANCE * errors[self._rows].max()),
        )
        digest = hashlib.blake2b(result.contiguous().view(torch.uint8).cpu().numpy(), digest_size=8).digest()
        own = torch.tensor([int.from_bytes(digest, "little", signed=True), *passed], device=result.device)
        everyone = torch.empty(self._world * len(own), dtype=own.dtype, device=own.device)
        exchange.all_gather(everyone.view(torch.uint8), own.view(torch.uint8), self._group)
        digests, *verdicts = everyone.view(self._world, len(own)).cpu().T.tolist()
        found = [
            f"{flaw} on rank {', '.join(str(rank) for rank, fine in enumerate(ranks) if not fine)}"
            for flaw, ranks in zip(FLAWS, verdicts, strict=True)
            if not all(ranks)
        ]
        if len(set(digests)) > 1:
            others = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
            found.append(f"other values on rank {', '.join(others)} than on rank 0")
        return "; ".join(found) or None
