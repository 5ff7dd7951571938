"""Which algorithm for this call: a pure function of facts that all ranks share, so that ranks never disagree."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .collectives.topology import Nodes
from .config import CommConfig
from .errors import ConfigError
from .links import EXACT_UNIT, UNKNOWN, Link, named
from .tuned_table import TunedTable


@dataclass(frozen=True)
class Facts:
    """What all ranks of a group know alike.

    device: a type like "cuda"; link: a name in links.LINKS[device]; tuned: what was measured on such a group; direct:
    whether ranks have connections of their own (collectives/sockets.py).
    """

    world: int
    device: str = "cpu"
    link: str = UNKNOWN
    nodes: Nodes | None = None
    tuned: TunedTable | None = None
    direct: bool = False

    @property
    def kind(self) -> Link:
        return named(self.device, self.link)


@dataclass(frozen=True)
class Decision:
    """algorithm: the path, such as "two-step" or "exact"; fallback: why exact although a codec is configured, if so.

    chunks: how many parts overlap (collectives/pipeline.py); 0: the backend's own collectives. way: of "exact": how
    values travel as they are, to be summed in fp32 and rounded once, as "one-shot"; "": torch's own all-reduce.
    """

    algorithm: str
    fallback: str | None = None
    chunks: int = 0
    way: str = ""


def choose(config: CommConfig, site: str, nbytes: int, facts: Facts, dtype: str = "bf16") -> Decision:
    """The algorithm to all-reduce a message of `nbytes`, in its own dtype: bf16, fp16 or fp32."""
    decision = _choose(config, site, nbytes, facts, dtype)
    if decision.algorithm == "exact" and gated(config) and facts.world > 1 and nbytes:
        return replace(exact(nbytes, facts), fallback=decision.fallback)
    return decision


def exact(nbytes: int, facts: Facts) -> Decision:
    """The fastest way to leave a message as it is, of more than one rank: over their own connections if there are any,
    as gloo's all-reduce takes several times as long for a small message and no less for a large one."""
    way = facts.kind.exact_way(nbytes, facts.world) if facts.direct else ""
    shares = facts.nodes is not None and 1 < len(facts.nodes.members) < facts.world  # uplinks, which a ring spares
    if not way or (shares and way == "two-step"):
        return Decision("exact")
    return Decision("exact", way=way, chunks=max(1, round((nbytes / EXACT_UNIT) ** 0.5)) if facts.world == 2 else 1)


def _choose(config: CommConfig, site: str, nbytes: int, facts: Facts, dtype: str) -> Decision:
    if (bypassed := bypass(config, site, facts.world, nbytes == 0)) is not None:
        return bypassed
    if (measured := tuned(config, site, nbytes, facts, dtype)) is not None:
        return measured
    if (reason := too_small(config, site, nbytes, facts)) is not None:
        return Decision("exact", reason)
    name = algorithm(config, facts.world, facts.nodes)
    return Decision(name, chunks=chunks(nbytes, facts, name))


def algorithm(config: CommConfig, world: int, nodes: Nodes | None = None) -> str:
    """The algorithm of messages that are large enough. Raises ConfigError as `resolved` does."""
    name = wanted(config)
    return resolved(name, world, None if name == "auto" and not config.nests else nodes)


def tuned(config: CommConfig, site: str, nbytes: int, facts: Facts, dtype: str) -> Decision | None:
    """What the tuned table says; None without one, and for what it lacks: a spec, a dtype, any other outer spec."""
    if facts.tuned is None or not gated(config) or config.outer_spec is not None:
        return None
    only = None
    if config.planned:  # its legs and loss are of one algorithm
        only = algorithm(config, facts.world, facts.nodes)
    elif config.calibrated and not config.calibrated.has_sums:
        only = "one-shot"  # it knows nothing of the leg that gathers
    found = facts.tuned.choose(str(config.legs_at(site)), dtype, nbytes, only)
    if found is None:
        return None
    return Decision(found.algorithm, "exact is faster (tuned)" if found.algorithm == "exact" else None, found.chunks)


def wanted(config: CommConfig) -> str:
    """The algorithm that was asked for. A plan's is, unless another is named: its legs and loss are of that one."""
    return config.planned.algorithm if config.planned and config.algorithm == "auto" else config.algorithm


def chunks(nbytes: int, facts: Facts, algorithm: str = "auto") -> int:
    """In how many parts a message travels."""
    return facts.kind.chunks(nbytes, facts.world, algorithm == "hierarchical")


def resolved(algorithm: str, world: int, nodes: Nodes | None = None) -> str:
    """What an algorithm comes to for a message that is large enough. nodes: None: as on one of them.

    "auto" depends on the ranks; "hierarchical" is two-step where there are not several nodes of several ranks; others
    are themselves. Raises ConfigError for "hierarchical" on nodes that differ in their ranks.
    """
    nested = nodes is not None and nodes.nested
    if algorithm == "hierarchical":
        if nodes is not None and not nodes.equal:
            raise ConfigError(
                f"algorithm 'hierarchical' needs nodes of as many ranks each, and these have {nodes.sizes}: start as "
                "many on each node, use algorithm 'two-step', or name other nodes with LOWBIT_NODE"
            )
        return "hierarchical" if nested else "two-step"
    if algorithm != "auto":
        return algorithm
    if nested:
        return "hierarchical"
    # Two ranks: one-shot sends no more than two-step and quantizes once instead of twice. From three ranks on it sends
    # N / 2 times as much.
    return "one-shot" if world == 2 else "two-step"


def bypass(config: CommConfig, site: str, world: int, empty: bool) -> Decision | None:
    """Why a call of any collective goes exact whatever its size, or None. `empty`: on all ranks, and all know."""
    if config.algorithm == "exact":
        return Decision("exact")
    if world == 1:
        return Decision("exact", "world of one rank")
    if not config.selects(site):
        return Decision("exact", "site not selected")
    if config.keeps_exact(site):
        return Decision("exact", "exact in the plan")
    if empty:
        return Decision("exact", "empty message")
    return None


def too_small(config: CommConfig, site: str, nbytes: int, facts: Facts) -> str | None:
    """Why a message is better sent exact, or None."""
    if not gated(config):
        return "below min_bytes" if nbytes < (config.min_bytes or 0) else None
    if nbytes < facts.kind.eligible:
        return "below min_bytes"
    if nbytes < facts.kind.worth_from(config.legs_at(site), facts.world):
        return "link too fast for the codec"
    return None


def gated(config: CommConfig) -> bool:
    """Whether the link decides what is worth compressing: who names min_bytes or an algorithm has done so."""
    return config.algorithm == "auto" and config.min_bytes is None
