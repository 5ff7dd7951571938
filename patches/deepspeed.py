"""Compressed communication behind DeepSpeed's tensor-parallel layers.

    engine = lowbit.patches.deepspeed.init_inference(model, tp_size=2, config=config)     # shards and enables
    handle = lowbit.patches.deepspeed.enable(engine, config)                              # what DeepSpeed has sharded
    handle.disable()                                                                      # restores everything

Layers change their class for as long as they are enabled, to a subclass of their own (patches/ds/, a kind of layers a
file). DeepSpeed also sums the logits; they stay exact unless `sites` names them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_lowbit.config import CommConfig
from megatron_lowbit.errors import ConfigError, ModelError

try:
    from .ds import catch_all as catch_all_route
    from .ds import fastgen, kernel_injection, lm_head, row_parallel
    from .ds.sharding import shard
    from .ds.shared_memory import without_shared_memory
except ImportError as error:
    raise ModelError(f"DeepSpeed cannot be imported ({error}): pip install 'megatron-lowbit[deepspeed]'") from error
from ._handle import Handle, check_config
from .hf.sites import LOGITS, site_of

__all__ = ["Handle", "enable", "init_inference", "without_shared_memory"]

LAYERS = (row_parallel, lm_head, kernel_injection, fastgen)
EMBEDDING = "embedding"


def init_inference(
    model: torch.nn.Module, tp_size: int, config: CommConfig | None, **deepspeed_kwargs
) -> torch.nn.Module:
    """deepspeed.init_inference with the family's injection policy, enabled -> DeepSpeed's engine.

    The handle is `engine.lowbit_handle`; with config=None nothing is enabled, and it is None. model: of Transformers,
    as loaded; it is sharded in place, over tp_size neighbouring ranks. deepspeed_kwargs: all else that DeepSpeed takes;
    its `config`, a dict or a JSON file, as `deepspeed_config`. An `injection_policy` of your own wins, and without
    `dtype` the model keeps its own. A collective call of all ranks.
    Raises ConfigError for settings that cannot be, ModelError for a model that cannot be sharded.
    """
    if config is not None:
        check_config(config)
    engine = shard(model, tp_size, deepspeed_kwargs)
    engine.lowbit_handle = enable(engine, config) if config is not None else None
    return engine


def enable(engine_or_model: object, config: CommConfig, catch_all: bool = False) -> Handle:
    """Send the row-parallel layers' partial sums as `config` says, in this model.

    engine_or_model: what `deepspeed.init_inference` returned, or its `module`; an engine of FastGen (inference v2) or
    its model. catch_all: also what modules of other kinds sum by deepspeed.comm.inference_all_reduce, in the whole
    process. Raises ModelError when there is nothing to hook, ConfigError when it is enabled already or `config` does
    not fit.
    """
    check_config(config)
    model = _model(engine_or_model)
    found = _found(model, config, catch_all)
    sites = [site for *_, sent in found for site in sent] + [catch_all_route.SITE] * catch_all
    _check_sites(config, sites, next((layer.group_of(module) for layer, module, _ in found), None))
    handle = Handle(config)
    try:
        for layer, module, sent in found:
            _hook(module, layer.lowbit_class(type(module)), sent, handle)
        if catch_all:
            handle.add(catch_all_route.SITE, catch_all_route.install(config))
    except Exception:
        handle.disable()
        raise
    return handle


def _model(engine: object) -> torch.nn.Module:
    model = getattr(engine, "module", None)  # of InferenceEngine
    if not isinstance(model, torch.nn.Module):
        model = getattr(engine, "_model", engine)  # of InferenceEngineV2
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"{engine!r} is no engine: pass what deepspeed.init_inference returned")
    return model


def _found(model: torch.nn.Module, config: CommConfig, catch_all: bool) -> list[tuple]:
    """(file of LAYERS, module, its sites) of what is to be hooked. Raises if that is nothing, or cannot be hooked."""
    found = []
    for path, module in model.named_modules():
        for layer in LAYERS:
            if layer.takes(module) and _is_shared(layer.group_of(module)):
                if sent := layer.messages(module, site_of(model, path), config):
                    _check_hookable(module, sent)
                    found.append((layer, module, sent))
    if not found and not catch_all:
        raise ModelError(
            f"this {type(model).__name__} has no row-parallel layer of DeepSpeed, which makes none for tp_size 1: pass "
            "what deepspeed.init_inference returned for 2 ranks or more"
        )
    return found


def _is_shared(group: object) -> bool:
    return isinstance(group, dist.ProcessGroup) and group.size() > 1


def _check_hookable(module: torch.nn.Module, sent: list[str]) -> None:
    if "lowbit_config" in module.__dict__:
        raise ConfigError(f"{sent[0]} is enabled already: call the earlier handle's disable() first")
    if getattr(module, "defer_collectives_to_compiler", False):
        raise ModelError(f"{sent[0]} leaves its sum to DeepCompile: take 'autotp' out of its passes")
    if hasattr(module, "is_training_mode") and module.is_training_mode():
        raise ModelError(
            "DeepSpeed is in its training mode (set_autotp_mode), and compressed sums have no gradient: use "
            "deepspeed.init_inference in a process that does not train"
        )


def _check_sites(config: CommConfig, sites: list[str], group: object) -> None:
    """Raise ConfigError if nothing would be compressed, or the calibration does not know what will be sent."""
    for name in (LOGITS, EMBEDDING):
        if name in (config.sites or ()) and name not in sites:
            raise ConfigError(
                f"sites={config.sites} names {name!r}, which this model does not sum or which is always exact with "
                "DeepSpeed: leave it out"
            )
    selected = [site for site in dict.fromkeys(sites) if config.selects(site)]
    if not selected:
        raise ConfigError(
            f"sites={config.sites} selects none of this model's sites: {_some(list(dict.fromkeys(sites)))}"
        )
    config.check(selected, tp=group and group.size())


def _some(sites: list[str], limit: int = 6) -> str:
    return ", ".join(sites[:limit]) + (f" and {len(sites) - limit} more" if len(sites) > limit else "")


def _hook(module: torch.nn.Module, lowbit_class: type, sites: list[str], handle: Handle) -> None:
    kind = type(module)
    module.__class__ = lowbit_class
    module.lowbit_config, module.lowbit_sites = handle.config, sites

    def undo() -> None:
        module.__class__ = kind
        del module.lowbit_config, module.lowbit_sites

    handle.add(sites, undo)
