"""Which tuned table a group uses: one that CommConfig or LOWBIT_TUNED names, else this user's own for such a group.

Rank 0 of the group looks, and tells the others (`told`, `heard`), so that all have the same or all get the same error.
A table that was named must fit; one that was merely found is left alone if it does not, and a warning says why.
"""

from __future__ import annotations

import os
import platform
import re
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .codecs import backend
from .errors import ConfigError
from .tuned_table import Key, TunedTable

NONE, NAMED, AUTOMATIC = "none", "a file", "automatic"


def source(given: TunedTable | None) -> str:
    """Where a table comes from, if from anywhere: what all ranks must agree on."""
    named = os.environ.get("LOWBIT_TUNED", "")
    return NAMED if given is not None else AUTOMATIC if not named else NONE if named == NONE else NAMED


def told(given: TunedTable | None, here: Key) -> dict:
    """Rank 0's: the table, JSON-able, or why there is an error on every rank; empty for no table. May warn, which is
    an error on every rank where warnings are."""
    try:
        found = find(given, here)
    except (ConfigError, Warning) as error:
        return {"error": str(error)}
    return {} if found is None else {"name": found.name, "table": found.as_json()}


def heard(message: dict) -> TunedTable | None:
    """What rank 0 told. Raises its ConfigError."""
    if "error" in message:
        raise ConfigError(message["error"])
    return TunedTable.from_json(message["table"], message["name"]) if message else None


def find(given: TunedTable | None, here: Key) -> TunedTable | None:
    """The table for `here`, which fits. Raises ConfigError for a named one that does not."""
    if given is None and source(given) == NAMED:
        given = TunedTable.load(os.environ["LOWBIT_TUNED"])
    if given is not None:
        given.check(here)
        return given
    if source(None) == NONE or (path := place(here)) is None or not _readable(path):
        return None
    try:
        found = TunedTable.load(path)
        found.check(here)
    except ConfigError as error:
        warnings.warn(f"{error}; not used, sizes decide as without a table", stacklevel=5)
        return None
    return found


def _readable(path: Path) -> bool:
    """A cache that this user may not look into has no table, and is no reason to fail on rank 0 alone."""
    try:
        return path.exists()
    except OSError:
        return False


def folder() -> Path | None:
    """Where this user's tables are; None for a user without a home."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "megatron_lowbit" / "tuned"
    except RuntimeError:
        return None


def place(key: Key) -> Path | None:
    """The file of this user's own table for such a group. Versions are not in its name, so that a new one replaces
    what an update made stale."""
    nodes = f"{len(key.nodes)}x{key.nodes[0]}" if len(set(key.nodes)) == 1 else "-".join(map(str, key.nodes))
    device = re.sub(r"[^a-z0-9]+", "-", key.device.lower()).strip("-")
    where = folder()
    return where and where / f"{device[:80]}_{key.world}-ranks_{nodes[:80]}_{key.backend}.json"


def key_of(device: torch.device, world: int, nodes: tuple[int, ...], transport: str, protocol: int) -> Key:
    """Of a group with ranks like this process. nodes: ranks on each; transport: torch.distributed's backend."""
    from . import __version__

    versions = {"megatron_lowbit": __version__, "torch": str(torch.__version__)}
    if device.type == "cuda":
        try:
            versions["triton"] = version("triton")
        except PackageNotFoundError:
            versions["triton"] = "none"
    return Key(machine(device), world, nodes, transport, backend.of(device), protocol, versions)


def machine(device: torch.device) -> str:
    """The model of the GPU, or of the CPU and how many cores there are."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return f"{' '.join((names or [platform.machine()])[0].split())}, {os.cpu_count()} cores"
