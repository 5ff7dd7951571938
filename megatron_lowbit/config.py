"""`CommConfig`: everything the user decides, frozen, validated once when it is made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from . import spec as _spec
from .errors import ConfigError

ALGORITHMS = ("auto", "one-shot", "two-step", "exact")
PLANNED_ALGORITHMS = ("hierarchical",)


@dataclass(frozen=True)
class CommConfig:
    """How partial sums travel.

    spec: codec of both legs, or "scatter/gather" (see `megatron_lowbit.spec`).
    algorithm: "auto", "one-shot", "two-step" or "exact"; of the all-reduce, but "exact" holds for all collectives.
    min_bytes: of the all-reduce; messages of fewer bytes (in their own dtype) go uncompressed. None: the measured
        threshold with "auto", 0 with a named algorithm (who names one has decided).
    sites: glob patterns of the sites to compress, such as "layers.*.mlp"; None: all. Others go exact, and are counted.
    calibration, plan: files of later versions; refused here, never ignored.

    Raises ConfigError naming the wrong value and what is allowed.
    """

    spec: str = "int4:g32"
    algorithm: str = "auto"
    min_bytes: int | None = None
    sites: tuple[str, ...] | None = None
    calibration: str | None = None
    plan: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", str(_spec.parse(self.spec)))
        if self.algorithm in PLANNED_ALGORITHMS:
            raise ConfigError(
                f"algorithm {self.algorithm!r} is not available in this version: use one of {', '.join(ALGORITHMS)}"
            )
        if self.algorithm not in ALGORITHMS:
            raise ConfigError(f"unknown algorithm {self.algorithm!r}: use one of {', '.join(ALGORITHMS)}")
        if self.min_bytes is not None and (
            isinstance(self.min_bytes, bool) or not isinstance(self.min_bytes, int) or self.min_bytes < 0
        ):
            raise ConfigError(f"min_bytes is {self.min_bytes!r}: give a whole number of bytes from 0 up, or None")
        if self.sites is not None:
            sites = (self.sites,) if isinstance(self.sites, str) else self.sites
            sites = tuple(sites) if isinstance(sites, Iterable) else ()
            if not sites or not all(isinstance(site, str) for site in sites):
                raise ConfigError(
                    f"sites is {self.sites!r}: give glob patterns such as ('layers.*.mlp',), or None for all"
                )
            object.__setattr__(self, "sites", sites)
        for name in ("calibration", "plan"):
            if getattr(self, name) is not None:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not available in this version: leave it out")

    @property
    def legs(self) -> _spec.Spec:
        """The parsed spec."""
        return _spec.parse(self.spec)

    def selects(self, site: str) -> bool:
        """Whether `site` is to be compressed."""
        return self.sites is None or any(fnmatchcase(site, pattern) for pattern in self.sites)
