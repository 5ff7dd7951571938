"""How long an all-reduce takes, and a prefill and a token with it, modelled: latency, bandwidth and codec throughput.

Hockney's model (latency plus bytes over bandwidth) for each exchange of traffic.py, and the time of encoding and
decoding. With W seconds on the wire, C in codecs, T of processors for transfers, and k chunks, where codecs run while
others send (collectives/pipeline.py):

    one after the other    C + max(W, T)
    overlapped             max(W, C + T)              both processors' work, and the wire, are lower bounds
    modelled               start + overlapped + (one after the other - overlapped) / k

as of k chunks one overlaps with nothing. Ranks that share cores take turns: C and T are multiplied by ranks per core.

Every figure from here is modelled, and must be called that where it is shown. What the model does not know: jitter,
bursts that a shaped link lets through after a rest, kernels that share a device with a product, and how links lose
efficiency with small or many transfers. benchmarks/cost_model.py prints how far off it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .. import policy
from ..codecs import make
from ..errors import ConfigError
from ..links import UNKNOWN, reaching
from ..spec import Leg, Spec, parse
from .codec_speed import PIECE, RELATIVE, family
from .machines import GBIT, Machine
from .traffic import Hop, hops, ring_bytes

HALF = 2  # bytes of a bf16 value
SHAPE = (64, 4096)  # of which bits per value are taken
PLAIN = Spec(Leg("bf16"), Leg("bf16"))


@dataclass(frozen=True)
class Way:
    """How a message is reduced: one of traffic.ALGORITHMS, and each hop's codec.

    outer: of the hops between nodes, hierarchical only; None: those of `spec`. chunks: None: as policy.py chooses.
    """

    algorithm: str
    spec: Spec = PLAIN
    outer: Spec | None = None
    chunks: int | None = None

    @classmethod
    def of(cls, spec: str, algorithm: str, outer: str | None = None, chunks: int | None = None) -> Way:
        """From specs as they are written. Raises ConfigError."""
        return cls(algorithm, parse(spec), parse(outer) if outer else None, chunks)

    def leg(self, name: str) -> Leg:
        legs = self.outer or self.spec if name.startswith("outer") else self.spec
        return legs.scatter if name.endswith("scatter") else legs.gather


EXACT = Way("exact")


@dataclass(frozen=True)
class Cost:
    """Modelled seconds. wire: bytes on links; codec: encoding and decoding; host: of processors for transfers; start:
    what even an empty message takes. chunks: parts that overlap, 1: none do."""

    wire: float = 0.0
    codec: float = 0.0
    host: float = 0.0
    start: float = 0.0
    chunks: int = 1

    @property
    def total(self) -> float:
        apart = self.codec + max(self.wire, self.host)
        together = max(self.wire, self.codec + self.host)
        return self.start + together + (apart - together) / self.chunks

    def __str__(self) -> str:
        return f"modelled {1e3 * self.total:.3g} ms"


def all_reduce(machine: Machine, way: Way, nbytes: float, world: int) -> Cost:
    """Modelled, of a message of `nbytes` in bf16 among `world` ranks.

    Raises ConfigError for a negative size, less than one rank, or an algorithm that the machine's nodes do not allow.
    """
    if not nbytes >= 0 or world < 1:
        raise ConfigError(f"{nbytes!r} bytes among {world!r} ranks: give a size from 0 up and at least one rank")
    if world == 1 or nbytes == 0:
        return Cost()
    if way.algorithm == "exact":
        return _exact(machine, nbytes, world)
    all_hops, turns = hops(way.algorithm, nbytes, world, machine.node), machine.host.contention(world)
    parts = (way.chunks if way.chunks is not None else chunks(machine, way.algorithm, nbytes, world)) or 1
    messages = sum(hop.messages for hop in all_hops) * parts
    sent = bytes_sent(way, nbytes, world, machine.node)
    return Cost(
        wire=sum(_wire(machine, hop, bits(way.leg(hop.leg)) / 16) for hop in all_hops),
        codec=turns * sum(_codec(machine, hop, way.leg(hop.leg), parts) for hop in all_hops),
        host=turns * (machine.host.call * messages + machine.host.byte * sent),
        start=turns * machine.codec.start + sum(_start(machine, hop) for hop in all_hops),
        chunks=parts if machine.codec.overlap else 1,
    )


def bytes_sent(way: Way, nbytes: float, world: int, node: int | None = None) -> float:
    """By each rank, of a message of `nbytes` in bf16; what telemetry counts, but for the padding of short wires."""
    if way.algorithm == "exact":
        return ring_bytes(nbytes, world)
    return sum(hop.sent * bits(way.leg(hop.leg)) / 16 for hop in hops(way.algorithm, nbytes, world, node))


def _exact(machine: Machine, nbytes: float, world: int) -> Cost:
    """As slow as its slowest link. Between K nodes gloo's ring sends as much as inside; NCCL has trees, too, and is
    taken to send no more than the 2 (K - 1) / K M bytes that it must."""
    sent, turns, steps = ring_bytes(nbytes, world), machine.host.contention(world), 2 * (world - 1)
    wire = sent / machine.link.rate / (world - 1 if machine.link.mesh else 1)
    if machine.outer and world > machine.node:
        across = world if machine.device == "cpu" else -(-world // machine.node)
        wire = max(wire, ring_bytes(nbytes, across) / machine.outer.rate)
    start = machine.exact.start + turns * steps * machine.exact.step
    return Cost(wire=wire, host=turns * machine.exact.overhead * sent, start=start)


def _wire(machine: Machine, hop: Hop, share: float) -> float:
    """Inside and between nodes at the same time; all ranks of a node send through its one link."""
    inside = hop.each * share * (min(hop.inside, 1) if machine.link.mesh else hop.inside) / machine.link.rate
    if not hop.between or not machine.outer:
        return inside
    return max(inside, machine.node * hop.each * share * hop.between / machine.outer.rate)


def _codec(machine: Machine, hop: Hop, leg: Leg, parts: int) -> float:
    encode, decode = RELATIVE[machine.device][family(leg)]
    pieces = parts * (hop.messages + 1) * PIECE.get(machine.device, {}).get(family(leg), 0.0)
    return hop.encoded / machine.codec.encode / encode + hop.decoded / machine.codec.decode / decode + pieces


def _start(machine: Machine, hop: Hop) -> float:
    return machine.outer.start if hop.between and machine.outer else machine.link.start


@lru_cache(maxsize=256)
def bits(leg: Leg) -> float:
    """Per value of a large message, scales included."""
    return make(leg).bits_per_value(SHAPE)


def chunks(machine: Machine, algorithm: str, nbytes: float, world: int) -> int:
    """In how many parts policy.py lets a message travel on such a machine."""
    between = machine.outer and world > machine.node
    rate = min(machine.link.rate, machine.outer.rate) if between else machine.link.rate
    link = reaching(rate / GBIT).name if machine.device == "cpu" else UNKNOWN
    return policy.chunks(int(nbytes), policy.Facts(world, machine.device, link), algorithm)


def fastest(machine: Machine, ways: list[Way], nbytes: float, world: int) -> Way:
    """Of exact and `ways`, modelled: what a gate should choose. Exact if nothing is faster."""
    return min([EXACT, *ways], key=lambda way: all_reduce(machine, way, nbytes, world).total)


@dataclass(frozen=True)
class Transformer:
    """parameters: of the whole model; two all-reduces of [tokens, hidden] in each of `layers`."""

    name: str
    parameters: float
    layers: int
    hidden: int


LLAMA_3_70B = Transformer("Llama 3 70B", 70.6e9, 80, 8192)  # its model card and config.json
LLAMA_3_8B = Transformer("Llama 3 8B", 8.03e9, 32, 4096)


@dataclass(frozen=True)
class Step:
    """Modelled seconds of one pass through a model: products, or reading weights; and communication."""

    compute: float
    communication: float

    @property
    def total(self) -> float:
        return self.compute + self.communication

    @property
    def share(self) -> float:
        """Of communication."""
        return self.communication / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"modelled {1e3 * self.total:.4g} ms, {self.share:.0%} of it communication"


def time_to_first_token(
    machine: Machine, way: Way, model: Transformer, tokens: int, world: int, batch: int = 1
) -> Step:
    """Modelled, of a prefill of `batch` prompts of `tokens`: two operations a parameter and token, and attention's.

    Communication does not overlap with products. Raises ConfigError for a machine whose flops are not described.
    """
    products = 2 * model.parameters * tokens * batch
    attention = 2 * model.layers * model.hidden * tokens**2 * batch  # QK and PV, causal: 2 * 2 * hidden * tokens^2 / 2
    compute = (products + attention) / world / _known(machine, "flops")
    return Step(compute, _communication(machine, way, model, tokens * batch, world))


def time_per_token(machine: Machine, way: Way, model: Transformer, world: int, batch: int = 1) -> Step:
    """Modelled, of one decoding step: reading all weights in bf16, or the products, if they take longer.

    Caches of attention are left out. Raises ConfigError for a machine without memory or flops.
    """
    reading = HALF * model.parameters / world / _known(machine, "memory")
    products = 2 * model.parameters * batch / world / _known(machine, "flops")
    return Step(max(reading, products), _communication(machine, way, model, batch, world))


def _communication(machine: Machine, way: Way, model: Transformer, rows: int, world: int) -> float:
    return 2 * model.layers * all_reduce(machine, way, rows * model.hidden * HALF, world).total


def _known(machine: Machine, what: str) -> float:
    value = getattr(machine, what)
    if value is None:
        raise ConfigError(f"machine {machine.name!r} has no {what}: describe it, in SI units")
    return value
