"""Compressed communication behind DeepSpeed's tensor-parallel layers.

    engine = deepspeed.init_inference(model, tensor_parallel={"tp_size": 2}, ...)
    handle = lowbit.patches.deepspeed.enable(engine, config)
    handle.disable()                                               # restores everything

Row-parallel layers change their class for as long as they are enabled (ds/row_parallel.py). DeepSpeed also reduces the
logits; they stay exact unless `sites` names them.
"""

from __future__ import annotations

import torch

from megatron_lowbit.config import CommConfig
from megatron_lowbit.errors import ConfigError, ModelError

try:
    from .ds import row_parallel
except ImportError as error:
    raise ModelError(f"DeepSpeed cannot be imported ({error}): pip install 'megatron-lowbit[deepspeed]'") from error
from ._handle import Handle
from .hf.sites import site_of

__all__ = ["Handle", "enable"]


def enable(engine_or_model: torch.nn.Module, config: CommConfig) -> Handle:
    """Send the row-parallel layers' partial sums as `config` says, in this model.

    engine_or_model: what `deepspeed.init_inference` returned, or its `module`. Raises ModelError when there is nothing
    to hook, ConfigError when it is enabled already.
    """
    if not isinstance(config, CommConfig):
        raise ConfigError(f"config is {config!r}: pass a CommConfig, such as CommConfig(spec='int4:g32')")
    model = getattr(engine_or_model, "module", engine_or_model)
    handle = Handle(config)
    for path, module in model.named_modules():
        if row_parallel.takes(module):
            if "lowbit_config" in module.__dict__:
                handle.disable()
                raise ConfigError(f"{path} is enabled already: call the earlier handle's disable() first")
            _hook(module, site_of(model, path), handle)
    if not handle.sites:
        raise ModelError(
            f"no row-parallel layer in {type(model).__name__}: pass what deepspeed.init_inference returned, "
            'with tensor_parallel={"tp_size": 2} or more'
        )
    return handle


def _hook(module: torch.nn.Module, site: str, handle: Handle) -> None:
    kind = type(module)
    module.__class__ = row_parallel.lowbit_class(kind)
    module.lowbit_config, module.lowbit_site = handle.config, site

    def undo() -> None:
        module.__class__ = kind
        del module.lowbit_config, module.lowbit_site

    handle.add(site, undo)
