"""What `deepspeed.init_inference` is told of a model: its injection policy, from the family's row of hf/policies.py."""

from __future__ import annotations

import torch

from megatron_lowbit.patches.hf.sites import named

InjectionPolicy = dict[type[torch.nn.Module], tuple[str, ...]]


def prepare(model: torch.nn.Module, tp_size: int) -> InjectionPolicy | None:
    """The injection policy for a model that is about to be sharded, or None to let DeepSpeed look for one."""
    modules = dict(model.named_modules())
    policy: dict[type[torch.nn.Module], list[str]] = {}
    for _, path, module in named(model):
        if isinstance(module, torch.nn.Linear):
            layer, _, within = _split(path)
            names = policy.setdefault(type(modules[layer]), [])
            names += [within] if within not in names else []
    return {kind: tuple(names) for kind, names in policy.items()} or None


def _split(path: str) -> tuple[str, str, str]:
    """("model.layers.0", ".", "mlp.down_proj")"""
    parts = path.split(".")
    at = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: at + 1]), ".", ".".join(parts[at + 1 :])
