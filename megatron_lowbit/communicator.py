"""A process group, a CommConfig and the buffers between them: what the patches and the functional interface call."""

from __future__ import annotations

import os
import weakref

import torch
import torch.distributed as dist

from . import policy, telemetry
from .codecs import backend, make
from .codecs.base import check_tensor
from .collectives import all_reduce as _all_reduce
from .collectives import exchange
from .config import CommConfig
from .errors import ConfigError, RankError

PROTOCOL = 1  # of the wire formats and of how messages are cut into shards


class Communicator:
    """Low-bit collectives within one process group.

    Making one is a collective call: all ranks compare their settings. Raises RankError naming both sides if two ranks
    disagree, ConfigError if torch.distributed is not initialised. For one thread and one CUDA stream at a time: the
    buffers are shared by all its calls.
    """

    def __init__(self, group: dist.ProcessGroup | None, config: CommConfig) -> None:
        group = _resolve(group)
        self._group = weakref.ref(group)  # a strong one would keep destroyed groups and their buffers for ever
        self.config = config
        self.world = dist.get_world_size(group)
        self.scatter, self.gather = make(config.legs.scatter), make(config.legs.gather)
        self._workspace = exchange.Workspace()
        cuda = str(dist.get_backend(group)) == "nccl"  # a group of gloo and NCCL serves CPU tensors too
        from . import __version__

        facts = {
            "version": __version__,
            "protocol": PROTOCOL,
            "spec": config.spec,
            "algorithm": config.algorithm,
            "min_bytes": config.min_bytes,
            "sites": config.sites and list(config.sites),
            "backend": backend.of(torch.device("cuda" if cuda else "cpu")),
        }
        exchange.compare(facts, group, first=group not in _compared)
        _compared.add(group)

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group. Raises RankError after it was destroyed."""
        if (group := self._group()) is None:
            raise RankError("this communicator's process group was destroyed: make a new group and a new communicator")
        return group

    def all_reduce(self, x: torch.Tensor, site: str = "all_reduce") -> torch.Tensor:
        """Sum of x [..., features] (bf16, fp16 or fp32) over the group -> a new tensor, the same on every rank.

        All ranks pass the same shape and dtype. Raises ConfigError for a tensor that cannot be compressed, RankError
        when the exchange fails because a rank died or stalled beyond the group's timeout.
        """
        check_tensor(x)
        if x.requires_grad and torch.is_grad_enabled():
            raise ConfigError(
                "x requires grad, and a compressed all-reduce has no gradient: call it under torch.no_grad()"
            )
        if self._every_call_is_checked() and self.world > 1:
            facts = {"spec": self.config.spec, "site": site, "shape": list(x.shape), "dtype": str(x.dtype)}
            exchange.compare(facts, self.group)
        decision = policy.choose(self.config, site, x.numel() * x.itemsize, self.world, x.device.type)
        if decision.algorithm == "exact":
            out = _all_reduce.exact(x, self.group) if x.numel() and self.world > 1 else x.clone()
            sent = telemetry.ring_bytes(x.numel() * x.itemsize, self.world)
        elif decision.algorithm == "one-shot":
            out, sent = _all_reduce.one_shot(x.contiguous(), self.scatter, self.group, self._workspace)
        else:
            out, sent = _all_reduce.two_step(x.contiguous(), self.scatter, self.gather, self.group, self._workspace)
        telemetry.record(
            site,
            values=x.numel(),
            plain=telemetry.ring_bytes(2 * x.numel(), self.world),
            sent=sent,
            path=decision.algorithm,
            backend=backend.of(x.device),
            fallback=decision.fallback,
        )
        return out

    @staticmethod
    def _every_call_is_checked() -> bool:
        value = os.environ.get("LOWBIT_CHECK", "")
        if value not in ("", "0", "1"):
            raise ConfigError(f"LOWBIT_CHECK={value!r} is unknown: set it to 1 or 0, or leave it unset")
        return value == "1"


_communicators: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[CommConfig, Communicator]]
_communicators = weakref.WeakKeyDictionary()
_compared: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()


def communicator(group: dist.ProcessGroup | None, config: CommConfig) -> Communicator:
    """The group's communicator for `config`, made by the first call (a collective call then)."""
    group = _resolve(group)
    known = _communicators.setdefault(group, {})
    if config not in known:
        known[config] = Communicator(group, config)
    return known[config]


def all_reduce(
    x: torch.Tensor,
    spec: str,
    group: dist.ProcessGroup | None = None,
    algorithm: str = "auto",
    min_bytes: int | None = None,
) -> torch.Tensor:
    """Sum of x [..., features] (bf16, fp16 or fp32) over `group` (default: all ranks) -> a new tensor.

    spec, algorithm, min_bytes: as in CommConfig. The first call with other settings is where ranks compare them.
    Raises ConfigError (value and remedy in the message) and RankError, as Communicator does.
    """
    check_tensor(x)
    return communicator(group, CommConfig(spec=spec, algorithm=algorithm, min_bytes=min_bytes)).all_reduce(x)


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
