"""Machines as the cost model sees them: what their links, codecs and processors can do. Data, each with its source.

Those that are known stand in machines.json; one of a user's own is a JSON object with the same fields:

    {"name": "two workstations", "source": "iperf3, 2026-11-22", "device": "cuda",
     "link": {"rate": 1.18e9, "start": 3e-5},
     "codec": {"encode": 4e11, "decode": 4e11, "start": 2e-5, "overlap": false},
     "exact": {"start": 4e-5}, "flops": 1.5e14, "memory": 7e11}

All in SI units: bytes, seconds, bytes per second. The field names of the classes here are those of the file; what has a
default may be left out.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path

from ..errors import ConfigError

GBIT = 1e9 / 8  # bytes per second
SHAPED = "shaped {:g} Gbit/s"
FILE = Path(__file__).with_name("machines.json")
_MAY_BE_ZERO = ("start", "step", "call", "byte", "overhead")


@dataclass(frozen=True)
class Link:
    """rate: bytes per second and direction that data gets, headers off; of each rank, or if `mesh` of each pair; of an
    outer link, of a whole node. start: seconds before the first byte of an exchange moves."""

    rate: float
    start: float
    mesh: bool = False


@dataclass(frozen=True)
class CodecSpeed:
    """encode, decode: bytes of a bf16 message per second that one rank alone makes int4:g32 of, and sums of it.

    start: seconds that a compressed call takes however small it is. overlap: whether encoding and sending run at the
    same time, chunk by chunk.
    """

    encode: float
    decode: float
    start: float
    overlap: bool = False


@dataclass(frozen=True)
class Exact:
    """The machine's own all-reduce, a ring. start: seconds of a call; step: of each of its 2 (N - 1) steps.

    overhead: seconds of a processor per byte sent, for copying and summing.
    """

    start: float
    step: float = 0.0
    overhead: float = 0.0


@dataclass(frozen=True)
class Host:
    """What transfers cost the processors that run the codecs too; nothing where network cards or links do it all.

    cores: that all ranks share; None: each has enough of its own. call: seconds per message sent; byte: per byte sent.
    """

    cores: int | None = None
    call: float = 0.0
    byte: float = 0.0

    def contention(self, world: int) -> float:
        """How many ranks take turns on a core."""
        return max(1.0, world / self.cores) if self.cores else 1.0


@dataclass(frozen=True)
class Machine:
    """device: "cpu" or "cuda", whose codecs run. gpu: what its driver's name for the GPU contains, such as "H100".

    node: ranks per node, joined by `outer`; None: there is one node.

    flops: operations per second of a rank's matrix products as they are reached; memory: bytes per second at which it
    reads weights. Without them there is no time to first token.
    """

    name: str
    source: str
    device: str
    link: Link
    codec: CodecSpeed
    exact: Exact
    host: Host = Host()
    flops: float | None = None
    memory: float | None = None
    node: int | None = None
    outer: Link | None = None
    gpu: str | None = None

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"machine {self.name!r}: device is {self.device!r}: use cpu or cuda")
        if (self.node is None) != (self.outer is None):
            raise ConfigError(f"machine {self.name!r}: node and outer describe several nodes: give both or neither")
        if not self.source.strip():
            raise ConfigError(f"machine {self.name!r}: source is empty: say where its figures are from")


_DEFAULTS = {field.name: field.default for field in fields(Machine) if field.default is not MISSING}


def described() -> dict[str, Machine]:
    """Name -> every machine that is known."""
    return dict(_described())


@cache
def _described() -> dict[str, Machine]:
    found = [_made(Machine, entry, FILE.name) for entry in json.loads(FILE.read_text())["machines"]]
    return {machine.name: machine for machine in found}


def named(name: str) -> Machine:
    """Raises ConfigError for a name that is not described."""
    if name not in _described():
        raise ConfigError(
            f"machine {name!r} is not described: use one of {', '.join(map(repr, _described()))}, or a JSON file of "
            "your own"
        )
    return _described()[name]


def load(path: str | Path) -> Machine:
    """The machine that a JSON file describes. Raises ConfigError naming what is wrong in it."""
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"machine file {str(path)!r} cannot be read ({error}): give a JSON file") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"machine file {str(path)!r} is not JSON ({error}): see megatron_lowbit/tuning") from error
    return _made(Machine, found, str(path))


def shaped(rate_gbit: float) -> Machine:
    """Hosts of one core each on links of `rate_gbit`, over gloo: benchmarks/link.py, fitted to benchmarks/results/."""
    known = named(SHAPED.format(1))
    return replace(known, name=SHAPED.format(rate_gbit), link=replace(known.link, rate=known.link.rate * rate_gbit))


def limited(machine: Machine, rate_gbit: float) -> Machine:
    """With links that give every rank `rate_gbit`, whatever it is described with."""
    return replace(
        machine, name=f"{machine.name} at {rate_gbit:.3g} Gbit/s", link=Link(rate_gbit * GBIT, machine.link.start)
    )


def joined(inside: Machine, outer: Link, node: int) -> Machine:
    """Nodes of `node` ranks, with `inside`'s links within and `outer` between them."""
    name = f"{inside.name} in nodes of {node}, {outer.rate / GBIT:.3g} Gbit/s between"
    return replace(inside, name=name, outer=outer, node=node)


def as_json(machine: Machine) -> dict:
    """What a file holds for it: the fields that have a value."""
    return {name: value for name, value in asdict(machine).items() if getattr(machine, name) != _DEFAULTS.get(name)}


def _made(kind: type, entry: object, where: str):
    """A dataclass of what a file holds for it, checked field by field."""
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: expected an object with {_names(kind)}, found {type(entry).__name__}")
    wanted = {field.name: field for field in fields(kind)}
    if unknown := sorted(set(entry) - set(wanted)):
        raise ConfigError(f"{where}: unknown field {unknown[0]!r}: use {_names(kind)}")
    required = {name for name, field in wanted.items() if field.default is MISSING}
    if missing := sorted(required - set(entry)):
        raise ConfigError(f"{where}: {missing[0]!r} is missing: give {_names(kind)}")
    types_ = typing.get_type_hints(kind)
    return kind(**{name: _value(types_[name], value, f"{where}: {name}") for name, value in entry.items()})


def _value(kind: object, value: object, where: str):
    if isinstance(kind, types.UnionType):  # something or None
        if value is None:
            return None
        kind = next(one for one in typing.get_args(kind) if one is not type(None))
    if is_dataclass(kind):
        return _made(kind, value, where)
    if kind is float:
        zero = where.rpartition(" ")[2] in _MAY_BE_ZERO
        number = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
        if not number or value < 0 or (value == 0 and not zero):
            raise ConfigError(f"{where} is {value!r}: give a number {'from 0 up' if zero else 'above 0'}, in SI units")
        return float(value)
    if type(value) is not kind or (kind is int and value < 1):
        what = {str: "a text", int: "a whole number above 0", bool: "true or false"}[kind]
        raise ConfigError(f"{where} is {value!r}: give {what}")
    return value


def _names(kind: type) -> str:
    return ", ".join(field.name for field in fields(kind))
