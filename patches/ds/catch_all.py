"""Sums of layers that have no class here: `deepspeed.comm.inference_all_reduce`, replaced while it is asked for.

That is what a module of a user's own calls, and Yuan's convolution, which names no group and so means all ranks. It is
the process's: the sums of every model that is not enabled by itself pass here, all at the site "catch_all". Maxima,
scalars and sums that are not of bf16, fp16 or fp32 go on to DeepSpeed. Output heads and vocabulary-parallel embeddings,
of whatever model, call the same function; while this holds the methods of their classes find the original.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import deepspeed.comm
import torch
import torch.distributed as dist
from deepspeed.module_inject import layers
from torch._compile import _disable_dynamo as untraced

from megatron_lowbit.codecs.base import DTYPES
from megatron_lowbit.communicator import communicator
from megatron_lowbit.config import CommConfig
from megatron_lowbit.errors import ConfigError
from megatron_lowbit.patches._replacements import Replacements

from .answered import answered
from .row_parallel import HEADS

SITE = "catch_all"
_NAME = "inference_all_reduce"
_SUM = dist.ReduceOp.SUM, deepspeed.comm.ReduceOp.SUM  # DeepSpeed has an enumeration of its own
_EXACT = HEADS + tuple(getattr(layers, name) for name in ("VocabParallelEmbedding",) if hasattr(layers, name))


def install(config: CommConfig) -> Callable[[], None]:
    """Replace the function -> what puts the original back. Raises ConfigError if it is replaced already."""
    original = getattr(deepspeed.comm, _NAME)
    if hasattr(original, "lowbit_original"):
        raise ConfigError("the catch-all is enabled already: call the earlier handle's disable() first")

    @functools.wraps(original)
    @untraced
    def inference_all_reduce(
        tensor: torch.Tensor, op: object = dist.ReduceOp.SUM, group: dist.ProcessGroup | None = None, *args, **kwargs
    ) -> object:
        if op not in _SUM or tensor.dtype not in DTYPES or not tensor.dim():
            return original(tensor, op, group, *args, **kwargs)
        return tensor.copy_(communicator(group, config).all_reduce(tensor, SITE))

    inference_all_reduce.lowbit_original = original
    held = Replacements()
    held.set(deepspeed.comm, _NAME, inference_all_reduce)
    for kind in _EXACT:
        held.set(kind, "forward", _with(original, kind.forward))
    return held.undo


def _with(original: Callable, forward: Callable) -> Callable:
    """A layer's forward, in which the function is what it was."""

    @functools.wraps(forward)
    def exact(self, *args, **kwargs) -> torch.Tensor:
        with answered(_NAME, original):
            return forward(self, *args, **kwargs)

    return exact
