"""A model of Transformers without weights, and the plans that it can have."""

from __future__ import annotations

import copy
import re

import torch

from megatron_lowbit.errors import ModelError

from .styles import STYLES

Plan = dict[str, str]


def blank(model_config) -> torch.nn.Module:
    """The model without weights. Raises ModelError if the configuration names no model."""
    import transformers

    for name in getattr(model_config, "architectures", None) or ():
        if (kind := getattr(transformers, name, None)) is not None:
            break
    else:
        mappings = transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING
        kind = next((mapping[type(model_config)] for mapping in mappings if type(model_config) in mapping), None)
    if kind is None:
        raise ModelError(
            f"{type(model_config).__name__} is the configuration of no model of Transformers: pass what "
            "AutoConfig.from_pretrained(path) returns"
        )
    with torch.device("meta"):
        return kind(unsharded(model_config))


def unsharded(model_config):
    """A copy, without what a sharded model's configuration says of that."""
    config = copy.deepcopy(model_config)
    vars(config).pop("distributed_config", None)
    return config


def check_keys(model: torch.nn.Module, plan: Plan) -> None:
    """Raise ModelError for rules and styles that mean nothing here: a plan for another model."""
    names = {wildcard(name) for name, _ in (*model.named_modules(), *model.named_parameters())}
    if unknown := sorted(set(plan) - names):
        raise ModelError(
            f"{type(model).__name__} has no {', no '.join(unknown[:3])}{' …' * (len(unknown) > 3)}: this is a plan for "
            f"another model. Its names are like {next(iter(sorted(name for name in names if '*.' in name)), 'none')}"
        )
    if strange := sorted(set(plan.values()) - set(STYLES)):
        raise ModelError(f"Transformers has no parallel style {', '.join(strange)}: use {', '.join(sorted(STYLES))}")


def own_plan(model: torch.nn.Module) -> Plan:
    """The plan that Transformers has for a model, whatever it was overridden with."""
    plan = dict(type(model)._tp_plan or {})
    if model.base_model is model:
        plan |= {"embed_tokens": "embedding_rowwise"} | (model.config.base_model_tp_plan or {})
    for name, child in model.named_children():
        plan |= {f"{name}.{key}": style for key, style in (getattr(child, "_tp_plan", None) or {}).items()}
    return plan


def wildcard(path: str) -> str:
    """A name as plans have it: "model.layers.*.mlp.down_proj"."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)
