"""A case: one way for N ranks to communicate, and what it sends."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property

from .. import policy
from ..codecs import make
from ..collectives.topology import Nodes
from ..config import CommConfig
from ..errors import ConfigError

TOKENS = 4096  # of the message that bits are counted of: in short ones the padding of sections would show


@dataclass(frozen=True)
class Case:
    """`tp` ranks that reduce as `config` says, messages of every size: min_bytes counts for speed, not for accuracy."""

    config: CommConfig
    tp: int
    nodes: int = 1  # equal ones, for "hierarchical"

    def __post_init__(self) -> None:
        if self.tp < 2:
            raise ConfigError(f"TP is {self.tp}: give 2 or more ranks, as fewer have nothing to communicate")
        for statistics in (self.config.calibrated, self.config.planned):
            if statistics is not None:
                statistics.check(tp=self.tp)
        if self.config.min_bytes != 0:
            raise ConfigError(f"min_bytes is {self.config.min_bytes}: give 0, so that every message is compressed")
        Nodes.among(self.tp, self.nodes)

    @cached_property
    def algorithm(self) -> str:
        """What "auto" comes to: "one-shot", "two-step" or "hierarchical", with a plan the one that it was made for."""
        return policy.algorithm(self.config, self.tp, Nodes.among(self.tp, self.nodes))

    @property
    def hierarchy(self) -> dict[str, int | str | None]:
        """What else makes a row of results this case: None, unless it is hierarchical."""
        nested = self.algorithm == "hierarchical"
        return {"nodes": self.nodes if nested else None, "outer_spec": self.config.outer_spec if nested else None}

    @cached_property
    def key(self) -> str:
        """What makes results of this case: equal for equal cases, also of another process."""
        config = self.config
        parts = [config.spec, self.tp, self.algorithm, config.sites, config.calibration_digest, config.plan_digest]
        return json.dumps(parts + [value for value in self.hierarchy.values() if value is not None])

    def bits_per_value(self, features: dict[str, int]) -> float:
        """Bits that a value costs, averaged over all hops and over all sites by their features.

        features: of each site. Scales, zeros, outliers and padding are counted; what stays exact as 16 bits.
        """
        bits = sum(count * self.bits_at(site, count) for site, count in features.items())
        return bits / sum(features.values())

    def bytes_per_token(self, features: dict[str, int]) -> float:
        """Bytes a rank hands to the network for a token, at all sites together."""
        return sum(count * self.bits_at(site, count) / 8 * self.hops(site) for site, count in features.items())

    def bits_at(self, site: str, features: int) -> float:
        """Bits that a value costs at one site."""
        if self.exact_at(site):
            return 16.0
        legs, shape = self.config.legs_at(site), (TOKENS, features)
        scatter = make(legs.scatter).bits_per_value(shape)
        if self.algorithm == "one-shot":
            return scatter
        if self.algorithm == "two-step":
            return (scatter + make(legs.gather).bits_per_value(shape)) / 2
        outer = self.config.outer_at(site)
        back, forth = (make(leg).bits_per_value(shape) for leg in (outer.gather, outer.scatter))
        inside = 1 - self.nodes / self.tp  # of a message, that a rank sends within its node, each way
        between = (self.nodes - 1) / self.tp
        return (inside * scatter + between * forth + (inside + between) * back) / (2 * (inside + between))

    def hops(self, site: str) -> float:
        """How often a rank sends a whole message's bytes: N - 1 times in one-shot, else 2 (N - 1) / N times."""
        one_shot = self.algorithm == "one-shot" and not self.exact_at(site)
        return self.tp - 1 if one_shot else 2 * (self.tp - 1) / self.tp

    def exact_at(self, site: str) -> bool:
        """Whether nothing is compressed at `site`."""
        return self.algorithm == "exact" or not self.config.selects(site) or self.config.keeps_exact(site)
