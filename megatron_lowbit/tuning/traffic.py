"""What an all-reduce sends, encodes and decodes: counted, whatever the machine. Formulas: docstrings in collectives/.

M bytes of a bf16 message, N ranks, in K nodes of L. Of each hop, for one rank, and before they are encoded:

    one-shot       M to each of N - 1 others; encodes M, decodes N M.
    two-step       M / N to each of N - 1 others, twice; encodes M and M / N; decodes M twice.
    hierarchical   inside M / L to each of L - 1; between nodes M / (L K) to each of K - 1, twice; inside again
                   what came from there, as it is: M / L to each of L - 1. Encodes M, M / L and M / (L K); decodes M,
                   M / L and M.
    exact          a ring: 2 (N - 1) M / N.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError

ALGORITHMS = ("exact", "one-shot", "two-step", "hierarchical")


@dataclass(frozen=True)
class Hop:
    """One exchange, as a rank sees it; sizes are bytes of the bf16 message, before they are encoded.

    leg: whose codec it is, "scatter", "gather", or of the slow links "outer scatter", "outer gather". inside, between:
    ranks of its own node, and of other ones, that it sends `each` to. encoded, decoded: bytes.
    """

    leg: str
    each: float
    inside: int
    between: int
    encoded: float
    decoded: float

    @property
    def messages(self) -> int:
        return self.inside + self.between

    @property
    def sent(self) -> float:
        return self.each * self.messages


def hops(algorithm: str, nbytes: float, world: int, node: int | None = None) -> list[Hop]:
    """In order, of a message of `nbytes` in bf16. node: ranks per node, None: all are in one.

    Raises ConfigError for an algorithm without a codec, and for nodes that are not equal or not several.
    """
    size = min(node or world, world)
    near, far = size - 1, world - size
    if algorithm == "one-shot":
        return [Hop("scatter", nbytes, near, far, nbytes, world * nbytes)]
    if algorithm == "two-step":
        shard = nbytes / world
        return [Hop("scatter", shard, near, far, nbytes, nbytes), Hop("gather", shard, near, far, shard, nbytes)]
    if algorithm != "hierarchical":
        raise ConfigError(f"algorithm {algorithm!r} is not modelled: use one of {', '.join(ALGORITHMS)}")
    if world % size or world == size or size == 1:
        raise ConfigError(
            f"hierarchical is for several equal nodes of several ranks, not for {world} ranks, {size} in a node"
        )
    nodes = world // size
    shard, part = nbytes / size, nbytes / world
    return [
        Hop("scatter", shard, near, 0, nbytes, nbytes),
        Hop("outer scatter", part, 0, nodes - 1, shard, shard),
        Hop("outer gather", part, 0, nodes - 1, part, 0.0),
        Hop("outer gather", shard, near, 0, 0.0, nbytes),
    ]


def ring_bytes(nbytes: float, world: int) -> float:
    """What a rank sends in an exact all-reduce."""
    return 2 * (world - 1) / world * nbytes
