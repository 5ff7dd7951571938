"""Machines as the cost model sees them: what their links and their codecs can do. Data, each with its source."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import ConfigError


@dataclass(frozen=True)
class Link:
    """rate: bytes per second and direction that data gets, headers off; of each rank, or if `mesh` of each pair.

    start: seconds before the first byte of an exchange moves. exact_start: of a whole exact all-reduce.
    """

    rate: float
    start: float
    exact_start: float
    mesh: bool = False

    def seconds(self, nbytes: float, world: int) -> float:
        """For `nbytes` from every rank to every other one."""
        return nbytes / self.rate * (1 if self.mesh else world - 1)


@dataclass(frozen=True)
class Machine:
    """encode, decode: bytes of a bf16 message per second that int4 is made of and made to by one rank.

    codec_start: seconds that a codec adds to a call however small. overlap: whether encoding and sending run at the
    same time. flops: of a rank's matrix products as they are reached, per second; None: not known. outer: the link
    between nodes of `node` ranks each, where there are several.
    """

    name: str
    link: Link
    encode: float
    decode: float
    codec_start: float
    overlap: bool
    source: str
    flops: float | None = None
    node: int | None = None
    outer: Link | None = None


GBIT = 1e9 / 8
PAYLOAD = 0.95  # of what TCP sends, the rest are headers
US = 1e-6

_CPU = {"encode": 2.3e9, "decode": 6.6e9, "codec_start": 60 * US, "overlap": True}
_CPU_SOURCE = "codecs: benchmarks/results/codecs.json (one core of an AMD EPYC)"
_CUDA = {"encode": 1.2e12, "decode": 1.2e12, "overlap": False}


def shaped(rate_gbit: float) -> Machine:
    """Network namespaces joined by links of a rate, one CPU core each, gloo: benchmarks/link.py."""
    link = Link(rate_gbit * GBIT * PAYLOAD, 250 * US, 400 * US)
    return Machine(f"shaped {rate_gbit:g} Gbit/s", link, **_CPU, source=_CPU_SOURCE, flops=5e10)


def ethernet(rate_gbit: float) -> Machine:
    """Nodes of eight GPUs behind one network card each, the slow hop."""
    link = Link(rate_gbit * GBIT * PAYLOAD, 15 * US, 40 * US)
    return Machine(
        f"{rate_gbit:g} GbE",
        link,
        **_CUDA,
        codec_start=20 * US,
        source="rate by name; latency and codecs assumed, not measured",
        flops=4e14,
    )


MACHINES = {
    machine.name: machine
    for machine in (
        Machine(
            "4x L40S PCIe",
            Link(11e9, 12 * US, 30 * US),
            **_CUDA | {"encode": 3e11, "decode": 3e11},
            codec_start=18 * US,
            source="PCIe 4 x16 at what rings through the host reach; Flash Communication has 65 % of prefill on 4 L40",
            flops=1.6e14,
        ),
        Machine(
            "A100 NVLink",
            Link(230e9, 8 * US, 12 * US),
            **_CUDA | {"encode": 6e11, "decode": 6e11},
            codec_start=16 * US,
            source="600 GB/s in both directions, three quarters reached; codecs assumed",
            flops=2.2e14,
        ),
        Machine(
            "H100 NVLink",
            Link(350e9, 8 * US, 12 * US),
            **_CUDA,
            codec_start=16 * US,
            source="900 GB/s in both directions, three quarters reached; codecs predicted (docs/performance.md)",
            flops=6e14,
        ),
        Machine(
            "MI300X",
            Link(46e9, 5 * US, 12 * US, mesh=True),
            **_CUDA,
            codec_start=12 * US,
            source="fitted to QuickReduce's table at TP 2, 64 MB: RCCL and Q4",
            flops=5e14,
        ),
        *(ethernet(rate) for rate in (25, 100, 200)),
        *(shaped(rate) for rate in (0.2, 1, 5)),
    )
}


def machine(name: str) -> Machine:
    """Raises ConfigError for a name that is not described."""
    if name not in MACHINES:
        raise ConfigError(f"machine {name!r} is not described: use one of {', '.join(MACHINES)}, or describe it")
    return MACHINES[name]


def joined(inside: Machine, outside: Machine, node: int) -> Machine:
    """Nodes of `node` ranks, with `inside`'s links within and `outside`'s link between them."""
    return replace(inside, name=f"{inside.name}, {outside.name} between", outer=outside.link, node=node)
