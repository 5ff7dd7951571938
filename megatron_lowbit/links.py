"""Kinds of links, and from which size on compression pays on each: data, with where it was measured.

Two thresholds: `eligible`, below which a message stays exact whatever the codec, as latency is all it costs; and
`worth`, from which on a codec gains more than it takes, which depends on the codec. What is not known is decided by
size alone. `megatron-lowbit tune` replaces all of this by what is measured on the machine itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from .errors import ConfigError
from .spec import Spec

NEVER = 1 << 62
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Link:
    """A kind of link.

    gbit: it is one on which an exact all-reduce reaches at most so many Gbit/s per rank. eligible: bytes, see above.
    worth: (ranks at least, bytes for most codecs, for trellis codes, for split outliers). unit: n * n of so many
    bytes travel in n chunks, ranks being 2, and MANY; 0: no chunks, but the backend's own collectives. direct: bytes of
    an exact message up to which more than two ranks send it to each other as it is, and up to which they send shards
    of it; larger ones are left to torch's ring, which keeps ranks in step.
    """

    name: str
    gbit: float
    eligible: int
    worth: tuple[tuple[int, int, int, int], ...]
    unit: tuple[int, int]
    direct: tuple[int, int]
    source: str

    def __post_init__(self) -> None:
        for ranks, *sizes in self.worth:
            if min(sizes) < self.eligible:
                raise ConfigError(
                    f"link {self.name!r}: worth compressing from {min(sizes)} bytes with {ranks} ranks, but eligible "
                    f"only from {self.eligible}: raise the first or lower the second"
                )

    def worth_from(self, spec: Spec, world: int) -> int:
        """Bytes from which on `spec` gains among `world` ranks."""
        legs = spec.scatter, spec.gather
        column = 3 if any(leg.calibrated for leg in legs) else 2 if any(leg.trellis for leg in legs) else 1
        return max((ranks, *sizes) for ranks, *sizes in self.worth if world >= ranks)[column]

    def chunks(self, nbytes: int, world: int, hierarchical: bool = False) -> int:
        """In how many parts a compressed message travels: each costs a call, so the best number grows as the root."""
        unit = self.unit[world > 2] * max(1.0, world / MANY) ** 2 * (HIERARCHICAL if hierarchical else 1)
        return max(1, round((nbytes / unit) ** 0.5)) if unit else 0

    def exact_way(self, nbytes: int, world: int) -> str:
        """How a message that stays as it is goes directly from rank to rank; "": it had better not."""
        once, most = (EXACT_MOST, 0) if world == 2 else self.direct
        return "one-shot" if nbytes <= once else "two-step" if nbytes <= most else ""


_MEASURED = "benchmarks/results/link.json: gloo, AMD EPYC with 2 cores, 2026-11-22"
KIB, MIB = 1 << 10, 1 << 20
MANY = 4  # ranks for which the units of more than two are; of N ranks each chunk has as N * N messages
HIERARCHICAL = 4  # times as large are its units: chunks go through twice as many exchanges, which wait for each other
EXACT_UNIT = 32 * KIB  # as `unit`, of an exact message between two ranks, on the slow, the medium and the fast link
EXACT_MOST = MIB  # bytes of one up to which two ranks gain on all of them; larger ones take as long as torch's
LINKS: dict[str, tuple[Link, ...]] = {
    "cpu": (
        Link("slow", 0.5, 16 * KIB, ((2, 16 * KIB, 16 * KIB, 32 * KIB), (3, 32 * KIB, 32 * KIB, 256 * KIB)),
             (32 * KIB, 48 * KIB), (32 * KIB, 128 * KIB), _MEASURED),
        Link("medium", 2.0, 64 * KIB, ((2, 64 * KIB, 64 * KIB, 256 * KIB), (3, 256 * KIB, 256 * KIB, 4 * MIB)),
             (32 * KIB, 128 * KIB), (64 * KIB, 128 * KIB), _MEASURED),
        Link("fast", float("inf"), MIB, ((2, 2 * MIB, NEVER, 4 * MIB), (3, 8 * MIB, NEVER, NEVER)),
             (MIB, 2 * MIB), (256 * KIB, MIB), _MEASURED),
        Link(UNKNOWN, float("inf"), 128 * KIB, ((2, 128 * KIB, 128 * KIB, 128 * KIB),),
             (512 * KIB, 512 * KIB), (32 * KIB, 128 * KIB),
             f"from this size on all gain on the slow and the medium link: {_MEASURED}"),
    ),
    "cuda": (
        Link(UNKNOWN, float("inf"), 2 * MIB, ((2, 2 * MIB, 2 * MIB, 2 * MIB),), (0, 0), (0, 0),
             "not measured here: upper end of the 1-2 MB published for INT4 on MI300X, vLLM pull 19744"),
    ),
}  # fmt: skip


def named(device: str, name: str) -> Link:
    """The kind of link called `name` on a device type like "cuda". Raises ConfigError."""
    kinds = LINKS.get(device, LINKS["cpu"])
    found = [link for link in kinds if link.name == name]
    if not found:
        raise ConfigError(f"link {name!r} is unknown: use one of {', '.join(link.name for link in kinds)}")
    return found[0]


def reaching(gbit: float) -> Link:
    """The kind on which ranks on CPUs reach `gbit`."""
    return next(link for link in LINKS["cpu"] if gbit <= link.gbit)


def from_environment(device: str) -> Link | None:
    """What LOWBIT_LINK says, if it is set. Raises ConfigError."""
    name = os.environ.get("LOWBIT_LINK", "")
    return named(device, name) if name else None
