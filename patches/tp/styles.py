"""Parallel styles of our own, which a plan can name: "rowwise_lowbit" is "rowwise" with a configuration.

A style does nothing but carry its configuration through the loading of a model. As soon as Transformers has applied the
plan, `when_loaded`'s function enables the configuration in the modules that got the style, with the model at hand, so
that it can name their sites. A style that is applied by any other road is an error at the first forward.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from megatron_lowbit.config import CommConfig
from megatron_lowbit.errors import ConfigError, ModelError

from .installed import WRAPS_FORWARD, installed, tensor_parallel

STYLES = tensor_parallel.ALL_PARALLEL_STYLES if WRAPS_FORWARD else {}
_APPLIES = "apply_tensor_parallelism"  # Transformers' function that gives every module its style
_configs: list[CommConfig] = []


class LowBit:
    """What our styles add to Transformers'."""

    lowbit_style: str  # the style it was made of
    lowbit_config: CommConfig | None

    def install_forward(self, module, mesh, **named):
        if self.lowbit_config is None:
            raise ConfigError(
                f"the style {self.lowbit_style}_lowbit belongs to no configuration yet: make the plan with "
                "lowbit.patches.transformers.tp_plan(model_config, config)"
            )
        return super().install_forward(module, mesh, **named)

    def transform_inputs_pre_forward(self, module, args, kwargs, mesh, **named):
        if "lowbit_site" not in module.__dict__:
            raise ModelError(
                f"the style {self.lowbit_style}_lowbit was applied outside from_pretrained, so its sites have no "
                "names: shard with Transformers' own, and call lowbit.patches.transformers.enable(model, config)"
            )
        return super().transform_inputs_pre_forward(module, args, kwargs, mesh, **named)


@functools.cache
def _lowbit_class(kind: type) -> type:
    return type(f"LowBit{kind.__name__}", (LowBit, kind), {"__module__": __name__})


def name_of(style: str, config: CommConfig | None) -> str:
    """The name of `style` with `config`, registered with Transformers: "rowwise_lowbit", for a second configuration
    "rowwise_lowbit_2". Without a configuration, a name that cannot be loaded yet."""
    if config is not None and config not in _configs:
        _configs.append(config)
    number = _configs.index(config) + 1 if config is not None else 1
    name = f"{style}_lowbit" if number == 1 else f"{style}_lowbit_{number}"
    if name not in STYLES or STYLES[name].lowbit_config is None:
        made = copy.copy(STYLES[style])
        made.__class__ = _lowbit_class(type(STYLES[style]))
        made.lowbit_style, made.lowbit_config = style, config
        STYLES.register(name, made)
    return name


def base_of(style: str) -> str:
    """The name of Transformers' own style that this one is, or was made of."""
    return getattr(STYLES[style], "lowbit_style", style)


def when_loaded(enable: Callable[[torch.nn.Module, CommConfig], Any]) -> None:
    """Have enable(model, config) called for models that were given our styles; its result is `model.lowbit_handle`."""
    if not WRAPS_FORWARD:
        return
    for style in ("rowwise", "moe_tp_experts"):  # so that a plan which names them too early gets an explanation
        name_of(style, None)
    owner = next(
        module
        for name in ("transformers.distributed.mixin", "transformers.modeling_utils")
        if hasattr(module := sys.modules.get(name) or __import__(name, fromlist=["_"]), _APPLIES)
    )
    base = getattr(owner, _APPLIES)

    @wraps(base)
    def apply_tensor_parallelism(model, *args, **named):
        done = base(model, *args, **named)
        styles = [found.style for module in model.modules() if (found := installed(module))]
        configs = {style.lowbit_config for style in styles if isinstance(style, LowBit)}
        if len(configs) > 1:
            raise ConfigError("the plan holds styles of two configurations: make it with one call of tp_plan")
        for config in configs:
            model.lowbit_handle = enable(model, config)
        return done

    setattr(owner, _APPLIES, apply_tensor_parallelism)
