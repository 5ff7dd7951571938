"""Counters add up and reset."""

import megatron_lowbit as lowbit
from megatron_lowbit import telemetry


def test_counts_and_reset():
    lowbit.reset_stats()
    telemetry.record("a", values=100, world=4, sent=30, path="two-step", backend="numba", fallback=None)
    telemetry.record("a", values=10, world=4, sent=30, path="exact", backend="numba", fallback="below min_bytes")
    assert lowbit.stats() == {
        "a": {
            "calls": 2,
            "values": 110,
            "bytes_sent": 60,
            "bytes_bf16": 300 + 30,
            "paths": {"two-step": 1, "exact": 1},
            "backends": {"numba": 1},
            "fallbacks": {"below min_bytes": 1},
        }
    }
    lowbit.stats()["a"]["calls"] = 7
    assert lowbit.stats()["a"]["calls"] == 2
    lowbit.reset_stats()
    assert lowbit.stats() == {}
