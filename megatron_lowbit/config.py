"""`CommConfig`: everything the user decides, frozen, validated once when it is made."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from types import MappingProxyType

from . import spec as _spec
from .calibration_file import Calibration
from .codecs import Codec, make
from .errors import ConfigError
from .plan_file import EXACT, Plan
from .tuned_table import TunedTable

DEFAULT_SPEC = "gauss4:g128:trellis"  # fewest bits within 1 % of perplexity: docs/accuracy.md
PLANNED = "plan"  # what `spec` reads where each site has its own
ALGORITHMS = ("auto", "one-shot", "two-step", "hierarchical", "exact")
COMPRESSING = ALGORITHMS[:-1]


@dataclass(frozen=True)
class CommConfig:
    """How partial sums travel.

    spec: codec of both legs, or "scatter/gather" (see `megatron_lowbit.spec`); None: what the plan says, or
        DEFAULT_SPEC.
    algorithm: "auto" (with a plan, what it was made for), "one-shot", "two-step", "hierarchical" (of nodes of as many
        ranks each; on one node, and with one rank on each, it is two-step) or "exact"; of the all-reduce, but "exact"
        holds for all collectives.
    min_bytes: of the all-reduce; messages of fewer bytes (in their own dtype) go uncompressed. None: the measured
        threshold with "auto", 0 with a named algorithm (who names one has decided).
    sites: glob patterns of the sites to compress, such as "layers.*.mlp"; None: all. Others go exact, and are counted.
    calibration: the file that `megatron-lowbit calibrate` wrote, or a Calibration; for codecs that need to know the
        values of a site (`outliers=`, selective4), and for those only. It is read when the configuration is made.
    plan: in place of a spec a file that `megatron-lowbit plan` wrote, or a Plan: each site has its own spec there. A
        site that it lacks is an error when it is used, unless `sites` leaves it out.
    outer_spec: what travels between nodes in "hierarchical", on both hops of the all-reduce there; None: what a site's
        spec says. It is what everybody decodes: given this, the spec's second leg is not used there.
    tuned: the file that `megatron-lowbit tune` wrote, or a TunedTable, to decide by in place of this user's own; for
        "auto" without min_bytes, as nothing else is left to decide.

    Raises ConfigError naming the wrong value and what is allowed.
    """

    spec: str | None = None
    algorithm: str = "auto"
    min_bytes: int | None = None
    sites: tuple[str, ...] | None = None
    calibration: str | os.PathLike | Calibration | None = field(default=None, compare=False)  # its digest is compared
    plan: str | os.PathLike | Plan | None = field(default=None, compare=False)
    outer_spec: str | None = None
    tuned: str | os.PathLike | TunedTable | None = field(default=None, compare=False)
    calibration_digest: str | None = field(init=False, default=None)  # of what the file holds
    plan_digest: str | None = field(init=False, default=None)
    tuned_digest: str | None = field(init=False, default=None)
    calibrated: Calibration | None = field(init=False, repr=False, compare=False, default=None)
    planned: Plan | None = field(init=False, repr=False, compare=False, default=None)
    tuned_table: TunedTable | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        if self.plan is not None:
            object.__setattr__(self, "planned", self._load_plan())
            object.__setattr__(self, "plan_digest", self.planned.digest)
        spec = PLANNED if self.planned else DEFAULT_SPEC if self.spec is None else str(_spec.parse(self.spec))
        object.__setattr__(self, "spec", spec)
        if self.algorithm not in ALGORITHMS:
            raise ConfigError(f"unknown algorithm {self.algorithm!r}: use one of {', '.join(ALGORITHMS)}")
        self._check_hierarchy()
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
        object.__setattr__(self, "tuned_table", self._load_tuned() if self.tuned is not None else None)
        object.__setattr__(self, "tuned_digest", self.tuned_table and self.tuned_table.digest)
        object.__setattr__(self, "calibrated", self._load() if self.calibration is not None else None)
        object.__setattr__(self, "calibration_digest", self.calibrated and self.calibrated.digest)
        if self.calibrated is None and (needing := [str(legs) for legs in self.all_specs if legs.calibrated]):
            raise ConfigError(
                f"spec {needing[0]!r} needs a calibration: make a file with 'megatron-lowbit calibrate' and pass it as "
                "CommConfig(calibration=FILE), on a command line as --comm-calibration or --lowbit-comm-calibration"
            )

    def _check_hierarchy(self) -> None:
        if self.outer_spec is not None:
            object.__setattr__(self, "outer_spec", str(_spec.parse(self.outer_spec)))
            asked = self.planned.algorithm if self.planned and self.algorithm == "auto" else self.algorithm
            if asked not in ("auto", "hierarchical"):
                raise ConfigError(
                    f"algorithm {asked!r} makes no use of outer_spec={self.outer_spec!r}, which is for what travels "
                    "between nodes: leave it out, or use algorithm 'hierarchical'"
                )
        if (self.algorithm == "hierarchical" or self.outer_spec is not None) and not self.nests:
            raise ConfigError(
                f"{self._ranged[0]!r} cannot travel hierarchically, as it needs the ranges of what it encodes, and "
                "those of a node's sums are in no calibration: use another codec, such as int4:outliers=1/64, or "
                "algorithm 'two-step' without an outer_spec"
            )

    @cached_property
    def nests(self) -> bool:
        """Whether all its specs can travel hierarchically: what "auto" needs for that."""
        return not self._ranged

    @property
    def _ranged(self) -> list[str]:
        """The legs that could not travel hierarchically, of those that would."""
        outer = _spec.parse(self.outer_spec) if self.outer_spec else None
        legs = [leg for spec in self.specs for leg in (spec.scatter, (outer or spec).scatter, (outer or spec).gather)]
        return [str(leg) for leg in legs if leg.ranged]

    def _load_plan(self) -> Plan:
        if self.spec not in (None, PLANNED):
            raise ConfigError(f"spec {self.spec!r} and a plan exclude each other, as a plan has its own: give one")
        if not self.plan or not isinstance(self.plan, str | os.PathLike | Plan):
            raise ConfigError(
                f"plan is {self.plan!r}: give the name of a plan file that 'megatron-lowbit plan' wrote, or a Plan"
            )
        return self.plan if isinstance(self.plan, Plan) else Plan.load(self.plan)

    def _load_tuned(self) -> TunedTable:
        given = self.tuned
        if not given or not isinstance(given, str | os.PathLike | TunedTable):
            raise ConfigError(f"tuned is {given!r}: give the name of a file that tune wrote, or a TunedTable")
        if self.algorithm != "auto" or self.min_bytes is not None:
            raise ConfigError(
                f"algorithm {self.algorithm!r} with min_bytes={self.min_bytes} leaves nothing to decide by "
                f"tuned={str(given)!r}: leave it out, or use algorithm 'auto' without min_bytes"
            )
        return given if isinstance(given, TunedTable) else TunedTable.load(given)

    def _load(self) -> Calibration:
        if not any(legs.calibrated for legs in self.all_specs):
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
        for legs in self.specs:
            calibration.check(spec=legs, algorithm=self.algorithm)
        if self.outer_spec is not None:
            calibration.check(spec=_spec.parse(self.outer_spec), algorithm="hierarchical")
        return calibration

    def codec(self, leg: str, site: str | None, rank: int) -> Codec:
        """What `rank` uses at `site` on the "scatter" or the "gather" leg, or, between nodes, on the "outer scatter" or
        the "outer gather" leg. Raises ConfigError for an unknown site."""
        legs, leg = (self.outer_at if leg.startswith("outer ") else self.legs_at)(site), leg.removeprefix("outer ")
        parsed: _spec.Leg = getattr(legs, leg)
        if not parsed.calibrated:
            return make(parsed)
        if site is None:
            raise ConfigError(f"{str(parsed)!r} depends on the site: name one, such as {self.calibrated.sites[0]!r}")
        return make(parsed).bind(self.calibrated.statistics(site, leg), rank)

    @property
    def specs(self) -> tuple[_spec.Spec, ...]:
        """All parsed specs: the plan's, or the one."""
        return self.planned.specs if self.planned else (_spec.parse(self.spec),)

    @property
    def all_specs(self) -> tuple[_spec.Spec, ...]:
        """These, and what travels between nodes."""
        return (*self.specs, *([_spec.parse(self.outer_spec)] if self.outer_spec else []))

    @property
    def per_site(self) -> bool:
        """Whether sites differ in what they send: in their spec, or in the statistics that it is given."""
        return self.planned is not None or self.calibrated is not None

    def legs_at(self, site: str | None) -> _spec.Spec:
        """The parsed spec of a site that is not exact. Raises ConfigError for one that the plan lacks."""
        if self.planned is None:
            return _spec.parse(self.spec)
        if site is None:
            raise ConfigError(f"a plan depends on the site: name one, such as {next(iter(self.planned.sites))!r}")
        self.planned.check(sites=[site])
        return _spec.parse(self.planned.sites[site])

    def outer_at(self, site: str | None) -> _spec.Spec:
        """As `legs_at`, of what travels between nodes."""
        return self.legs_at(site) if self.outer_spec is None else _spec.parse(self.outer_spec)

    def check(
        self,
        sites: Iterable[str] = (),
        tp: int | None = None,
        fingerprint: str | None = None,
        tensors: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Raise ConfigError if the plan or the calibration is for other sites, ranks or another model.

        tensors: the model's, name -> digest, so that the message can say which ones differ from the plan's.
        Sites that are not selected need neither; sites whose spec makes no use of a calibration need none.
        """
        sent = [site for site in sites if self.selects(site)]
        if self.planned is not None:
            self.planned.check(tp, fingerprint, sent, tensors)
        if self.calibrated is not None:
            using = [site for site in sent if not self.keeps_exact(site) and self._calibrated_at(site)]
            self.calibrated.check(tp=tp, fingerprint=fingerprint, sites=using)

    def keeps_exact(self, site: str) -> bool:
        """Whether the plan wants `site` exact."""
        return self.planned is not None and self.planned.sites.get(site) == EXACT

    def selects(self, site: str) -> bool:
        """Whether `site` is to be compressed, if the plan does not keep it exact."""
        return self.sites is None or any(fnmatchcase(site, pattern) for pattern in self.sites)

    def _calibrated_at(self, site: str) -> bool:
        return self.legs_at(site).calibrated or self.outer_at(site).calibrated
