"""`doctor`: what this machine can do, what is missing, and what to do about it. Imports nothing that it reports on."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
import torch.distributed as dist

from .. import __version__, communicator, handshake, links, tuned_lookup
from ..codecs import backend, codec
from ..collectives import connect
from ..errors import ConfigError
from ..tuned_table import TunedTable
from . import launch

HELP = "what this machine can do, and what is missing"
DESCRIPTION = """Show what this machine can do: packages, GPUs, which implementation of the
codecs runs and how fast, tuned tables and settings. Under a launcher also how
fast its links are and what the cost model expects of them. Exit code 1 if
something that the default needs is broken."""
EXAMPLES = """examples:
  megatron-lowbit doctor
  megatron-lowbit doctor --json
  torchrun --nproc-per-node 2 -m megatron_lowbit doctor   the links of these ranks, too
"""
PACKAGES = {  # distributions that may hold what is imported by this name, and the extra that installs it
    "numpy": ("numpy", None),
    "numba": ("numba", "cpu"),
    "triton": ("triton pytorch-triton", "gpu"),
    "megatron.core": ("megatron-core", "megatron"),
    "deepspeed": ("deepspeed", "deepspeed"),
    "transformers": ("transformers", "hf"),
    "accelerate": ("accelerate", "hf"),
    "safetensors": ("safetensors", "hf"),
    "rich": ("rich", "hf"),
    "matplotlib": ("matplotlib", "eval"),
    "transformer_engine": ("transformer-engine transformer-engine-cu12 transformer-engine-torch", None),
    "apex": ("apex", None),
}
VARIABLES = ("LOWBIT_BACKEND", "LOWBIT_CHECK", "LOWBIT_LINK", "LOWBIT_NODE", "LOWBIT_TRANSPORT", "LOWBIT_TUNED")
OTHERS = ("LOWBIT_BROWSER", "LOWBIT_DEEPSPEED_SHM")  # of this repository's own tests
OLDEST_PYTHON, OLDEST_TORCH = (3, 10), (2, 6)
SPEC, VALUES, SECONDS = "int4:g32", 1 << 21, 0.3


@dataclass(frozen=True)
class Finding:
    """problem: what is broken of what the default needs, and the remedy; None if nothing is."""

    topic: str
    name: str
    value: str
    problem: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `doctor`."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", default=60, help="give up on a silent rank (default: 60)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Look, and say what was found. Returns 1 if something is broken that the default needs."""
    if not 0 < arguments.timeout <= 1e6:
        raise ConfigError(f"--timeout is {arguments.timeout}: give seconds above 0, at most a million")
    findings = [*packages(), *settings(), *machine(), *codecs(), *tables()]
    if (launch.world_size() or 1) > 1:
        with launch.process_group(launch.world_size(), arguments.timeout):
            findings += ranks([finding.problem for finding in findings if finding.problem])
    broken = [finding for finding in findings if finding.problem]
    if os.environ.get("RANK", "0") == "0":
        show(findings, arguments.json)
    return 1 if broken else 0


def show(findings: list[Finding], as_json: bool) -> None:
    """Print them; in plain text, as rich may be what is missing."""
    broken = [finding for finding in findings if finding.problem]
    if as_json:
        print(json.dumps({"findings": [asdict(each) for each in findings], "healthy": not broken}, indent=1))
        return
    width, topic = max(len(finding.name) for finding in findings), None
    for finding in findings:
        if finding.topic != topic:
            topic = finding.topic
            print(f"\n{topic}" if finding is not findings[0] else topic)
        print(f"  {finding.name:{width}}  {finding.value}")
        if finding.problem:
            print(f"  {'':{width}}  PROBLEM: {finding.problem}")
    print(f"\n{len(broken)} {'problem' if len(broken) == 1 else 'problems'}" if broken else "\nno problems")


