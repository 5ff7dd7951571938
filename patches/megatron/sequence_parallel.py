"""Sequence parallelism: the all-gather of what enters a ColumnParallelLinear. The way back is in row_parallel.py.

A rank holds [sequence / N, batch, hidden] and the layer multiplies [sequence, batch, hidden]. The base forward gathers
by itself, through `layers.dist_all_gather_func`, or through `gather_from_sequence_parallel_region` if the weight is
frozen; both are answered here while it runs. All else stays the base's, so the backward is the exact layer's: it
gathers the exact input again for the weight's gradient, and reduce-scatters that of the input.

A sum that was compressed on its way into the split form is compressed once more when it is gathered, after the norm in
between: other numbers, another message.
"""

from __future__ import annotations

from functools import wraps

import torch
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from . import collectives
from .compat import group_of
from .hooks import config_of, site_of
from .reroute import Message, Reroute

GATHER, UNNAMED = ".gather", "column_parallel"
_gathering = Reroute()


def takes(module: torch.nn.Module) -> bool:
    return isinstance(module, ColumnParallelLinear) and module.sequence_parallel and not module.explicit_expert_comm


def messages(module: torch.nn.Module, site: str, config) -> list[str]:
    return [site + GATHER]


def wrappers() -> list[tuple]:
    return [
        (ColumnParallelLinear, "forward", _forward),
        (layers, "dist_all_gather_func", _gather_into),
        (layers, "gather_from_sequence_parallel_region", _gather_frozen),
    ]


def _forward(base):
    @wraps(base)
    def forward(self, input_, *args, **kwargs):
        if not self.sequence_parallel or self.explicit_expert_comm or (config := config_of(self)) is None:
            return base(self, input_, *args, **kwargs)
        message = Message(group_of(self), config, site_of(self, UNNAMED, GATHER))
        return _gathering.run(message, base, self, input_, *args, **kwargs)

    return forward


def _gather_into(base):
    @wraps(base)
    def gather(buffer, input_, *args, **kwargs):
        if (message := _gathering.take()) is None:
            return base(buffer, input_, *args, **kwargs)
        buffer.data = collectives.all_gather(input_, *message)  # it is read once, by the product: no copy

    return gather


def _gather_frozen(base):
    @wraps(base)
    def gather(input_, *args, **kwargs):
        if (message := _gathering.take()) is None:
            return base(input_, *args, **kwargs)
        return collectives.all_gather(input_, *message)

    return gather
