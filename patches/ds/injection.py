"""What `deepspeed.init_inference` is told of a model: its injection policy, from the family's row of hf/policies.py.

DeepSpeed splits the columns of every linear layer within a transformer layer, but the rows of those that the policy
names. A row that is forgotten is thus not left alone: the layer computes nonsense. So a family without a policy, whose
layers are found by their names, must have one for its attention and one for its MLP in every layer.
"""

from __future__ import annotations

import math
import warnings

import torch

from megatron_lowbit.errors import ModelError
from megatron_lowbit.patches.hf.sites import half_found, named, policy_of

from . import families

InjectionPolicy = dict[type[torch.nn.Module], tuple[str, ...]]


def prepare(model: torch.nn.Module, tp_size: int) -> InjectionPolicy:
    """The injection policy for a model that is about to be sharded. Repairs in place what DeepSpeed would break.

    A repaired model computes what it did before, sharded or not, but some parameters have other names. Raises
    ModelError for a model that has no row-parallel layers, that `tp_size` does not divide, or that cannot be repaired.
    """
    rows = [(site, path, module) for site, path, module in named(model) if families.is_linear(module)]
    if not rows:
        raise ModelError(f"no row-parallel layer in {type(model).__name__}: {_found(model)}")
    if policy_of(model) is None:
        if half := half_found(site for site, _, _ in rows):
            raise ModelError(f"{half}: {_found(model)}")
        _check_norms(model, rows)
    _check_sizes(model, tp_size, rows)
    families.repair(model)
    policy: dict[type[torch.nn.Module], list[str]] = {}
    for _, path, _ in rows:
        layer, within = _split(path)
        names = policy.setdefault(type(model.get_submodule(layer)), [])
        # DeepSpeed knows a linear layer by its parent's name and its own: "DenseReluDense.wo", or ".fc2"
        name = ".".join(["", *within][-2:])
        names += [name] if name not in names else []
    return {kind: tuple(names) for kind, names in policy.items()}


def _split(path: str) -> tuple[str, list[str]]:
    """("model.layers.0", ["mlp", "down_proj"])"""
    parts = path.split(".")
    at = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: at + 1]), parts[at + 1 :]


def _check_norms(model: torch.nn.Module, rows: list[tuple[str, str, torch.nn.Module]]) -> None:
    """Raise ModelError for a norm over the features of all heads, which DeepSpeed leaves whole."""
    for path in (path for site, path, _ in rows if site.endswith("attention")):
        parent, _, own = path.rpartition(".")
        children = list(model.get_submodule(parent).named_children())
        cut = {child.out_features for name, child in children if isinstance(child, torch.nn.Linear) and name != own}
        for name, child in children:
            sizes = {weight.numel() for weight in child.parameters()} if not families.is_linear(child) else set()
            if sizes & cut:
                raise ModelError(
                    f"{parent}.{name} ({type(child).__name__}) spans the features of all heads, of which a rank has a "
                    f"part: DeepSpeed cannot shard {type(model).__name__}; try Transformers' own tensor parallelism"
                )


def _found(model: torch.nn.Module) -> str:
    """What there is instead, and what to do about it."""
    linear = sorted(
        {
            ".".join(part for part in path.split(".") if not part.isdigit())
            for path, module in model.named_modules()
            if families.is_linear(module)
        }
    )
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if not linear:
        return "it has no linear layers, or was sharded already; pass the model as from_pretrained returned it"
    if kind is None:
        return (
            "it has no model type to know a policy by; pass a model of Transformers, or an injection_policy of your own"
        )
    return f"its linear layers are {', '.join(linear)}; add model type {kind!r} to POLICIES of patches/hf/policies.py"


def _check_sizes(model: torch.nn.Module, tp_size: int, rows: list[tuple[str, str, torch.nn.Module]]) -> None:
    if not isinstance(tp_size, int) or tp_size < 1:
        raise ModelError(f"tp_size is {tp_size!r}: give the number of ranks, 1 or more")
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    numbers, shared = {}, _key_value_heads(config)
    if heads := getattr(config, "num_attention_heads", None):
        numbers[heads] = "attention heads"
    for site, _, module in rows:
        numbers.setdefault(families.in_features(module), f"features that enter {site}")
    if shared and families.fuses_query_and_key(model):  # whose forward pass wants as many on every rank
        numbers = {shared: "key-value heads"} | numbers
    wrong = [f"{number} {what}" for number, what in numbers.items() if number % tp_size]
    if wrong:
        most = math.gcd(*numbers)
        sizes = ", ".join(str(size) for size in range(1, most + 1) if most % size == 0)
        raise ModelError(
            f"tp_size={tp_size} does not divide the {' and the '.join(wrong)} of {type(model).__name__}: use {sizes}"
        )
    if shared and shared % tp_size:
        warnings.warn(
            f"tp_size={tp_size} does not divide the {shared} key-value heads of {type(model).__name__}: DeepSpeed "
            "gives some ranks more heads than others, unlike a calibration or simulation, which cut evenly",
            stacklevel=4,
        )


def _key_value_heads(config: object) -> int | None:
    """Their number, where they are split among the ranks."""
    if families.shares_key_and_value(config):
        return None
    return getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