def packages() -> Iterator[Finding]:
    """Versions, without importing."""
    from ..patches.megatron import apex

    topic, old = "packages", sys.version_info < OLDEST_PYTHON
    yield Finding(topic, "megatron_lowbit", __version__)
    yield Finding(topic, "python", platform.python_version(), "use Python 3.10 or newer" if old else None)
    old = tuple(int(part) for part in str(torch.__version__).split(".")[:2]) < OLDEST_TORCH
    yield Finding(topic, "torch", str(torch.__version__), "pip install 'torch>=2.6'" if old else None)
    for name, (distributions, extra) in PACKAGES.items():
        remedy = f": pip install 'megatron-lowbit[{extra}]'" if extra else ""
        found = _version(name, distributions.split())
        if name == "apex" and (place := apex.foreign()) is not None:
            found = f"at {place}, not NVIDIA's, which Megatron-Core takes it for: pip uninstall apex"
        yield Finding(topic, name, f"not installed (optional{remedy})" if found is None else found)


def _version(name: str, distributions: list[str]) -> str | None:
    """Of an importable package; None if there is none."""
    try:
        if find_spec(name) is None:
            return None
    except (ImportError, ValueError):
        return None
    for distribution in distributions:
        try:
            return version(distribution)
        except PackageNotFoundError:
            pass
    return "installed, of unknown version"


def settings() -> Iterator[Finding]:
    """Variables of the environment, and whether they are understood."""
    checks = {
        "LOWBIT_BACKEND": lambda: backend.of(torch.device("cpu")),
        "LOWBIT_CHECK": communicator._every_call_is_checked,
        "LOWBIT_LINK": lambda: links.from_environment("cuda" if torch.cuda.is_available() else "cpu"),
        "LOWBIT_TRANSPORT": connect.transport,
        "LOWBIT_TUNED": lambda: _named_table(),
    }
    for name in VARIABLES:
        value = os.environ.get(name)
        problem = None if value is None or name not in checks else _complaint(checks[name])
        yield Finding("settings", name, "not set" if value is None else repr(value), problem)
    for name in sorted(os.environ):
        if name.startswith("LOWBIT_") and name not in (*VARIABLES, *OTHERS):
            known = ", ".join(VARIABLES)
            yield Finding("settings", name, repr(os.environ[name]), f"{name} is unknown: unset it; there are {known}")


def _named_table() -> None:
    if (name := os.environ["LOWBIT_TUNED"]) not in ("", tuned_lookup.NONE):
        found = TunedTable.load(name)
        found.check(_as_here(found))


def _complaint(check) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check()
        except ConfigError as error:
            return str(error)
    return None


def machine() -> Iterator[Finding]:
    """Cores, GPUs and how these reach each other."""
    topic = "machine"
    yield Finding(topic, "cpu", tuned_lookup.machine(torch.device("cpu")))
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(topic, "cores for this process", f"{allowed}, of which torch uses {torch.get_num_threads()}")
    transports = [name for name in ("gloo", "nccl") if getattr(dist, f"is_{name}_available", lambda: False)()]
    remedy = None if "gloo" in transports else "this torch has no gloo: install one that was built with distributed"
    yield Finding(topic, "transports", ", ".join(transports) or "none", remedy)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        yield Finding(topic, "gpu", f"none that torch {torch.__version__} can use")
        return
    for index in range(count):
        facts = torch.cuda.get_device_properties(index)
        memory = facts.total_memory / (1 << 30)
        text = f"{facts.name}, {memory:.0f} GiB, compute capability {facts.major}.{facts.minor}"
        yield Finding(topic, f"gpu {index}", text)
    pairs = [(one, other) for one in range(count) for other in range(count) if one != other]
    peers = sum(torch.cuda.can_device_access_peer(*pair) for pair in pairs)
    yield Finding(topic, "peer access", f"{peers} of {len(pairs)} pairs of GPUs")
    symmetric = find_spec("torch.distributed._symmetric_memory") is not None and peers == len(pairs) > 0
    yield Finding(topic, "symmetric memory", "possible" if symmetric else "not possible")


