"""Where the vocabulary is split: the embedding's reduce and the gather of the logits. Exact unless asked for by name.

Of the partial embeddings of a token one is not zero, so their sum is exact and rounding can only lose; the logits
decide the next token. `CommConfig(sites=("layers.*", "embedding", "logits"))` asks for both, a bare "*" for neither.

The embedding reduces by global names of `layers`, [batch, sequence, hidden], or reduce-scatters [sequence, batch,
hidden]; both are answered here while its forward runs. Logits, [sequence, batch, vocabulary / N], are gathered by the
output layer, whose base forward is told not to, or by inference code of its own (T5's; all of it in 0.12), which does
not say for which model and so follows the process-wide configuration only.
"""

from __future__ import annotations

from functools import wraps

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding

from megatron_lowbit.communicator import communicator
from megatron_lowbit.config import CommConfig
from megatron_lowbit.patches._handle import asks_for

from . import collectives, hooks
from .compat import group_of
from .hooks import config_of
from .reroute import Message, Reroute
from .sites import EMBEDDING, LOGITS, OUTPUT_LAYER
from .straight_through import straight_through

_reducing = Reroute()


def takes(module: torch.nn.Module) -> bool:
    return isinstance(module, VocabParallelEmbedding | ColumnParallelLinear)


def messages(module: torch.nn.Module, site: str, config: CommConfig) -> list[str]:
    sent = {EMBEDDING: EMBEDDING, OUTPUT_LAYER: LOGITS}.get(site)
    return [sent] if sent and asks_for(config, sent) else []


def wrappers() -> list[tuple]:
    return [
        (VocabParallelEmbedding, "forward", _embed),
        (layers, "reduce_from_tensor_model_parallel_region", _reduce),
        (layers, "reduce_scatter_to_sequence_parallel_region", _reduce_scatter),
        (ColumnParallelLinear, "forward", _project),
        (tensor_parallel, "gather_from_tensor_model_parallel_region", _gather_outside),
    ]


def _embed(base):
    @wraps(base)
    def forward(self, input_):
        config = config_of(self)
        if config is None or not asks_for(config, EMBEDDING) or (group := group_of(self)).size() == 1:
            return base(self, input_)
        hooks.count(self, EMBEDDING)
        return _reducing.run(Message(group, config, EMBEDDING), base, self, input_)

    return forward


def _reduce(base):
    @wraps(base)
    def reduce(input_, *args, **kwargs):
        if (message := _reducing.take()) is None:
            return base(input_, *args, **kwargs)
        return collectives.all_reduce(input_, *message)

    return reduce


def _reduce_scatter(base):
    @wraps(base)
    def reduce_scatter(input_, *args, **kwargs):
        if (message := _reducing.take()) is None:
            return base(input_, *args, **kwargs)
        return collectives.reduce_scatter(input_, *message)

    return reduce_scatter


def _project(base):
    @wraps(base)
    def forward(self, input_, weight=None, runtime_gather_output=None):
        gathers = self.gather_output if runtime_gather_output is None else runtime_gather_output
        if not gathers or not (config := config_of(self)) or not asks_for(config, LOGITS) or not _is_output(self):
            return base(self, input_, weight, runtime_gather_output)
        hooks.count(self, LOGITS)
        partial, bias = base(self, input_, weight, False)
        return _gather(partial, group_of(self), config), bias

    return forward


def _is_output(module: torch.nn.Module) -> bool:
    return module.__dict__.get("lowbit_site", OUTPUT_LAYER) == OUTPUT_LAYER


def _gather_outside(base):
    @wraps(base)
    def gather(input_, *args, **kwargs):
        config = hooks.process_wide and hooks.process_wide.config
        if config is None or not asks_for(config, LOGITS):
            return base(input_, *args, **kwargs)
        hooks.process_wide.count(LOGITS)
        return _gather(input_, parallel_state.get_tensor_model_parallel_group(), config)

    return gather


def _gather(partial: torch.Tensor, group: dist.ProcessGroup, config: CommConfig) -> torch.Tensor:
    """[..., vocabulary / N] of all ranks -> [..., vocabulary]; a rank's gradient is its own part's."""
    if group.size() == 1:
        return partial
    return straight_through(
        partial,
        lambda x: communicator(group, config).all_gather(x, -1, LOGITS),
        lambda grad: grad.chunk(group.size(), -1)[group.rank()].contiguous(),
    )
