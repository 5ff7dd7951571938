"""How long an all-reduce takes, modelled: latency, bandwidth and codec throughput (Hockney's model, per exchange).

Every figure from here is modelled, and must be called that where it is shown. What the model knows: bytes that cross
links, as the algorithms send them; when an exchange starts; how fast values are encoded and decoded, and whether that
overlaps with sending. What it does not know: contention, jitter, kernels that share a device with a product.
"""

from __future__ import annotations

from dataclasses import dataclass

from .machines import Link, Machine

HALF = 2  # bytes of a bf16 value


@dataclass(frozen=True)
class Way:
    """How a message is reduced: "exact", "one-shot", "two-step" or "hierarchical"; bits per value of both hops.

    outer_bits: of the hop between nodes, hierarchical only. speed: of the codec, relative to int4's.
    """

    algorithm: str
    scatter_bits: float = 16.0
    gather_bits: float = 16.0
    outer_bits: float | None = None
    speed: float = 1.0


@dataclass(frozen=True)
class Cost:
    """Seconds. wire: bytes on links; codec: encoding and decoding; start: what even an empty message takes."""

    wire: float
    codec: float
    start: float
    overlap: bool

    @property
    def total(self) -> float:
        if not self.overlap:
            return self.start + self.wire + self.codec
        return self.start + max(self.wire, self.codec) + FILL * min(self.wire, self.codec)


FILL = 0.25  # of what overlaps: the first chunk's encoding and the last one's decoding overlap with nothing


def all_reduce(machine: Machine, way: Way, nbytes: float, world: int) -> Cost:
    """Of a message of `nbytes` in bf16 among `world` ranks. Raises ValueError for an algorithm that is not known."""
    if world == 1:
        return Cost(0.0, 0.0, 0.0, False)
    if way.algorithm == "exact":
        link = machine.outer if machine.outer and world > (machine.node or world) else machine.link
        return Cost(2 * link.seconds(nbytes / world, world), 0.0, link.exact_start, False)
    if way.algorithm == "one-shot":
        wire = machine.link.seconds(nbytes * way.scatter_bits / 16, world)
        return _coded(machine, way, wire, encoded=nbytes, decoded=world * nbytes, rounds=1)
    if way.algorithm == "two-step":
        return _coded(machine, way, _two_step_wire(machine.link, way, nbytes, world), *_two_step(nbytes, world))
    if way.algorithm == "hierarchical":
        return _hierarchical(machine, way, nbytes, world)
    raise ValueError(f"algorithm {way.algorithm!r} is not modelled")


def _hierarchical(machine: Machine, way: Way, nbytes: float, world: int) -> Cost:
    """Two-step within nodes; in between each rank's shard is all-reduced with its peers of the other nodes."""
    inner = machine.node or world
    nodes = world // inner
    wire = _two_step_wire(machine.link, way, nbytes, inner)
    encoded, decoded, rounds = _two_step(nbytes, inner)
    if nodes > 1:
        shard, bits = nbytes / inner, way.outer_bits or way.scatter_bits
        # All ranks of a node share its uplink.
        wire += inner * _two_step_wire(machine.outer or machine.link, Way("two-step", bits, bits), shard, nodes)
        more = _two_step(shard, nodes)
        encoded, decoded, rounds = encoded + more[0], decoded + more[1], rounds + more[2]
    return _coded(machine, way, wire, encoded, decoded, rounds)


def _two_step_wire(link: Link, way: Way, nbytes: float, world: int) -> float:
    return link.seconds(nbytes / world * (way.scatter_bits + way.gather_bits) / 16, world)


def _two_step(nbytes: float, world: int) -> tuple[float, float, int]:
    """(bytes encoded, bytes decoded, exchanges)"""
    return nbytes + nbytes / world, 2 * nbytes, 2


def _coded(machine: Machine, way: Way, wire: float, encoded: float, decoded: float, rounds: int) -> Cost:
    codec = (encoded / machine.encode + decoded / machine.decode) / way.speed
    return Cost(wire, codec, machine.codec_start + rounds * machine.link.start, machine.overlap)


@dataclass(frozen=True)
class Transformer:
    """parameters: of the whole model; two all-reduces of [tokens, hidden] for each of `layers`."""

    parameters: float
    layers: int
    hidden: int


def time_to_first_token(machine: Machine, way: Way, model: Transformer, tokens: int, world: int) -> tuple[float, float]:
    """(seconds of a prefill of `tokens`, share of it that communication takes). Two operations a parameter and token.

    Raises ValueError for a machine whose speed of products is not known.
    """
    if machine.flops is None:
        raise ValueError(f"how fast {machine.name} multiplies is not described")
    compute = 2 * model.parameters * tokens / world / machine.flops
    communication = 2 * model.layers * all_reduce(machine, way, tokens * model.hidden * HALF, world).total
    return compute + communication, communication / (compute + communication)
