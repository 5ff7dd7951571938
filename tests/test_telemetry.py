"""Counters add up and reset."""

import megatron_lowbit as lowbit
from megatron_lowbit import telemetry


def test_counts_and_reset():
    lowbit.reset_stats()
    telemetry.record("a", values=100, plain=300, sent=30, path="two-step", backend="numba", fallback=None)
    telemetry.record("a", values=10, plain=30, sent=30, path="exact", backend="numba", fallback="below min_bytes")
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


def test_a_ring_sends_every_byte_twice_but_for_the_own_share():
    assert [telemetry.ring_bytes(240, world) for world in (1, 2, 3, 8)] == [0, 240, 320, 420]
