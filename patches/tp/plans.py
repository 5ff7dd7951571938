"""Plans: which rule of a model's plan gets a style of ours, and plans that were written by hand."""

from __future__ import annotations

import importlib.util

import torch
from transformers import PreTrainedModel

from megatron_lowbit.config import CommConfig
from megatron_lowbit.errors import ConfigError, ModelError
from megatron_lowbit.patches._handle import asks_for, check_config
from megatron_lowbit.patches.hf.sites import LOGITS

from . import parity
from .installed import POST, WRAPS_FORWARD, kind_of, tensor_parallel
from .models import Plan, blank, check_keys, own_plan, wildcard
from .rows import check_sites, site_in
from .styles import STYLES, base_of, name_of

# Whether Transformers puts a plan over the model's own, as it does from 5.2x on, or takes it for the whole plan.
MERGES = hasattr(PreTrainedModel, "_resolve_parallel_plans") or hasattr(tensor_parallel, "resolve_parallel_plans")


def tp_plan(model_config, config: CommConfig, plan: Plan | None = None) -> Plan:
    """What `DistributedConfig(tp_plan=...)`, or the older keyword `tp_plan=`, takes to load a model with `config`.

    model_config: of the model that will be loaded, as AutoConfig reads it. plan: rules of your own, for models that
    Transformers has no plan for; it is checked first by `check_plan`, so all ranks call this then. The result overrides
    rules of the model's own plan, and is to be passed on as it is. Raises ModelError for models without a plan and for
    plans that do not fit, ConfigError if `config` does not or this release takes no plans.
    """
    check_config(config)
    if not WRAPS_FORWARD:
        raise ConfigError(
            "this release of Transformers takes no overrides of a model's plan: load the model with tp_plan='auto', "
            "and call lowbit.patches.transformers.enable(model, config)"
        )
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError("Transformers shards models with the help of accelerate: pip install accelerate")
    model = blank(model_config)
    if plan is not None:
        plan = {key: base_of(style) if style in STYLES else style for key, style in plan.items()}
        check_keys(model, plan)
        parity.check_plan(model_config, plan)
    merged = dict(model.tp_plan or {}) | (plan or {})
    if not merged:
        raise ModelError(no_plan(model))
    rules, sites = {}, []
    for path, module in model.named_modules():
        key = wildcard(path)
        kind = kind_of(getattr(type(STYLES[merged[key]]), POST, None)) if merged.get(key) in STYLES else None
        site = site_in(model, path, kind) if kind and not isinstance(module, torch.nn.Embedding) else None
        if site is not None and (site != LOGITS or asks_for(config, LOGITS)):
            rules[key] = merged[key]
            sites.append(site)
    if not rules:
        raise ModelError(f"the plan of {type(model).__name__} has no row-parallel layer: {merged}")
    check_sites(config, type(model).__name__, sites)
    config.check(sites)
    overrides = (plan or {}) | {key: name_of(base_of(style), config) for key, style in rules.items()}
    return overrides if MERGES else merged | overrides


def check_loaded(model: torch.nn.Module) -> None:
    """Raise ModelError if the model was sharded by rules that somebody wrote and nobody checked."""
    if not WRAPS_FORWARD or getattr(model, "_device_mesh", None) is None:
        return
    by_hand = {key: style for key, style in (model.tp_plan or {}).items() if style in STYLES}
    by_hand = {key: base_of(style) for key, style in by_hand.items() if own_plan(model).get(key) != base_of(style)}
    if by_hand and not parity.was_checked(model.config, by_hand):
        raise ModelError(
            f"{type(model).__name__} was sharded by a plan that is not Transformers' own, and plans that shard a model "
            "wrongly go unnoticed: call lowbit.patches.transformers.check_plan(model.config, plan) on all ranks first"
        )


def no_plan(model: torch.nn.Module) -> str:
    """What to say of a model that Transformers cannot shard by itself."""
    return (
        f"Transformers has no tensor-parallel plan for {type(model).__name__}: use DeepSpeed, which needs none "
        "(lowbit.patches.deepspeed.init_inference(model, tp_size, config)), or write one and pass it as "
        "tp_plan(model_config, config, plan=...), which checks it"
    )
