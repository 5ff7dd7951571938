"""One rank of benchmarks/ttft.py: prompts and the tokens after them, by the framework alone and compressed, in turn.

Nothing of the framework is replaced but by the patch that is being measured; `dist.all_reduce` is wrapped to see how
long an exact run spends in it, and what goes through it. All ranks start a prompt together. A time is that of the
slowest rank.
"""

from __future__ import annotations

import inspect
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

import megatron_lowbit as lowbit
from megatron_lowbit.collectives import all_reduce
from megatron_lowbit.engines.base import Engine
from megatron_lowbit.engines.registry import engine_class
from megatron_lowbit.telemetry import ring_bytes

ALGORITHMS = {"gate": {}, "always": {"min_bytes": 0}}  # what a user gets; every message compressed
EXACT = ("exact", "exact")


def run(job: dict) -> None:
    """Rank 0 prints what `measure` returns as its last line."""
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    cuda = job["device"] == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    dist.init_process_group("nccl" if cuda else "gloo")
    torch.set_num_threads(1)
    engine = engine_class(job["engine"])(job["model"], dist.get_world_size(), torch.bfloat16)
    found = measure(engine, job)
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.barrier()


class AllReduces:
    """What goes through torch.distributed.all_reduce meanwhile: seconds of each call, bytes this rank sends (a ring).

    Frameworks call it, and we for some of what stays exact, which `lowbit.stats()` counts too: so its bytes are not
    among these. wait: called before the clock is read.
    """

    def __init__(self, wait: Callable[[], object]) -> None:
        self.seconds, self.sent, self._wait, self._original, self._ours = [], 0, wait, None, None

    def __enter__(self) -> AllReduces:
        self._original, dist.all_reduce = dist.all_reduce, self._timed
        self._ours, all_reduce.exact = all_reduce.exact, self._counted
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce, all_reduce.exact = self._original, self._ours

    def _counted(self, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        self.sent -= ring_bytes(x.nbytes, dist.get_world_size(group))
        return self._ours(x, group)

    def _timed(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._wait()
        start = time.perf_counter()
        result = self._original(tensor, *args, **kwargs)
        self._wait()
        self.seconds.append(time.perf_counter() - start)
        self.sent += ring_bytes(tensor.nbytes, dist.get_world_size())
        return result


class MegatronSteps:
    """Megatron's GPTModel with a key-value cache, called as its static inference engine does."""

    def __init__(self, engine: Engine, length: int) -> None:
        from megatron.core.inference.contexts import StaticInferenceContext

        self._model, self._cache = engine.model, StaticInferenceContext(1, length)
        self._mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=engine.device).triu(1)  # True: hidden
        self._positions = torch.arange(length, device=engine.device)[None]

    def restart(self) -> None:
        self._cache.reset()

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """The next tokens [1, length] -> logits [1, vocabulary] of the last."""
        start = self._cache.sequence_len_offset
        end = start + ids.shape[1]
        if start:
            self._cache.enable_decode_mode()
        place = self._positions[:, start:end], self._mask[..., start:end, :end]
        logits = self._model(ids, *place, inference_context=self._cache, runtime_gather_output=True)
        self._cache.increment_sequence_len_offset(ids.shape[1])
        return logits[:, -1]


class TransformersSteps:
    """A model of Transformers, whoever sharded it, with a key-value cache."""

    def __init__(self, engine: Engine, length: int) -> None:
        self._model, self._cache = engine.model, None
        last = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self._options = {"use_cache": True} | ({"logits_to_keep": 1} if last else {})

    def restart(self) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache()

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """The next tokens [1, length] -> logits [1, vocabulary] of the last."""
        return self._model(input_ids=ids, past_key_values=self._cache, **self._options).logits[:, -1]


@torch.inference_mode()
def measure(engine: Engine, job: dict) -> dict:
    """Times in ms, medians of all repeats: {"exact": {...}, "rows": [...]}.

    job: tokens (of the prompt), decode_tokens, specs, algorithms, repeats, and device.
    """
    cuda = job["device"] == "cuda"
    length = job["tokens"] + job["decode_tokens"]
    steps = (MegatronSteps if job["engine"] == "megatron" else TransformersSteps)(engine, length)
    vocab = engine.vocab
    ids = torch.randint(vocab, (1, length), generator=torch.Generator().manual_seed(0)).to(engine.device)
    configs = {EXACT: None}
    for spec in job["specs"]:
        configs |= {(spec, name): lowbit.CommConfig(spec, **ALGORITHMS[name]) for name in job["algorithms"]}
    order = [*configs.items(), *([(("clocked", "exact"), None)] if cuda else [])]
    found = {key: [] for key, _ in order}
    for repeat in range(1 + job["repeats"]):
        for key, config in order:
            clocked = (
                key[0] == "clocked"
            )  # there, to wait for the device at each sum costs time: not in what we compare
            with engine.enable(config) if config else nullcontext():
                request = one_request(steps, ids, job["tokens"], torch.cuda.synchronize if clocked else _no_wait)
            if repeat:  # the first makes communicators, measures links and compiles kernels
                found[key].append(request)
    exact = _exact(found[order[-1][0] if cuda else EXACT], engine.device)
    exact |= _times(found[EXACT], engine.device)
    rows = []
    for (spec, name), requests in found.items():
        if name != "exact":
            row = {"spec": spec, "algorithm": name} | _times(requests, engine.device)
            rows.append(row | {key: requests[-1][key] for key in ("bytes_sent", "paths", "decode_paths")})
    return {"exact": exact, "rows": rows}


def one_request(steps: Any, ids: torch.Tensor, prompt: int, wait: Callable[[], object]) -> dict:
    """A prompt of so many of the ids, then the others one by one: seconds, bytes this rank sent, paths taken."""
    steps.restart()
    lowbit.reset_stats()
    dist.barrier()
    with AllReduces(wait) as sums:
        start = time.perf_counter()
        logits = steps.step(ids[:, :prompt])
        logits.argmax().item()  # as who samples does: waits for the device too
        prefill = time.perf_counter() - start
    sites, decode = lowbit.stats(), []
    lowbit.reset_stats()
    for position in range(prompt, ids.shape[1]):  # fixed tokens: every way does the same work
        start = time.perf_counter()
        steps.step(ids[:, position : position + 1]).argmax().item()
        decode.append(time.perf_counter() - start)
    return {
        "prefill": prefill, "decode": decode, "all_reduces": sums.seconds, "logits": logits,
        "bytes_sent": sums.sent + sum(site["bytes_sent"] for site in sites.values()),
        "paths": _paths(sites.values()), "decode_paths": _paths(lowbit.stats().values()),
    }  # fmt: skip


def _paths(sites: Iterable[dict]) -> dict[str, int]:
    return dict(sum((Counter(site["paths"]) for site in sites), Counter()))


def _times(requests: list[dict], device: torch.device) -> dict:
    """Medians of the slowest rank's."""
    prefill = _over_ranks([[request["prefill"] for request in requests]], "MAX", device)[0]
    decode = [*chain(*_over_ranks([request["decode"] for request in requests], "MAX", device))]
    return {"ttft_ms": 1e3 * statistics.median(prefill), "decode_ms": 1e3 * statistics.median(decode)}


def _exact(requests: list[dict], device: torch.device) -> dict:
    """The share of all-reduces in a prefill. Each takes as long as on the rank that waited least: that another one
    computes longer is not communication."""
    prefill = _over_ranks([[request["prefill"] for request in requests]], "MAX", device)[0]
    sums = _over_ranks([request["all_reduces"] for request in requests], "MIN", device)
    if not sums[0]:
        raise lowbit.ModelError("no all-reduce was seen: this framework does not call torch.distributed.all_reduce")
    inside = [sum(each) for each in sums]
    return {
        "share": statistics.median(part / whole for part, whole in zip(inside, prefill, strict=True)),
        "all_reduces": len(sums[0]),
        "all_reduces_ms": 1e3 * statistics.median(inside),
        "bytes_exact": requests[-1]["bytes_sent"],
    }


def _over_ranks(rows: list[list[float]], operation: str, device: torch.device) -> list[list[float]]:
    values = torch.tensor(rows, dtype=torch.float64, device=device)
    dist.all_reduce(values, op=getattr(dist.ReduceOp, operation))
    return values.tolist()


def _no_wait() -> None:
    """A CPU has done what a call asked for when it returns."""