def codecs() -> Iterator[Finding]:
    """Which implementation runs on which device, why, and how fast."""
    topic = "codecs"
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                name = backend.of(torch.device(device))
            except ConfigError as error:
                yield Finding(topic, f"on {device}", "none", str(error))
                continue
        asked = os.environ.get("LOWBIT_BACKEND", "")
        problem = None if asked or not said else str(said[0].message)
        yield Finding(topic, f"on {device}", f"{name}, {'as LOWBIT_BACKEND asks' if asked else 'the default'}", problem)
        encode, decode = speed(torch.device(device))
        yield Finding(topic, f"{SPEC} on {device}", f"encode {encode:.2f} GB/s, decode {decode:.2f} GB/s of bf16")


def speed(device: torch.device) -> tuple[float, float]:
    """(encoding, decoding) of the quick codec: GB of bf16 values per second, in one process."""
    x, quick = torch.randn(VALUES // 4096, 4096).bfloat16().to(device), codec(SPEC)
    wire, found = quick.encode(x), []
    for operation in (lambda: quick.encode(x), lambda: quick.decode(wire, x.shape, x.dtype)):
        best, end = float("inf"), time.perf_counter() + SECONDS
        operation()
        while time.perf_counter() < end:
            start = time.perf_counter()
            operation()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
            if best > SECONDS:
                break
        found.append(x.nbytes / best / 1e9)
    return found[0], found[1]


def tables() -> Iterator[Finding]:
    """This user's tuned tables, and whether they would be used; none of them is needed."""
    folder = tuned_lookup.folder()
    found = sorted(folder.glob("*.json")) if folder else []
    if not found:
        yield Finding("tuned tables", "none", f"in {folder}: sizes decide; 'megatron-lowbit tune' measures")
    for path in found:
        try:
            table = TunedTable.load(path)
            table.check(_as_here(table))
            parts = ", ".join(" ".join(part) for part in table.rows)
            text = f"fits groups of {table.key.world} ranks (by node: {' + '.join(map(str, table.key.nodes))}): {parts}"
        except ConfigError as error:
            text = str(error)
        yield Finding("tuned tables", path.name, text)


def _as_here(table: TunedTable):
    """The key of a group like the table's, if this machine had one."""
    key = table.key
    cuda = key.backend == "nccl" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    here = tuned_lookup.key_of(device, key.world, key.nodes, key.backend, handshake.PROTOCOL)
    return here if cuda or key.backend != "nccl" else replace(here, device="no GPU")


def ranks(problems: list[str]) -> Iterator[Finding]:
    """Of the group that a launcher started: a collective call. problems: this rank's."""
    from ..collectives import exchange, probe, topology
    from ..tuning import expectation

    topic, group, cuda = "ranks", dist.group.WORLD, torch.cuda.is_available()
    own = {"node": topology.node_name(), "problems": problems}
    everyone = exchange.compare({"version": __version__}, group, True, own)
    nodes = topology.Nodes.of([own["node"] for own in everyone])
    spread = " + ".join(str(len(members)) for members in nodes.members)
    world = dist.get_world_size()
    yield Finding(topic, "group", f"{world} ranks (by node: {spread}), {dist.get_backend()}")
    for rank, its in enumerate(everyone):
        for problem in its["problems"]:
            if rank and problem not in everyone[0]["problems"]:
                yield Finding(topic, f"rank {rank}", "has a problem that rank 0 has not", problem)
    gbit = None if cuda else probe.gbit_per_second(group)
    if gbit is not None:
        kind = links.reaching(gbit).name
        yield Finding(topic, "link", f"{kind}: an exact all-reduce reaches {gbit:.2f} Gbit/s per rank")
    device = torch.cuda.get_device_name() if cuda else "cpu"
    for number, line in enumerate(expectation.lines(device, gbit, world, len(nodes.members))):
        yield Finding(topic, "expected" if not number else "", line)
