"""Machines' parameters from measured times: least squares of the logarithm of modelled over measured.

Outliers count less (soft L1 from 15 % on), and a weak pull towards the values to start with, a 50th of a measurement's
weight, decides what measurements leave open. Everything is a function of the cases: the same file, the same parameters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from cost_model_cases import Case

from megatron_lowbit.tuning import machines
from megatron_lowbit.tuning.machines import GBIT, Machine

MI300X, B200 = "MI300X", "B200 NVLink"
DECODE = 2.9  # times as fast as encoding int4:g32: codecs.json, and kernels_predicted.json too
PULL, SOFT = 0.02, 0.15
Parameters = Mapping[str, float]

# Where the search starts. `rate`: of data, by the rate of the link.
SHAPED = {
    "rate": 0.95, "encode": 2.5e9, "codec_start": 5e-4, "exact_start": 3e-4, "exact_step": 2e-4,
    "exact_overhead": 1e-9, "call": 2e-4, "byte": 5e-10,
}  # fmt: skip
MESH = {"rate": 4.5e10, "encode": 1e12, "start": 1e-5}
SWITCH = {"rate": 4e11, "start": 1.5e-5}


def shaped(machine: Machine, rate_gbit: float, given: Parameters) -> Machine:
    """A shaped link's machine. Latency of its links, 0.1 ms, and the ranks' two cores are not fitted."""
    link = replace(machine.link, rate=given["rate"] * rate_gbit * GBIT)
    codec = _codec(machine, given["encode"], given["codec_start"])
    exact = machines.Exact(given["exact_start"], given["exact_step"], given["exact_overhead"])
    host = replace(machine.host, call=given["call"], byte=given["byte"])
    return replace(machine, link=link, codec=codec, exact=exact, host=host)


def mesh(machine: Machine, given: Parameters) -> Machine:
    """MI300X. What an exact all-reduce takes to start is given, and so is the latency of links, none."""
    link = replace(machine.link, rate=given["rate"])
    codec = _codec(machine, given["encode"], given["start"])
    return replace(machine, link=link, codec=codec)


def switch(machine: Machine, given: Parameters) -> Machine:
    """B200: a start for every exchange, as a kernel with two takes twice as long."""
    return replace(machine, link=replace(machine.link, **given), exact=machines.Exact(2 * given["start"]))


def _codec(machine: Machine, encode: float, start: float) -> machines.CodecSpeed:
    return replace(machine.codec, encode=encode, decode=DECODE * encode, start=start)


def _digits(value: float) -> float:
    return float(f"{value:.3g}")


def fit(cases: Sequence[Case], first: Parameters, machine: Callable[[Case, Parameters], Machine]) -> dict[str, float]:
    """Parameters as `first` has them, to three digits. machine: of a case, with given parameters."""
    from scipy.optimize import least_squares

    begin = [math.log(value) for value in first.values()]
    named = lambda logs: dict(zip(first, map(math.exp, logs), strict=True))  # noqa: E731

    def residuals(logs: Sequence[float]) -> list[float]:
        given = named(logs)
        errors = [math.log(case.modelled(machine(case, given)) / case.seconds) for case in cases]
        return errors + [PULL * (value - start) for value, start in zip(logs, begin, strict=True)]

    found = least_squares(residuals, begin, loss="soft_l1", f_scale=SOFT)
    return {name: _digits(value) for name, value in named(found.x).items()}


def fit_shaped(cases: Sequence[Case]) -> dict[str, float]:
    base = machines.shaped(1)
    return fit(cases, SHAPED, lambda case, given: shaped(base, case.rate, given))


def fit_mesh(cases: Sequence[Case]) -> dict[str, float]:
    base = machines.named(MI300X)
    return fit(cases, MESH, lambda _, given: mesh(base, given))


def fit_switch(cases: Sequence[Case]) -> dict[str, float]:
    base = machines.named(B200)
    return fit(cases, SWITCH, lambda _, given: switch(base, given))


def rounded(machine: Machine) -> Machine:
    """What follows from rounded parameters, rounded as they are."""
    link = replace(machine.link, rate=_digits(machine.link.rate))
    return replace(machine, link=link, codec=replace(machine.codec, decode=_digits(machine.codec.decode)))


def write(fitted: Sequence[Machine]) -> None:
    """Put machines in the place of those of their names in machines.json."""
    file = machines.FILE
    held = json.loads(file.read_text())
    new = {machine.name: machines.as_json(machine) for machine in fitted}
    held["machines"] = [new.get(entry["name"], entry) for entry in held["machines"]]
    file.write_text(json.dumps(held, indent=1) + "\n")
