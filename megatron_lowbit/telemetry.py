"""Counters of what was really sent, per site: the proof that no path was taken silently."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

_lock = threading.Lock()
_sites: dict[str, Site] = {}


@dataclass
class Site:
    """Counters of one synchronization point on this rank. Bytes are payload this rank hands to the network."""

    calls: int = 0
    values: int = 0
    bytes_sent: int = 0
    bytes_bf16: int = 0
    paths: Counter[str] = field(default_factory=Counter)
    backends: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)


def ring_bytes(nbytes: int, world: int) -> int:
    """Bytes one rank sends in a bandwidth-optimal exact all-reduce of `nbytes`: 2 (N - 1) / N of them."""
    return 2 * nbytes * (world - 1) // world


def record(site: str, *, values: int, plain: int, sent: int, path: str, backend: str, fallback: str | None) -> None:
    """Count one call.

    plain: bytes this rank would have sent in the same collective in plain bf16. fallback: why the call went
    uncompressed although a codec is configured, or None.
    """
    with _lock:
        if (counters := _sites.get(site)) is None:
            counters = _sites[site] = Site()
        counters.calls += 1
        counters.values += values
        counters.bytes_sent += sent
        counters.bytes_bf16 += plain
        counters.paths[path] += 1
        if path != "exact":
            counters.backends[backend] += 1
        if fallback is not None:
            counters.fallbacks[fallback] += 1


def stats() -> dict[str, dict]:
    """Per site, since the start or `reset_stats()`, on this rank:

    calls, values; bytes_sent; bytes_bf16 (what the exact collective would have sent in bf16, an all-reduce as a ring);
    paths {"one-shot", "two-step", "hierarchical", "reduce-scatter", "all-gather", "all-to-all" or "exact": calls};
    backends {name: compressed calls}; fallbacks {reason: calls that went exact}.
    """
    with _lock:
        return {
            name: {
                "calls": s.calls,
                "values": s.values,
                "bytes_sent": s.bytes_sent,
                "bytes_bf16": s.bytes_bf16,
                "paths": dict(s.paths),
                "backends": dict(s.backends),
                "fallbacks": dict(s.fallbacks),
            }
            for name, s in sorted(_sites.items())
        }


def reset_stats() -> None:
    """Set every counter back to nothing."""
    with _lock:
        _sites.clear()
