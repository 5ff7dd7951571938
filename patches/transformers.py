"""Compressed communication in Transformers' own tensor parallelism.

plan = lowbit.patches.transformers.tp_plan(model_config, config)
model = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(tp_size=2, tp_plan=plan))

handle = lowbit.patches.transformers.enable(model, config)     # or of a model that was loaded with tensor parallelism
handle.disable()                                               # restores everything
"""

from __future__ import annotations

import torch

from megatron_lowbit.communicator import communicator
from megatron_lowbit.config import CommConfig
from megatron_lowbit.errors import ConfigError, ModelError

try:
    from transformers.distributed import tensor_parallel
except ImportError as error:
    raise ModelError(f"Transformers cannot be imported ({error}): pip install 'megatron-lowbit[hf]'") from error
from ._handle import Handle
from ._replacements import Replacements
from .hf.sites import site_of

__all__ = ["Handle", "enable"]

_wrapped, _handles = Replacements(), set()


def enable(model: torch.nn.Module, config: CommConfig) -> Handle:
    """Send the partial sums of a model that was loaded with tensor parallelism as `config` says."""
    if not isinstance(config, CommConfig):
        raise ConfigError(f"config is {config!r}: pass a CommConfig, such as CommConfig(spec='int4:g32')")
    handle = Handle(config)
    for path, module in model.named_modules():
        if module.__dict__.get("_is_hooked") and isinstance(module, torch.nn.Linear) and _is_row(model, path):
            module.lowbit_config, module.lowbit_site = config, site_of(model, path)
            handle.add(module.lowbit_site, lambda module=module: _unmark(module))
    if not handle.sites:
        raise ModelError(f"{type(model).__name__} has no row-parallel layer: load it with tp_plan='auto'")
    if not _wrapped:
        kind = tensor_parallel.RowwiseParallel
        _wrapped.set(kind, "transform_output_post_forward", _reduce(kind.transform_output_post_forward))
    return handle


def _unmark(module):
    del module.lowbit_config, module.lowbit_site


def _is_row(model, path):
    import re

    return model.tp_plan.get(re.sub(r"\d+", "*", path)) in ("rowwise", "rowwise_split_input")


def _reduce(base):
    def transform(self, module, output, mesh):
        config = module.__dict__.get("lowbit_config")
        if config is None:
            return base(self, module, output, mesh)
        group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
        output = communicator(group, config).all_reduce(output, module.lowbit_site)
        bias = module._parameters.get("bias")
        return output if bias is None else output + bias.to_local()

    return transform
