"""DeepSpeed's LinearAllreduce and what derives from it, but for the output head.

A hooked layer becomes an instance of a subclass of its own class. That calls the original forward with `mp_group` and
`bias` hidden, which then returns the partial product that it would have reduced, so nothing of DeepSpeed is copied; the
bias is added behind the sum.

Hazard: both are hidden for the duration of one forward, so two threads must not run one layer at the same time.
"""

from __future__ import annotations

import functools

import torch
from deepspeed.module_inject.layers import LinearAllreduce, LmHeadLinearAllreduce

from megatron_lowbit.communicator import communicator


def takes(module: torch.nn.Module) -> bool:
    return isinstance(module, LinearAllreduce) and not isinstance(module, LmHeadLinearAllreduce)


@functools.cache
def lowbit_class(kind: type[LinearAllreduce]) -> type[LinearAllreduce]:
    """`kind` with compressed communication, as module.lowbit_config says, at module.lowbit_site."""
    return type(f"LowBit{kind.__name__}", (_LowBit, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


class _LowBit:
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        group, bias = self.mp_group, self.bias
        self.mp_group, self._parameters["bias"] = None, None
        try:
            partial = super().forward(input)
        finally:
            self.mp_group, self._parameters["bias"] = group, bias
        out = communicator(group, self.lowbit_config).all_reduce(partial, self.lowbit_site)
        return out if bias is None else out + bias
