"""Compressed communication in Transformers' own tensor parallelism.

    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(tp_size=2))
    handle = lowbit.patches.transformers.enable(model, config)     # of any model loaded with tensor parallelism
    handle.disable()                                               # restores everything

    plan = lowbit.patches.transformers.tp_plan(model_config, config)     # or while it is loaded
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(tp_size=2, tp_plan=plan))

Row-parallel layers and experts are compressed. The embedding's sum and the gathering of the logits stay exact; logits
that a plan makes of partial sums are compressed only if `sites` names them.
"""

from __future__ import annotations

import sys
import weakref

import torch
import torch.distributed as dist

from megatron_lowbit.config import CommConfig
from megatron_lowbit.errors import ConfigError, ModelError

try:
    from .tp import installed, plans, reduces, styles
except ImportError as error:
    raise ModelError(f"Transformers cannot be imported ({error}): pip install 'megatron-lowbit[hf]'") from error
from ._handle import Handle, check_config
from ._replacements import Replacements
from .tp.parity import check_plan
from .tp.plans import tp_plan
from .tp.rows import check_heads, check_sites, rows_of

__all__ = ["Handle", "check_plan", "enable", "tp_plan"]

ENABLED, PLANNED = "lowbit_config", "lowbit_planned"  # attributes of the modules that something holds for
_wrapped = Replacements()
_hooked: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()  # a model may be dropped without disable()


def enable(model: torch.nn.Module, config: CommConfig) -> Handle:
    """Send the partial sums of a model that was loaded with tensor parallelism as `config` says.

    Of a model that was loaded with the plan of `tp_plan`, `config` replaces the plan's for as long as it is enabled.
    Raises ModelError when there is nothing to hook or the model was sharded by a plan that nobody checked, ConfigError
    when it is enabled already or `config` does not fit.
    """
    check_config(config)
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"{model!r} is no model: pass what from_pretrained returned, loaded with tensor parallelism")
    plans.check_loaded(model)
    return _enable(model, config, ENABLED)


def _enable(model: torch.nn.Module, config: CommConfig, mark: str) -> Handle:
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigError("torch.distributed is not initialised: start the program with torchrun")
    rows = rows_of(model, config)
    if mark == PLANNED:  # a plan may be edited before it is used
        rows = [row for row in rows if isinstance(row.installed.style, styles.LowBit)]
        if not rows:
            raise ModelError(
                "the plan's lowbit styles are on no layer whose sum is compressed: pass on what "
                "lowbit.patches.transformers.tp_plan(model_config, config) returned"
            )
    sites = [row.site for row in rows]
    check_sites(config, type(model).__name__, sites)
    tp = rows[0].installed.mesh.size()
    check_heads(model, tp)
    config.check(sites, tp)
    for row in rows:
        if mark in row.module.__dict__:
            raise ConfigError(f"{row.path} is enabled already: call the earlier handle's disable() first")
    handle = Handle(config)
    handle.add([], _forget_compiled)
    if installed.WRAPS_FORWARD:
        handle.add([], _release)
        if not _wrapped:
            for owner, name, wrapper in reduces.wrappers():
                _wrapped.set(owner, name, wrapper(getattr(owner, name)))
    for row in rows:
        setattr(row.module, mark, config)
        row.module.lowbit_site = row.site
        _hooked.add(row.module)
        handle.add(row.site, lambda module=row.module: delattr(module, mark))
        if not installed.WRAPS_FORWARD:
            handle.add(row.site, reduces.exchange_hook(row.module, row.installed))
    _forget_compiled()
    return handle


def _release() -> None:
    """Put Transformers' functions back, unless something still holds for a module."""
    if not any(mark in vars(module) for module in _hooked for mark in (ENABLED, PLANNED)):
        _wrapped.undo()


def _forget_compiled() -> None:
    """Have torch.compile trace again: it does not look whether methods and hooks are still those that it traced."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


styles.when_loaded(lambda model, config: _enable(model, config, PLANNED))
