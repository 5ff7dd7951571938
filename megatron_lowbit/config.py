"""`CommConfig`: everything the user decides, frozen, validated once when it is made."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from . import spec as _spec
from .calibration_file import Calibration
from .codecs import Codec, make
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
    calibration: the file that `megatron-lowbit calibrate` wrote, or a Calibration; for codecs that need to know the
        values of a site (`outliers=`, selective4), and for those only. It is read when the configuration is made.
    plan: a file of later versions; refused here, never ignored.

    Raises ConfigError naming the wrong value and what is allowed.
    """

    spec: str = "int4:g32"
    algorithm: str = "auto"
    min_bytes: int | None = None
    sites: tuple[str, ...] | None = None
    calibration: str | os.PathLike | Calibration | None = field(default=None, compare=False)  # its digest is compared
    plan: str | None = None
    calibration_digest: str | None = field(init=False, default=None)  # of what the file holds
    calibrated: Calibration | None = field(init=False, repr=False, compare=False, default=None)

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
        if self.plan is not None:
            raise ConfigError(f"plan={self.plan!r} is not available in this version: leave it out")
        object.__setattr__(self, "calibrated", self._load() if self.calibration is not None else None)
        object.__setattr__(self, "calibration_digest", self.calibrated and self.calibrated.digest)
        if self.legs.calibrated and self.calibrated is None:
            raise ConfigError(
                f"spec {self.spec!r} needs a calibration: make a file with 'megatron-lowbit calibrate' and pass it as "
                "CommConfig(calibration=FILE), on a command line as --comm-calibration or --lowbit-comm-calibration"
            )

    def _load(self) -> Calibration:
        if not self.legs.calibrated:
            raise ConfigError(
                f"spec {self.spec!r} makes no use of calibration={str(self.calibration)!r}: leave it out, or use "
                "selective4 or outliers=1/64"
            )
        given = self.calibration
        if not given or not isinstance(given, str | os.PathLike | Calibration):
            raise ConfigError(
                f"calibration is {given!r}: give the name of a file that calibrate wrote, or a Calibration"
            )
        calibration = given if isinstance(given, Calibration) else Calibration.load(given)
        calibration.check(spec=self.legs, algorithm=self.algorithm)
        return calibration

    def codec(self, leg: str, site: str | None, rank: int) -> Codec:
        """What `rank` uses at `site` on the "scatter" or the "gather" leg. Raises ConfigError for an unknown site."""
        parsed: _spec.Leg = getattr(self.legs, leg)
        if not parsed.calibrated:
            return make(parsed)
        if site is None:
            raise ConfigError(f"{str(parsed)!r} depends on the site: name one, such as {self.calibrated.sites[0]!r}")
        return make(parsed).bind(self.calibrated.statistics(site, leg), rank)

    @property
    def legs(self) -> _spec.Spec:
        """The parsed spec."""
        return _spec.parse(self.spec)

    def selects(self, site: str) -> bool:
        """Whether `site` is to be compressed."""
        return self.sites is None or any(fnmatchcase(site, pattern) for pattern in self.sites)
