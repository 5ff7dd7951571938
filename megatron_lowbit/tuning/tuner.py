"""Measures, on the ranks of a group, which way is fastest for a message of each size: what a tuned table is made of.

Hazards: ranks that decided differently would hang, so the candidates are a pure function, and every other decision,
such as that the time is over, is taken from numbers reduced over all ranks. A wrong result is fast, so each candidate
is verified before it is timed (verdict.py). Times of different minutes are not comparable, so candidates take turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from .. import policy, simulate, spec, tuned_table
from ..calibration_file import FRACTION, Calibration
from ..collectives.exchange import guarded
from ..communicator import DTYPES, communicator
from ..config import CommConfig
from ..errors import ConfigError, RankError
from ..policy import Decision
from ..ranges import Ranges
from ..tuned_table import EXACT, MARGIN, Candidate, Row, TunedTable
from .candidates import SIZES, candidates
from .verdict import Message

FEATURES = 4096
REPEATS, FEWEST = 9, 3  # of each candidate, at one size: as many as wanted, and as are enough for a median
HOPELESS, TRIES = 3.0, 2  # times exact, each time of so many: such a candidate is not timed again at that size
SITE = "tune"
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OVER = "the time was over"


@dataclass(frozen=True)
class Job:
    """What to measure; alike on all ranks. sizes: bytes of messages. Raises ConfigError."""

    specs: tuple[str, ...]
    dtypes: tuple[str, ...] = ("bf16",)
    sizes: tuple[int, ...] = SIZES
    budget_seconds: float = 120.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "specs", tuple(dict.fromkeys(str(spec.parse(each)) for each in self.specs)))
        object.__setattr__(self, "dtypes", tuple(dict.fromkeys(self.dtypes)))
        object.__setattr__(self, "sizes", tuple(sorted(set(self.sizes))))
        if wrong := [size for size in self.sizes if type(size) is not int or not 64 <= size <= 1 << 34]:
            raise ConfigError(f"size {wrong[0]}: give bytes of messages, from 64 to 16 GiB")
        if wrong := [dtype for dtype in self.dtypes if dtype not in TORCH]:
            raise ConfigError(f"dtype {wrong[0]!r} is unknown: use {', '.join(TORCH)}")
        if not (self.specs and self.dtypes and self.sizes):
            raise ConfigError("there is nothing to measure: give a spec, a dtype and a size, at least")
        if not 0 < self.budget_seconds <= 1e6:
            raise ConfigError(f"a budget of {self.budget_seconds} s: give seconds above 0, at most a million")

    @property
    def parts(self) -> list[tuple[str, str]]:
        """(spec, dtype), in the order in which they are measured."""
        return [(each, dtype) for each in self.specs for dtype in self.dtypes]


@dataclass
class Tuner:
    """A tuner of one group, on one rank: all ranks make one with the same job, and call the same.

    progress: called with what is about to be measured.
    """

    group: dist.ProcessGroup
    job: Job
    progress: Callable[[str], None] = lambda _: None
    elapsed: float = field(init=False, default=0.0)  # seconds, of the slowest rank when it was last asked

    def table(self) -> TunedTable:
        """Measure all there is time for. A collective call. Raises ConfigError if not one size was measured, RankError
        if a rank is lost."""
        self._start, rows = time.monotonic(), {}
        self._now()
        for number, part in enumerate(self.job.parts):
            left = self.job.budget_seconds - self.elapsed  # shared by all parts, so that none goes without
            found = list(self._rows(*part, self.elapsed + left / (len(self.job.parts) - number)))
            if found:
                rows[part] = found
        if not rows:
            raise ConfigError(
                f"{self.job.budget_seconds:g} s are too short to measure {self.job.sizes[0]} bytes: allow more with "
                "--budget-seconds, or give smaller --bytes"
            )
        limit = self.job.budget_seconds
        return TunedTable(self._comm.key, rows, tuned_table.now(), limit, round(self.elapsed, 3), MARGIN)

    def _rows(self, text: str, dtype: str, deadline: float) -> Iterator[Row]:
        """From the smallest size on, until `deadline`."""
        calibration = _calibration(spec.parse(text), dist.get_world_size(self.group))
        self._comm = communicator(self.group, CommConfig(text, min_bytes=0, calibration=calibration))
        for nbytes in self.job.sizes:
            if self.elapsed >= deadline:
                return
            self.progress(f"{text} {dtype} {nbytes:,} bytes")
            if (row := self._row(text, dtype, nbytes, calibration, deadline)) is not None:
                yield row

    def _row(self, text: str, dtype: str, nbytes: int, calibration: Calibration | None, deadline: float) -> Row | None:
        facts = self._comm.facts
        ways = candidates(facts.nodes.nested and self._comm.config.nests, facts.device, nbytes)
        message = self._message(TORCH[dtype], nbytes)
        failed = self._failed(ways[1:], message, text, calibration, deadline)
        exact, x = Candidate(EXACT), message.x
        taken = self._times([way for way in ways if str(way) not in failed], x, deadline)
        if len(taken[exact]) < FEWEST:
            return None
        confirmed = {exact}
        while (best := tuned_table.fastest(ms := _medians(taken), MARGIN)) not in confirmed:
            confirmed.add(best)  # the best of several may have been lucky: once more, against exact alone
            for way, seconds in self._times([exact, best], x, deadline).items():
                taken[way] += seconds
        skipped = {name: why for name, why in failed.items() if why == OVER}
        skipped |= {str(way): _why(taken[way], taken[exact]) for way in taken if str(way) not in ms}
        failed = {name: why for name, why in failed.items() if why != OVER}
        return Row(nbytes, best.algorithm, best.chunks, ms, failed, skipped)

    def _message(self, dtype: torch.dtype, nbytes: int) -> Message:
        values = max(1, nbytes // dtype.itemsize)
        features = min(FEATURES, values)
        generator = torch.Generator().manual_seed(dist.get_rank(self.group))
        x = torch.randn(values // features, features, generator=generator).to(dtype).to(self._comm.facts.device)
        message = Message(x, self._comm.all_reduce_by(Decision(EXACT), x, SITE), self.group)
        expected = message.expected(lambda partials: simulate.all_reduce(partials, DTYPES[dtype], "one-shot"))
        if self._exact(x).way and (flaw := message.flaw(self._run(Candidate(EXACT), x), expected)):
            raise RankError(
                f"exact sums over the ranks' own connections are {flaw}, for {nbytes} bytes: use LOWBIT_TRANSPORT=torch"
            )
        return message

    def _failed(
        self, ways: Sequence[Candidate], message: Message, text: str, calibration: Calibration | None, deadline: float
    ) -> dict[str, str]:
        """Candidate -> why it may not be timed. Chunks change nothing in what is computed."""
        expected: dict[str, torch.Tensor | str] = {}
        found = {}
        for way in ways:
            if self._now() >= deadline:
                found[str(way)] = OVER
                continue
            if way.algorithm not in expected:
                expected[way.algorithm] = self._simulated(way.algorithm, message, text, calibration)
            if isinstance(expected[way.algorithm], str):
                found[str(way)] = expected[way.algorithm]
            elif flaw := message.flaw(self._run(way, message.x), expected[way.algorithm]):
                found[str(way)] = flaw
        return found

    def _simulated(
        self, algorithm: str, message: Message, text: str, calibration: Calibration | None
    ) -> torch.Tensor | str:
        """Some rows of what every rank should have; or why there is no such algorithm for this spec, as on any rank."""
        nodes = self._comm.facts.nodes.members
        names = {rank: number for number, ranks in enumerate(nodes) for rank in ranks}
        more = {"nodes": [names[rank] for rank in sorted(names)]} if algorithm == "hierarchical" else {}
        site = SITE if calibration else None
        try:
            return message.expected(
                lambda partials: simulate.all_reduce(partials, text, algorithm, calibration, site, **more)
            )
        except ConfigError as error:
            return str(error)

    def _times(self, ways: Sequence[Candidate], x: torch.Tensor, deadline: float) -> dict[Candidate, list[float]]:
        """Seconds of the slowest rank, candidate by candidate and that again and again."""
        taken: dict[Candidate, list[float]] = {way: [] for way in ways}
        hopeless: set[Candidate] = set()
        for _ in range(REPEATS):
            for way in ways:
                if way in hopeless:
                    continue
                if self.elapsed >= deadline:
                    return taken
                start = self._clock()
                self._run(way, x)
                taken[way].append(self._slowest(self._clock() - start))
                if len(taken[way]) == TRIES and min(taken[way]) > HOPELESS * min(taken[Candidate(EXACT)]):
                    hopeless.add(way)
        return taken

    def _run(self, way: Candidate, x: torch.Tensor) -> torch.Tensor:
        decision = self._exact(x) if way.algorithm == EXACT else Decision(way.algorithm, chunks=way.chunks)
        return self._comm.all_reduce_by(decision, x, SITE)

    def _exact(self, x: torch.Tensor) -> Decision:
        """As the gate leaves a message."""
        return policy.exact(x.nbytes, self._comm.facts)

    def _now(self) -> float:
        self._slowest(0.0)
        return self.elapsed

    def _slowest(self, seconds: float) -> float:
        """Of all ranks'; and what their clocks say, so that all see the time being over at once."""
        nccl = str(dist.get_backend(self.group)) == "nccl"
        both = torch.tensor([seconds, time.monotonic() - self._start], dtype=torch.float64)
        both = both.cuda() if nccl else both
        with guarded(self.group):
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self.group)
        slowest, self.elapsed = both.tolist()
        return slowest

    def _clock(self) -> float:
        if self._comm.facts.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _medians(taken: dict[Candidate, list[float]]) -> dict[str, float]:
    """Milliseconds, of what was timed often enough."""
    return {str(way): 1e3 * statistics.median(each) for way, each in taken.items() if len(each) >= FEWEST}


def _why(seconds: Sequence[float], exact: Sequence[float]) -> str:
    """A candidate was not timed often enough."""
    if len(seconds) == TRIES and min(seconds) > HOPELESS * min(exact):
        return f"took {min(seconds) / min(exact):.1f} times as long as exact"
    return OVER


def _calibration(legs: spec.Spec, world: int) -> Calibration | None:
    """For a spec that needs one: of values like those that are sent. What is in it changes no time."""
    if not legs.calibrated:
        return None
    fraction = next(leg.outliers for leg in (legs.scatter, legs.gather) if leg.calibrated) or FRACTION
    wide = torch.full((world, FEATURES), 4.0)
    total = wide[0] * world**0.5
    return Calibration.from_ranges({SITE: Ranges(-wide, wide, -total, total)}, fraction)
