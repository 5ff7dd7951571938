"""Time on a GPU: events around calls that go through more memory than its cache holds, eager or replayed from a graph.

A figure is the time of one call, in µs. Calls come in rounds, one call for each set of buffers, and a round touches no
byte twice. Small sets would take too many calls to outgrow the cache: there are at most MOST_SETS, and before each
round as much other memory is read as the cache holds twice over.

On the CPU (`--dry-run`) the same calls are made, with a clock that means nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
MOST_SETS, LEAST_CALLS = 128, 8
LEAST_ROUNDS, MOST_ROUNDS = 3, 30
TOO_SLOW = 1.0  # seconds of a call, from which on it is timed once


class Clock:
    """seconds: about how long to measure for one figure."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds, self.gpu = device, seconds, device.type == "cuda"
        if self.gpu:
            cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
            self.cold = 2 * cache
            self._other = torch.zeros(self.cold // 4, device=device)

    def sets(self, nbytes: int) -> int:
        """How many sets of buffers to go through when a call moves `nbytes`."""
        return min(MOST_SETS, max(2, -(-self.cold // nbytes))) if self.gpu else 2

    def eager(self, calls: Sequence[Call], nbytes: int) -> list[float]:
        """Median, p20 and p80."""
        return self._figure(lambda: [call() for call in calls], len(calls), len(calls) * nbytes, calls[0])

    def graph(self, calls: Sequence[Call], nbytes: int) -> list[float]:
        """Likewise, of a CUDA graph of all the calls."""
        calls = [*calls] * -(-LEAST_CALLS // len(calls)) if self.gpu else calls
        if not self.gpu:
            return self.eager(calls, nbytes)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return self._figure(graph.replay, len(calls), len(calls) * nbytes, None)

    def _figure(self, run: Call, calls: int, nbytes: int, first: Call | None) -> list[float]:
        """run: does `calls` calls that move `nbytes` in all; first: one of them, None if that cannot be had alone."""
        if first is not None:
            first()
            if (seconds := self._time(first)) > TOO_SLOW:
                return [1e6 * seconds] * 3
        seconds = self._time(run)
        rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(self.seconds / max(seconds, 1e-9)))) if self.gpu else 2
        times = self._rounds(run, rounds, nbytes < self.cold) if self.gpu else [self._time(run) for _ in range(rounds)]
        cuts = statistics.quantiles(times, n=5, method="inclusive")
        return [1e6 * seconds / calls for seconds in (statistics.median(times), cuts[0], cuts[3])]

    def _rounds(self, run: Call, rounds: int, cool: bool) -> list[float]:
        """Seconds of each; the host waits only behind the last, so that it runs ahead as in real work."""
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
        for start, end in events:
            if cool:
                self._other.sum()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def _time(self, run: Call) -> float:
        """Seconds, host and device together."""
        start = time.perf_counter()
        run()
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start
