"""What the cost model expects of a machine, in lines for `doctor` and `tune`; each says that it is modelled."""

from __future__ import annotations

import math
from dataclasses import replace

from ..config import DEFAULT_SPEC
from ..errors import ConfigError
from . import machines
from .cost_model import EXACT, Way, all_reduce, fastest
from .machines import GBIT, Link, Machine

SPECS = (DEFAULT_SPEC, "int4:g32", "int8:g128")
SHOWN = 8 << 20  # bytes
SIZES = [1 << power for power in range(16, 31)]  # bytes; smaller ones were not measured, larger ones change nothing
INSIDE_GBIT = 5.0  # of ranks on the processors of one node, over loopback
CUDA = "A100 NVLink"  # for GPUs that are not described


def lines(device: str, gbit: float | None, world: int, nodes: int) -> list[str]:
    """From which size compression pays among `world` ranks in `nodes` nodes, and what 8 MiB gain.

    device: "cpu", "cuda" or the name of a GPU. gbit: Gbit/s that an exact all-reduce reaches per rank, which is that of
    its slowest link; None: not known, and then as described for the GPU. Raises ConfigError for numbers that are none.
    """
    if world < 1 or nodes < 1 or (gbit is not None and not (math.isfinite(gbit) and gbit > 0)):
        raise ConfigError(f"{world} ranks in {nodes} nodes at {gbit} Gbit/s: give positive numbers")
    if world == 1:
        return ["modelled: one rank sends nothing, so there is nothing to gain"]
    machine = _machine(device, gbit, world, nodes)
    if machine is None:
        return ["modelled: nothing, as it is not known how fast the links are"]
    spread = f" in {nodes} nodes" if nodes > 1 else ""
    head = f"modelled, not measured: {world} ranks{spread}, {machine.name}; how far off: docs/performance.md#modelled"
    return [head, *(_line(machine, spec, world) for spec in SPECS)]


def _machine(device: str, gbit: float | None, world: int, nodes: int) -> Machine | None:
    """None: too little is known."""
    cpu, nested = device.lower() == "cpu", world > nodes > 1 and world % nodes == 0
    if gbit is None and (cpu or nodes > 1):
        return None
    if cpu:
        machine = _processors(gbit)
    else:
        known = machines.described()
        machine = next((one for one in known.values() if one.gpu and one.gpu in device.upper()), known[CUDA])
    if nested:
        inside = _processors(max(gbit, INSIDE_GBIT)) if cpu else machine
        return machines.joined(inside, Link(gbit * GBIT, machine.link.start), world // nodes)
    return machine if cpu or gbit is None else machines.limited(machine, gbit)


def _processors(gbit: float) -> Machine:
    """Those that the shaped links were measured with, under a name that does not say that this link is one."""
    return replace(machines.shaped(gbit), name=f"CPUs at {gbit:.3g} Gbit/s")


def _line(machine: Machine, spec: str, world: int) -> str:
    way = _best(machine, spec, SHOWN, world)
    exact, compressed = (all_reduce(machine, one, SHOWN, world).total for one in (EXACT, way))
    start = pays_from(machine, spec, world)
    pays = f"pays from {_size(start)} on" if start else "does not pay at any size"
    pays += ", or from less" if start == SIZES[0] else ""
    return (
        f"modelled: {spec} ({way.algorithm}) {pays}; {_size(SHOWN)} take {1e3 * compressed:.3g} ms instead of "
        f"{1e3 * exact:.3g}, {exact / compressed:.2f}x as fast"
    )


def pays_from(machine: Machine, spec: str, world: int) -> int | None:
    """Modelled: the power of two, in bytes, from which on all messages are faster with `spec`; None: there is none."""
    ways = _ways(machine, spec, world)
    plain = [Way("one-shot"), Way("two-step")] if machine.device == "cpu" else []  # as policy.py leaves messages exact
    losing = [size for size in SIZES if fastest(machine, [*ways, *plain], size, world) not in ways]
    first = SIZES[0] if not losing else 2 * losing[-1]
    return first if first <= SIZES[-1] else None


def _best(machine: Machine, spec: str, nbytes: int, world: int) -> Way:
    return min(_ways(machine, spec, world), key=lambda way: all_reduce(machine, way, nbytes, world).total)


def _ways(machine: Machine, spec: str, world: int) -> list[Way]:
    nested = machine.node and machine.node > 1 and world > machine.node
    return [Way.of(spec, algorithm) for algorithm in ("one-shot", "two-step", *["hierarchical"] * bool(nested))]


def _size(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"
