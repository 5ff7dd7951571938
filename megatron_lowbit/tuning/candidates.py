"""The ways that a tuner compares: a pure function of what all ranks know alike, or they would time different things."""

from __future__ import annotations

from ..config import ALGORITHMS
from ..tuned_table import EXACT, Candidate

KIB, MIB = 1 << 10, 1 << 20
SIZES = (16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB)  # bytes of the message
CHUNKS = (2 * MIB, 512 * KIB)  # bytes of the message that travel at once, beside all of it


def candidates(nested: bool, device: str, nbytes: int) -> tuple[Candidate, ...]:
    """Exact first, then each algorithm, in chunks of several sizes where chunks can overlap. nested: whether the nodes
    and the spec allow for a hierarchical one."""
    whole = 1 if device == "cpu" else 0  # NCCL's own collectives; others are slower than transfers from rank to rank
    counts = dict.fromkeys((whole, *(max(whole + 1, round(nbytes / size)) for size in CHUNKS if nbytes > size)))
    algorithms = [name for name in ALGORITHMS if name not in ("auto", EXACT)]
    if not nested:
        algorithms = [name for name in algorithms if name != "hierarchical"]
    return (Candidate(EXACT), *(Candidate(name, count) for name in algorithms for count in counts))
