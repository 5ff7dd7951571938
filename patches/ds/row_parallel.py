"""DeepSpeed's LinearAllreduce, what derives from it, and SubParamLinearAllreduce; the output head is lm_head.py's.

A hooked layer becomes an instance of a subclass of its own class. That calls the original forward with `mp_group` and
`bias` hidden, which then returns the partial product that it would have reduced, so nothing of DeepSpeed is copied; the
bias is added behind the sum. How a class cut its weight (Yuan's shared heads, GPT-2's transposed Conv1D, uneven shards)
is of no matter here.

Hazard: both are hidden for the duration of one forward, so two threads must not run one layer at the same time.
"""

from __future__ import annotations

import functools

import torch
from deepspeed.module_inject import layers
from torch._compile import _disable_dynamo as untraced

from megatron_lowbit.communicator import communicator
from megatron_lowbit.config import CommConfig
from megatron_lowbit.errors import ModelError

from .hidden import hidden

REDUCING = tuple(
    getattr(layers, name) for name in ("LinearAllreduce", "SubParamLinearAllreduce") if hasattr(layers, name)
)
# The second exists in training: a head whose input is not split.
HEADS = tuple(
    getattr(layers, name)
    for name in ("LmHeadLinearAllreduce", "LinearAllreduceWithReplicatedInput")
    if hasattr(layers, name)
)


def takes(module: torch.nn.Module) -> bool:
    return isinstance(module, REDUCING) and not isinstance(module, HEADS)


def group_of(module: torch.nn.Module) -> object:
    return module.mp_group


def messages(module: torch.nn.Module, site: str, config: CommConfig) -> list[str]:
    return [site]


@functools.cache
def lowbit_class(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """`kind` with compressed communication, as module.lowbit_config says, at module.lowbit_sites[0]."""
    return type(f"LowBit{kind.__name__}", (_LowBit, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


class _LowBit:
    @untraced  # a compiler that traced this would keep the hidden group's None
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if getattr(self, "defer_collectives_to_compiler", False):
            raise ModelError(
                f"{self.lowbit_sites[0]} leaves its sum to DeepCompile's 'autotp' pass, where it cannot be compressed: "
                "disable() this patch, or take 'autotp' out of the passes"
            )
        group, bias = self.mp_group, self.bias
        with hidden(self, "mp_group", "bias"):
            partial = super().forward(input)
        out = communicator(group, self.lowbit_config).all_reduce(partial, self.lowbit_sites[0])
        return out if bias is None else out + bias
