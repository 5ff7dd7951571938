"""The local RowParallelLinear: its all-reduce, or with sequence parallelism its reduce-scatter.

With `explicit_expert_comm` set, the base forward returns the partial product it would have reduced (Megatron's own
shared experts use it so). The base forward is called, never copied, so it stays right from release to release. Experts,
which have that flag already, leave their communication to the dispatcher.

Hazard: the flag is set for the duration of one forward, so two threads must not run one layer at the same time.
"""

from __future__ import annotations

from functools import wraps

import torch
from megatron.core.tensor_parallel.layers import RowParallelLinear

from . import collectives
from .compat import group_of
from .hooks import config_of, site_of


def takes(module: torch.nn.Module) -> bool:
    return isinstance(module, RowParallelLinear) and not module.explicit_expert_comm


def wrappers() -> list[tuple]:
    return [(RowParallelLinear, "forward", _forward)]


def _forward(base):
    @wraps(base)
    def forward(self, input_):
        config = config_of(self)
        if config is None or self.explicit_expert_comm or group_of(self).size() == 1:
            return base(self, input_)
        site, flags, skip_bias_add = site_of(self), self.__dict__, self.skip_bias_add  # setattr takes 2 us each time
        flags["explicit_expert_comm"] = flags["skip_bias_add"] = True
        try:
            partial, _ = base(self, input_)
        finally:
            flags["explicit_expert_comm"], flags["skip_bias_add"] = False, skip_bias_add
        out = collectives.reduce(self, partial, config, site)
        if self.skip_bias_add:
            return out, self.bias
        return (out if self.bias is None else out + self.bias), None

    return forward
