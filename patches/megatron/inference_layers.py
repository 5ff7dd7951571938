"""The inference_optimized layers: their NVLS reduce-scatter and all-gathers, compressed where sites select them.

They derive from Transformer Engine's (transformer_engine.py), which name their sites, but multiply by themselves: a row
layer into symmetric memory, which NVLS then reduces, a column layer what NVLS has gathered there. Where NVLS cannot be
used they send the same through TE's functions. A row layer that believes to be the only rank multiplies and sends
nothing, so that is what it is told for one forward; a column layer gathers in a method of its own. What is compressed
needs no symmetric memory. Sites that are not selected go through this package's exact collectives, not through NVLS.

Refused: inference_fuse_tp_communication, which adds, normalises and gathers in the kernel that reduces.
"""

from __future__ import annotations

import torch

from megatron_lowbit.config import CommConfig
from megatron_lowbit.errors import ModelError

from . import collectives
from . import transformer_engine as te
from .compat import group_of
from .hooks import config_of, site_of

try:
    from megatron.core.tensor_parallel import inference_layers
except ImportError:  # before 0.16
    inference_layers = None
ROW, NORM_COLUMN, COLUMN = (
    kind if te.ROW is not None and isinstance(kind := getattr(inference_layers, name, None), type) else None
    for name in (
        "InferenceRowParallelLinear",
        "InferenceLayerNormColumnParallelLinear",
        "InferenceColumnParallelLinear",
    )
)
_KINDS = tuple(kind for kind in (ROW, NORM_COLUMN, COLUMN) if kind is not None)


def takes(module: torch.nn.Module) -> bool:
    return isinstance(module, _KINDS)


def messages(module: torch.nn.Module, site: str, config: CommConfig) -> list[str]:
    if config.selects(site) or config.selects(site + te.GATHER):
        _check(module, site)
    return []  # named by transformer_engine.messages


def wrappers() -> list[tuple]:
    found = [(ROW, "forward", _row)] if ROW is not None else []
    return found + [(kind, "_all_gather", _all_gather) for kind in (NORM_COLUMN, COLUMN) if kind is not None]


def _check(module: torch.nn.Module, site: str) -> None:
    if getattr(module.config, "inference_fuse_tp_communication", False):
        raise ModelError(
            f"{site} is a {type(module).__name__} whose reduce-scatter is one kernel with the norm and the all-gather "
            "behind it: leave out --inference-fuse-tp-communication (inference_fuse_tp_communication)"
        )


def _row(base):
    def forward(self, x, *args, **kwargs):
        config = config_of(self)
        if config is None or self.tp_size == 1:
            return base(self, x, *args, **kwargs)
        if config.selects(site := site_of(self)):
            te.check(self, site)
            _check(self, site)
        with te.saying(self, te.WITHOUT_BIAS):
            partial, bias = base(self, x, *args, **kwargs)  # Megatron asserts that these layers have no bias
        return collectives.reduce(self, partial, config, site), bias

    return forward


def _all_gather(base):
    def all_gather(self, x, *args, **kwargs):
        config = config_of(self)
        if config is None or self.tp_size == 1:
            return base(self, x, *args, **kwargs)
        site = site_of(self, te.UNNAMED_COLUMN, te.GATHER)
        if config.selects(site):
            _check(self, site)
        return collectives.all_gather(x, group_of(self), config, site)

    return all_gather
