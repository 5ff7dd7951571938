"""Measures candidates of the kernel benchmark into rows of a JSON file, which is written after every figure."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path

import torch
from common import RESULTS, machine
from kernel_cases import MOST_DIFFERENCE, Case, function
from kernel_clock import Clock
from kernel_peers import peers

Task = tuple[str, str, str, int]  # candidate, spec, operation, bytes


class Bench:
    """rows: by task. What an earlier run on this machine left in `path`, with the same sources, is kept."""

    def __init__(self, path: Path | None, dry_run: bool, again: bool) -> None:
        self.path, self.device = path, torch.device("cpu" if dry_run else "cuda")
        self.clock = Clock(self.device, seconds=0.05)
        self.facts = {"machine": machine(), "dry_run": dry_run, "sources": _sources()}
        self.rows: dict[Task, dict] = {}
        self._copies: dict[int, dict] = {}
        self.missing: dict[str, str] = {}  # candidates that cannot be imported, and why
        if path and path.exists() and not again:
            old = json.loads(path.read_text())
            if _lasting(old) == _lasting(self.facts):
                measured = [row for row in old["rows"] if "failed" not in row]
                self.rows = {(row["candidate"], row["spec"], row["operation"], row["bytes"]): row for row in measured}

    def run(self, task: Task) -> None:
        """Measure, or note why not; beside ours always a copy."""
        candidate, spec, operation, size = task
        try:
            figures = self._measure(*task)
        except Exception as error:  # whatever goes wrong with one candidate must not end the others' run
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # raises if this process has lost its device for good
            text = str(error).strip().split("\n")[0]
            figures = {"failed": f"{type(error).__name__}: {text}"[:300]}
        if figures is not None:
            self.rows[task] = {"candidate": candidate, "spec": spec, "operation": operation, "bytes": size} | figures
            self._save()
            if candidate == "ours":
                self.run(("copy", spec, operation, size))

    def _measure(self, candidate: str, spec: str, operation: str, size: int) -> dict | None:
        """None: this candidate does not do that."""
        case = Case(spec, operation, size)
        if candidate == "copy":
            return self._copy(case.moved)
        if candidate not in ("ours", "definition", "compiled"):
            make = None if candidate in self.missing else peers(case, spec).get(candidate)
            try:
                return make and self._peer(make(self.device, self.clock.sets(case.moved)))
            except ImportError as error:
                self.missing[candidate] = str(error)
                return None
        if case.codec.kernel is None and candidate == "ours":
            return None
        call = function(candidate, case)
        sets = case.buffers(self.device, self.clock.sets(case.moved))
        call(**sets[0])
        same, difference = case.differences(sets[0])
        facts = {"moved": case.moved, "same_bits": same, "difference": round(difference, 6)}
        if not (same if candidate == "ours" else difference <= MOST_DIFFERENCE):
            return facts | {"failed": "wrong"}
        calls = [lambda buffers=buffers: call(**buffers) for buffers in sets]
        return facts | self._times(calls, case.moved, graph=candidate != "definition")

    def _peer(self, job) -> dict:
        error = job.error()
        facts = {"moved": job.moved, "error": round(error, 6), "bound": round(job.bound, 6)}
        return facts | (self._times(job.calls, job.moved) if error <= job.bound else {"failed": "wrong"})

    def _copy(self, moved: int) -> dict:
        """From one half of so many bytes to the other."""
        if moved not in self._copies:
            source = torch.randint(256, (moved // 2,), dtype=torch.uint8, device=self.device)
            source = source.expand(self.clock.sets(moved), -1).contiguous()
            calls = [lambda s=s, t=t: t.copy_(s) for s, t in zip(source, torch.empty_like(source))]
            self._copies[moved] = {"moved": moved // 2 * 2} | self._times(calls, moved)
        return self._copies[moved]

    def _times(self, calls: list, moved: int, graph: bool = True) -> dict:
        eager = self.clock.eager(calls, moved)
        figures = {"eager_us": eager}
        if graph:
            try:
                figures["graph_us"] = self.clock.graph(calls, moved)
            except RuntimeError as error:  # such as calls that wait for the device, or copy from the host
                figures["no_graph"] = str(error).strip().split("\n")[0][:200]
        best = figures.get("graph_us", eager)[0]
        for name in figures.keys() - {"no_graph"}:
            figures[name] = [round(time, 2) for time in figures[name]]
        return figures | {"gb_s": round(moved / 1e3 / best, 2)}

    def _save(self) -> None:
        """A row a line. A kill while it writes leaves the file that was."""
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rows = ",\n".join(f"  {json.dumps(row)}" for row in self.rows.values())
            partial = self.path.with_suffix(".partial")
            facts = json.dumps(self.facts | {"missing": self.missing}, indent=1)[:-2]
            partial.write_text(f'{facts},\n "rows": [\n{rows}\n ]\n}}\n')
            os.replace(partial, self.path)


def compile_all(tasks: list[Task], jobs: int, seconds: float, device: str) -> None:
    """Compile our kernels in `jobs` processes at once; Triton's cache on disk hands them to this one."""
    kinds = {}
    for candidate, spec, operation, size in sorted(tasks, key=lambda task: task[3]):
        rows = max(1, size // 2**14)
        if candidate == "ours":  # Triton makes a kernel of its own for 1, and one for multiples of 16
            kinds.setdefault((spec, operation, rows == 1, rows % 16 == 0), (spec, operation, size))
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    wait([pool.submit(_compile, *kind, device) for kind in kinds.values()], timeout=seconds)
    pool.shutdown(cancel_futures=True)


def _compile(spec: str, operation: str, size: int, device: str) -> None:
    case = Case(spec, operation, size)
    if case.codec.kernel is not None:
        function("ours", case)(**case.buffers(torch.device(device), 1)[0])


def _lasting(facts: dict) -> tuple:
    """What has to be the same for figures to stand in one table."""
    same = {name: value for name, value in facts["machine"].items() if name not in ("date", "command", "numba")}
    return same, facts["dry_run"], facts["sources"]


def _sources() -> str:
    """A hash of the kernels and of the codecs they are kernels of."""
    root, digest = RESULTS.parents[1], hashlib.sha256()
    for path in sorted([*root.glob("kernels/triton_*.py"), *root.glob("megatron_lowbit/codecs/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
