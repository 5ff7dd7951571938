"""Sequence parallelism: the all-gather of what enters a ColumnParallelLinear. The way back is in row_parallel.py.

A rank holds [sequence / N, batch, hidden] and the layer multiplies [sequence, batch, hidden]. The base forward gathers
by itself, through `layers.dist_all_gather_func`, or through `gather_from_sequence_parallel_region` if the weight is
frozen; both are answered here while it runs. All else stays the base's, so the backward is the exact layer's: it
gathers the exact input again for the weight's gradient, and reduce-scatters that of the input.

A sum that was compressed on its way into the split form is compressed once more when it is gathered, after the norm in
between: other numbers, another message.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import reduce_scatter_to_sequence_parallel_region

from megatron_lowbit.communicator import communicator

from .compat import group_of
from .hooks import config_of, site_of
from .reroute import Message, Reroute
from .straight_through import straight_through

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
    def forward(self, input_, *args, **kwargs):
        if not self.sequence_parallel or self.explicit_expert_comm or (config := config_of(self)) is None:
            return base(self, input_, *args, **kwargs)
        group = group_of(self)
        message = Message(communicator(group, config), group, site_of(self, UNNAMED, GATHER))
        return _gathering.run(message, base, self, input_, *args, **kwargs)

    return forward


def _gather_into(base):
    def gather(buffer, input_, *args, **kwargs):
        if (message := _gathering.take()) is None:
            return base(buffer, input_, *args, **kwargs)
        buffer.data = _gather(message, input_)  # it is read once, by the product: no copy

    return gather


def _gather_frozen(base):
    def gather(input_, *args, **kwargs):
        if (message := _gathering.take()) is None:
            return base(input_, *args, **kwargs)
        return _gather(message, input_)

    return gather


def _gather(message: Message, input_: torch.Tensor) -> torch.Tensor:
    """[sequence / N, ...] of all ranks -> [sequence, ...]."""
    return straight_through(
        input_,
        lambda x: message.comm.all_gather(x, 0, message.site),
        lambda grad: reduce_scatter_to_sequence_parallel_region(grad, group=message.group),
    )
