"""Which algorithm for this call: a pure function of facts that all ranks share, so that ranks never disagree."""

from __future__ import annotations

from dataclasses import dataclass

from .config import CommConfig

# Messages of fewer bytes go uncompressed under "auto": (bytes, where this was measured).
MIN_BYTES: dict[str, tuple[int, str]] = {
    "cpu": (1 << 17, "benchmarks/results/threshold.json: 2 ranks, gloo, 1 Gbit/s, AMD EPYC with 2 cores, 2026-11-21"),
    "cuda": (1 << 21, "not measured here: upper end of the 1-2 MB published for INT4 on MI300X, vLLM pull 19744"),
}

# Larger messages travel in chunks of about so many bytes (of the message, in its own dtype), from rank to rank; where
# there is no entry, in one go by the backend's own collectives.
CHUNK_BYTES: dict[str, tuple[int, str]] = {
    "cpu": (1 << 22, "benchmarks/results/link_chunks.json: gloo, 0.2 to 5 Gbit/s, AMD EPYC with 2 cores, 2026-11-21"),
}


@dataclass(frozen=True)
class Decision:
    """algorithm: the path, such as "two-step" or "exact"; fallback: why exact although a codec is configured, if so.

    chunks: how many parts overlap (collectives/pipeline.py); 0: the backend's own collectives.
    """

    algorithm: str
    fallback: str | None = None
    chunks: int = 0


def choose(config: CommConfig, site: str, nbytes: int, world: int, device: str) -> Decision:
    """The algorithm to all-reduce `nbytes` (in their own dtype) among `world` ranks on a device type like "cuda"."""
    if (exact := bypass(config, site, world, nbytes == 0)) is not None:
        return exact
    if nbytes < minimum(config, device):
        return Decision("exact", "below min_bytes")
    return Decision(resolved(wanted(config), world), chunks=chunks(nbytes, device))


def wanted(config: CommConfig) -> str:
    """The algorithm that was asked for. A plan's is, unless another is named: its legs and loss are of that one."""
    return config.planned.algorithm if config.planned and config.algorithm == "auto" else config.algorithm


def chunks(nbytes: int, device: str) -> int:
    """In how many parts a message travels."""
    return max(1, round(nbytes / CHUNK_BYTES[device][0])) if device in CHUNK_BYTES else 0


def resolved(algorithm: str, world: int) -> str:
    """What "auto" comes to for a message that is large enough; other algorithms are themselves."""
    if algorithm != "auto":
        return algorithm
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


def minimum(config: CommConfig, device: str) -> int:
    """The smallest message, in bytes, that is compressed."""
    if config.min_bytes is not None:
        return config.min_bytes
    return MIN_BYTES.get(device, MIN_BYTES["cpu"])[0] if config.algorithm == "auto" else 0
