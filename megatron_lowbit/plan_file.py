"""A plan: which spec travels at which site, and the file that says so.

A plan is made for a model and a TP size; every rank reads it. The file is JSON; docs/plan.md has the layout. What a
plan decides is its sites and their specs; all else in the file says where it came from.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from . import spec as _spec
from . import whole_file
from .errors import ConfigError

FORMAT, VERSION = "megatron_lowbit.plan", 1
EXACT = "exact"  # a site's "spec" where nothing is compressed


@dataclass(frozen=True, eq=False)
class Plan:
    """Site -> spec (both legs, as in a CommConfig) or "exact". Raises ConfigError for what cannot be one.

    tp: how many ranks it was made for. algorithm: the all-reduce's it was made for, "one-shot" or "two-step".
    metadata: where it came from, as JSON has it ("fingerprint", "model", "predicted", "measured", ...). name: what
    messages call it, never a path.
    """

    sites: Mapping[str, str]
    tp: int
    algorithm: str = "auto"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    name: str = "plan in memory"

    def __post_init__(self) -> None:
        if not isinstance(self.sites, Mapping) or not self.sites:
            raise ConfigError(f"{self.name} has no sites: give a spec for each")
        if type(self.tp) is not int or self.tp < 2:
            raise ConfigError(f"{self.name} is for TP {self.tp!r}: give 2 or more ranks")
        if self.algorithm not in ("auto", "one-shot", "two-step"):
            raise ConfigError(f"{self.name} has algorithm {self.algorithm!r}: use auto, one-shot or two-step")
        specs = {}
        for site, spec in self.sites.items():
            if not isinstance(site, str) or not isinstance(spec, str):
                raise ConfigError(f"{self.name} gives {site!r} the spec {spec!r}: give names and specs as strings")
            specs[site] = spec if spec == EXACT else str(_spec.parse(spec))
        object.__setattr__(self, "sites", MappingProxyType(specs))
        object.__setattr__(self, "metadata", MappingProxyType(dict(self.metadata)))

    def __repr__(self) -> str:
        return f"Plan({self.name!r}, TP {self.tp}, {len(self.sites)} sites, digest {self.digest[:12]})"

    def __reduce__(self) -> tuple:  # for copies of a model that holds one: a mapping proxy cannot be copied
        return Plan, (dict(self.sites), self.tp, self.algorithm, dict(self.metadata), self.name)

    @property
    def specs(self) -> tuple[_spec.Spec, ...]:
        """Each spec that some site has, once; without "exact"."""
        return tuple(_spec.parse(spec) for spec in sorted({*self.sites.values()} - {EXACT}))

    @property
    def fingerprint(self) -> str:
        """The model's, as engines/fingerprint.py makes it; empty if this was not made from a model."""
        return str(self.metadata.get("fingerprint", ""))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides what travels."""
        decides = {"format": FORMAT, "version": VERSION, "sites": dict(self.sites), "algorithm": self.algorithm}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def check(
        self,
        tp: int | None = None,
        fingerprint: str | None = None,
        sites: Iterable[str] | None = None,
        tensors: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Raise ConfigError naming what differs from what is given; None is not compared.

        tensors: the model's, name -> digest (engines/fingerprint.py), for the message about another fingerprint.
        """
        if tp is not None and tp != self.tp:
            raise ConfigError(
                f"{self.name} was made for TP {self.tp}, this group has {tp} ranks: make one for {tp} "
                "with 'megatron-lowbit plan'"
            )
        if fingerprint and self.fingerprint and fingerprint != self.fingerprint:
            theirs = self.metadata.get("tensors")
            which = f"; {differing(theirs, tensors)} differ" if isinstance(theirs, Mapping) and tensors else ""
            raise ConfigError(
                f"{self.name} was made for another model ({self.metadata.get('model', 'unnamed')}, fingerprint "
                f"{self.fingerprint[:12]}, this one has {fingerprint[:12]}{which}): make one for this model with "
                "'megatron-lowbit plan'"
            )
        if missing := [site for site in sites or () if site not in self.sites]:
            raise ConfigError(
                f"{self.name} lacks {_some(missing)}, and has {_some(list(self.sites))}: make one for this model "
                "with 'megatron-lowbit plan', or select other sites"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Write the file, whole or not at all. Raises ConfigError if it cannot be written."""
        from . import __version__

        made = {"megatron_lowbit": __version__, "date": datetime.date.today().isoformat()}
        facts = {"format": FORMAT, "format_version": VERSION, "tp": self.tp, "algorithm": self.algorithm}
        text = whole_file.as_json(facts | made | dict(self.metadata) | {"sites": dict(self.sites)})
        whole_file.write(path, text.encode(), "plan")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Plan:
        """Read a file. Raises ConfigError for one that is missing, damaged, something else or of a newer version."""
        path = Path(path)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"there is no plan file {path}: make one with 'megatron-lowbit plan'") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"plan {str(path)[:80]} cannot be read ({error}): make it again with 'megatron-lowbit plan'"
            ) from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ConfigError(f"{path} is no plan: give a file that 'megatron-lowbit plan' wrote")
        version = found.get("format_version")
        if type(version) is not int or version != VERSION:
            raise ConfigError(
                f"{path} has format {version!r}, this one reads {VERSION}: update megatron-lowbit, or make it again"
            )
        if missing := {"sites", "tp", "algorithm"} - found.keys():
            raise ConfigError(
                f"plan {path} lacks {', '.join(sorted(missing))}: make it again with 'megatron-lowbit plan'"
            )
        sites, tp, algorithm = found.pop("sites"), found.pop("tp"), found.pop("algorithm")
        return cls(sites, tp, algorithm, found, f"plan {path.name}")


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    """Names of which the values differ or one is missing, the first three and how many more; "" for none."""
    return _some(sorted(name for name in {*one, *other} if one.get(name) != other.get(name)))


def _some(things: Sequence[object], limit: int = 3) -> str:
    rest = f" and {len(things) - limit} more" if len(things) > limit else ""
    return ", ".join(map(str, things[:limit])) + rest
