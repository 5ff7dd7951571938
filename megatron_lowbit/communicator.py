"""A process group, a CommConfig and the buffers between them: what the patches and the functional interface call.

Of the spec's two legs, reduce-scatter and all-to-all use the first, all-gather the second, all-reduce both. Algorithms
and `min_bytes` are all-reduce's; the other collectives have one way, and compress messages of any size.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch._compile import _disable_dynamo as untraced  # torch.compiler.disable, which imports Dynamo at once

from . import handshake, links, policy, telemetry
from .codecs import Codec, backend, plain
from .codecs.base import check_tensor, rows_of
from .codecs.fused import add_rmsnorm, check_norm
from .collectives import (
    all_gather,
    all_reduce,
    all_to_all,
    exchange,
    hierarchical,
    layout,
    pipeline,
    reduce_scatter,
    results,
)
from .config import CommConfig
from .errors import ConfigError, RankError
from .tuned_table import Key, TunedTable

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
KEPT = 4096  # decisions: sizes of messages are many where batches vary


class Communicator:
    """Low-bit collectives within one process group.

    Making one is a collective call: all ranks compare their settings. Raises RankError naming both sides if two ranks
    disagree, ConfigError if torch.distributed is not initialised. For one thread and one CUDA stream at a time: the
    buffers are shared by all its calls. So torch.compile must not trace these either, and breaks its graph at them.
    """

    def __init__(self, group: dist.ProcessGroup | None, config: CommConfig) -> None:
        group = _resolve(group)
        self._group = weakref.ref(group)  # a strong one would keep destroyed groups and their buffers for ever
        self.config = config
        self.world = dist.get_world_size(group)
        self._rank, self._bound = dist.get_rank(group), {}
        self._tuned_for: set[tuple[str, str]] = set()  # (spec, dtype) that were looked for
        self._decided: dict[tuple[str, int, torch.dtype, str], policy.Decision] = {}
        self._workspace = exchange.Workspace()
        self.facts = handshake.meet(group, config)
        for statistics in (config.calibrated, config.planned):
            if statistics is not None and self.world > 1:
                statistics.check(tp=self.world)

    @property
    def key(self) -> Key:
        """What a tuned table of this group is made for, as this rank sees it."""
        return handshake.key(self.group, self.facts)

    def _facts_for(self, x: torch.Tensor) -> policy.Facts:
        """Gloo carries tensors of GPUs too, and a group of NCCL may have gloo: of the others nothing is known."""
        if x.device.type == self.facts.device:
            return self.facts
        return replace(self.facts, device=x.device.type, link=links.UNKNOWN, tuned=None, direct=False)

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group. Raises RankError after it was destroyed."""
        if (group := self._group()) is None:
            raise RankError("this communicator's process group was destroyed: make a new group and a new communicator")
        return group

    @untraced
    def all_reduce(self, x: torch.Tensor, site: str = "all_reduce") -> torch.Tensor:
        """Sum of x [..., features] (bf16, fp16 or fp32) over the group -> a new tensor, the same on every rank.

        All ranks pass the same shape and dtype. Raises ConfigError for a tensor that cannot be compressed, RankError
        when the exchange fails because a rank died or stalled beyond the group's timeout.
        """
        _check(x)
        self._compare("all_reduce", x, site, shape=list(x.shape))
        summands = self._all_reduce(x, site)
        return summands if isinstance(summands, torch.Tensor) else summands.result(x)

    @untraced
    def all_reduce_add_rmsnorm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float = 1e-6,
        offset: float = 0.0,
        site: str = "all_reduce",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a transformer block does next, with no pass over memory in between -> (normed, new residual).

        new residual = all_reduce(x) + residual; normed = RMSNorm(new residual) * (weight + offset). weight: one bf16,
        fp16 or fp32 number per feature; offset: 1 where weights are stored around zero. codecs/fused.py has the
        arithmetic. Raises as `all_reduce` does, and ConfigError for a residual unlike x or a weight of another length.
        """
        _check(x)
        for tensor in (residual, weight):
            _check(tensor)
        check_norm(x, residual, weight)
        self._compare("all_reduce_add_rmsnorm", x, site, shape=list(x.shape))
        summands, residual = self._all_reduce(x, site), residual.detach().contiguous()
        if not isinstance(summands, torch.Tensor):
            return summands.add_rmsnorm(residual, weight.detach(), eps, offset)
        normed, shape = results.empty_like(summands), rows_of(x.shape)
        if x.numel():
            tensors = residual.view(shape), weight.detach(), eps, offset, normed.view(shape)
            add_rmsnorm(summands.view(shape), *tensors)
        return normed, summands

    @untraced
    def all_reduce_by(self, decision: policy.Decision, x: torch.Tensor, site: str = "all_reduce") -> torch.Tensor:
        """`all_reduce` in a way that the caller decided on, the same one on every rank: for timing ways."""
        _check(x)
        summands = self._all_reduce(x, site, decision)
        return summands if isinstance(summands, torch.Tensor) else summands.result(x)

    def _decide(self, x: torch.Tensor, site: str) -> policy.Decision:
        """Kept, as nothing that it depends on changes: small messages wait for little else."""
        which = site, x.nbytes, x.dtype, x.device.type
        if (decision := self._decided.get(which)) is None:
            if len(self._decided) >= KEPT:
                self._decided.clear()
            decision = self._decided[which] = self._decide_anew(x, site)
        return decision

    def _decide_anew(self, x: torch.Tensor, site: str) -> policy.Decision:
        facts, dtype = self._facts_for(x), DTYPES[x.dtype]
        if facts.tuned is not None and self._rank == 0 and self.config.selects(site):
            self._say_if_untuned(facts.tuned, site, dtype)
        return policy.choose(self.config, site, x.nbytes, facts, dtype)

    def _say_if_untuned(self, table: TunedTable, site: str, dtype: str) -> None:
        """Once: a warning about a spec that the table lacks."""
        if self.config.keeps_exact(site) or (which := (str(self.config.legs_at(site)), dtype)) in self._tuned_for:
            return
        self._tuned_for.add(which)
        if which not in table.rows or self.config.outer_spec is not None:
            outer = f" with outer spec {self.config.outer_spec}" if self.config.outer_spec else ""
            warnings.warn(
                f"{table.name} has nothing about {which[0]} in {dtype}{outer}, so sizes decide as without a table: run "
                f"'megatron-lowbit tune --comm {which[0]} --dtype {dtype}'",
                stacklevel=7,
            )

    def _all_reduce(
        self, x: torch.Tensor, site: str, decision: policy.Decision | None = None
    ) -> all_reduce.Summands | torch.Tensor:
        """The exchange of an all-reduce, counted: what is left to decode, or the sum if nothing was encoded."""
        if decision is None:
            decision = self._decide(x, site)
        if decision.algorithm != "exact":
            result, sent = self._compressed(x.contiguous(), decision, site)
        elif decision.way:
            result, sent = self._flat(x.contiguous(), decision.way, decision.chunks, [plain(x.dtype)] * 2)
        else:
            result = all_reduce.exact(x, self.group) if x.numel() and self.world > 1 else _copy(x)
            sent = telemetry.ring_bytes(x.numel() * x.itemsize, self.world)
        self._count(x, site, decision, sent, telemetry.ring_bytes(2 * x.numel(), self.world))
        return result

    def _compressed(
        self, x: torch.Tensor, decision: policy.Decision, site: str
    ) -> tuple[all_reduce.Summands | torch.Tensor, int]:
        """(what is left to decode, or the sum where decoding overlapped with the exchange; bytes sent)"""
        if decision.algorithm != "hierarchical":
            legs = ("scatter",) if decision.algorithm == "one-shot" else ("scatter", "gather")
            return self._flat(x, decision.algorithm, decision.chunks, [self._codec(leg, site) for leg in legs])
        names = ("scatter", "outer scatter", "outer gather")
        legs, nodes = hierarchical.Legs(*(self._codec(leg, site) for leg in names)), self.facts.nodes
        if decision.chunks:
            return hierarchical.in_chunks(x, legs, nodes, decision.chunks, self.group, self._workspace)
        summands = hierarchical.in_one_go(x, legs, nodes, self.group, self._workspace)
        return summands, summands.sent

    def _flat(
        self, x: torch.Tensor, algorithm: str, chunks: int, codecs: Sequence[Codec]
    ) -> tuple[all_reduce.Summands | torch.Tensor, int]:
        """One-shot or two-step, as `_compressed`."""
        once = algorithm == "one-shot"
        codecs = codecs[:1] if once else codecs
        if chunks:
            way = pipeline.one_shot if once else pipeline.two_step
            return way(x, *codecs, chunks, self.group, self._workspace)
        way = all_reduce.one_shot if once else all_reduce.two_step
        summands = way(x, *codecs, self.group, self._workspace)
        return summands, summands.sent

    @untraced
    def reduce_scatter(self, x: torch.Tensor, dim: int = 0, site: str = "reduce_scatter") -> torch.Tensor:
        """Sum of x over the group, of which rank r keeps the r-th of N equal chunks along `dim` -> a new tensor.

        All ranks pass the same shape, dtype and dim. Raises as `all_reduce` does, and ConfigError for a dimension that
        the ranks cannot share equally.
        """
        _check(x)
        chunks = layout.chunks(x, dim, self.world)
        self._compare("reduce_scatter", x, site, shape=list(x.shape), dim=layout.dimension(x, dim))
        decision, codec = self._choose("reduce-scatter", x, site, leg="scatter", empty=not x.numel())
        out, sent = reduce_scatter.reduce_scatter(chunks, codec, self.group, self._workspace)
        self._count(x, site, decision, sent, 2 * (x.numel() - out.numel()))
        return out

    @untraced
    def all_gather(self, x: torch.Tensor, dim: int = 0, site: str = "all_gather") -> torch.Tensor:
        """All ranks' x along `dim`, in rank order -> a new tensor, the same on every rank.

        All ranks pass the same shape, dtype and dim. Raises as `all_reduce` does, and ConfigError for a wrong dim.
        """
        _check(x)
        dim = layout.dimension(x, dim)
        self._compare("all_gather", x, site, shape=list(x.shape), dim=dim)
        decision, codec = self._choose("all-gather", x, site, leg="gather", empty=not x.numel())
        out, sent = all_gather.all_gather(x, dim, codec, self.group, self._workspace)
        self._count(x, site, decision, sent, 2 * (out.numel() - x.numel()))
        return out

    @untraced
    def all_to_all(
        self,
        x: torch.Tensor,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
        site: str = "all_to_all",
    ) -> torch.Tensor:
        """Along dim 0, input_splits[r] rows of x go to rank r and output_splits[r] rows come from it -> a new tensor.

        Without input_splits x is cut into equal parts; without both, so is what comes. All ranks pass the same dtype,
        and the same shape but for dim 0. Raises as `all_reduce` does, and ConfigError for splits that cannot be right.
        """
        _check(x)
        if x.dim() == 1 and self.world > 1 and not self.config.keeps_exact(site):
            self._codec("scatter", site).wire_nbytes((1,))  # a piece is a row of any length: all ranks refuse, or none
        me = dist.get_rank(self.group)
        sends, receives = layout.rows_exchanged(x, input_splits, output_splits, self.world, me)
        facts = {"shape of a row": list(x.shape[1:])}
        facts |= {f"rows from rank {me} to rank {rank}": sends[rank] for rank in range(self.world)}
        facts |= {f"rows from rank {rank} to rank {me}": receives[rank] for rank in range(self.world)}
        self._compare("all_to_all", x, site, **facts)
        # Whether all rows are empty is known to all ranks; that this rank has none says nothing about the others.
        decision, codec = self._choose("all-to-all", x, site, leg="scatter", empty=0 in x.shape[1:])
        out, sent = all_to_all.all_to_all(x, sends, receives, codec, self.group, self._workspace)
        self._count(x, site, decision, sent, 2 * (x.numel() - x[: sends[me]].numel()))
        return out

    def _codec(self, leg: str, site: str) -> Codec:
        """What this rank uses at `site` on one of the legs that `CommConfig.codec` names."""
        key = leg, site if self.config.per_site else None
        if key not in self._bound:
            self._bound[key] = self.config.codec(leg, site, self._rank)
        return self._bound[key]

    def _choose(self, path: str, x: torch.Tensor, site: str, leg: str, empty: bool) -> tuple[policy.Decision, Codec]:
        """For a collective that has one path: whether to take it or to go exact, and the codec for that."""
        decision = policy.bypass(self.config, site, self.world, empty) or policy.Decision(path)
        return decision, plain(x.dtype) if decision.algorithm == "exact" else self._codec(leg, site)

    def _compare(self, collective: str, x: torch.Tensor, site: str, **facts: object) -> None:
        """With LOWBIT_CHECK=1, check that all ranks make this call alike. Raises RankError."""
        if _every_call_is_checked() and self.world > 1:
            facts |= {"collective": collective, "spec": self.config.spec, "site": site, "dtype": str(x.dtype)}
            facts |= {"outer_spec": self.config.outer_spec}
            exchange.compare(facts, self.group)

    def _count(self, x: torch.Tensor, site: str, decision: policy.Decision, sent: int, plain_bytes: int) -> None:
        telemetry.record(
            site,
            values=x.numel(),
            plain=plain_bytes,
            sent=sent,
            path=decision.algorithm,
            backend="" if decision.algorithm == "exact" else backend.of(x.device),  # asking takes longer than counting
            fallback=decision.fallback,
        )


def _copy(x: torch.Tensor) -> torch.Tensor:
    return results.empty_like(x).copy_(x)


def _check(x: torch.Tensor) -> None:
    check_tensor(x)
    if x.requires_grad and torch.is_grad_enabled():
        raise ConfigError("x requires grad, and compressed collectives have no gradient: call under torch.no_grad()")


def _every_call_is_checked() -> bool:
    value = os.environ.get("LOWBIT_CHECK", "")
    if value not in ("", "0", "1"):
        raise ConfigError(f"LOWBIT_CHECK={value!r} is unknown: set it to 1 or 0, or leave it unset")
    return value == "1"


_communicators: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[CommConfig, Communicator]]
_communicators = weakref.WeakKeyDictionary()


@untraced
def communicator(group: dist.ProcessGroup | None, config: CommConfig) -> Communicator:
    """The group's communicator for `config`, made by the first call (a collective call then)."""
    group = _resolve(group)
    known = _communicators.setdefault(group, {})
    if config not in known:
        known[config] = Communicator(group, config)
    return known[config]


def _resolve(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigError(
            "torch.distributed is not initialised: call torch.distributed.init_process_group first, "
            "or start the program with torchrun"
        )
    if group is None:
        return dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise ConfigError(f"group is {group!r}: pass a process group that this rank belongs to, or None for all ranks")
    return group
