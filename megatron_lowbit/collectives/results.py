"""Memory of large results on CPUs, taken again once a result is gone.

What malloc frees of such sizes it gives back to the system, and a result in fresh pages costs a page fault for each: of
an all-reduce of 8 MiB at 1 Gbit/s, 1.4 of 22 ms (AMD EPYC, 2026-11-22), and of several ranks on one processor more.
Here blocks of a power of two are kept, two of each size and IDLE bytes in all, in huge pages where the system has them.

Hazard: a block is in use until the storage of its result is gone, whoever holds it: a view, or another thread. So the
storage owns a lease, an array over the block, whose end gives the block back.
"""

from __future__ import annotations

import weakref
from collections import defaultdict

import numpy as np
import torch

LEAST = 1 << 20  # bytes: malloc keeps what is smaller
IDLE = 256 << 20
SPARE = 2  # blocks of one size: a layer's result is still there when the next one's is made
ALIGNMENT = 64

_idle: dict[int, list[np.ndarray]] = defaultdict(list)


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """Contiguous, of x's shape, dtype and device, contents undefined."""
    if x.device.type != "cpu" or x.nbytes < LEAST:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    size = 1 << (x.nbytes - 1).bit_length()
    try:
        block = _idle[size].pop()
    except IndexError:
        block = _aligned(size)
    lease = block[: x.nbytes]
    weakref.finalize(lease, _give_back, block).atexit = False
    storage = torch.frombuffer(lease, dtype=x.dtype).untyped_storage()
    return torch.empty(0, dtype=x.dtype).set_(storage, 0, x.shape)  # and not a view, which autograd would ask about


def _give_back(block: np.ndarray) -> None:
    blocks = _idle[block.nbytes]
    if len(blocks) < SPARE and sum(size * len(kept) for size, kept in [*_idle.items()]) + block.nbytes <= IDLE:
        blocks.append(block)


def _aligned(size: int) -> np.ndarray:
    """uint8. NumPy asks for huge pages, torch does not."""
    memory = np.empty(size + ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size]
