"""Names of sites: "layers.3.attention", from where a module stands in its transformer layer and that layer's number.

Megatron counts layers from 1 and through all pipeline stages.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.transformer.moe.moe_layer import BaseMoELayer

from .compat import LAYERS

_NAMES = {"self_attention": "attention", "mixer": "mamba"}


def named(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """(site, module) of all modules; those outside of transformer layers are called by their path."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LAYERS)]
    for path, module in model.named_modules():
        owner = next(((at, layer) for at, layer in layers if not at or path.startswith(at + ".")), None)
        yield (_site(path.removeprefix(owner[0]).strip("."), owner[1]) if owner else path), module


def _site(path: str, layer: torch.nn.Module) -> str:
    """A path within a layer, such as "self_attention.linear_proj" -> "layers.0.attention"."""
    part, _, rest = path.partition(".")
    inner = rest.rpartition(".")[0]  # such as shared_experts within mlp
    name = "moe" if isinstance(getattr(layer, part, None), BaseMoELayer) else _NAMES.get(part, part)
    return ".".join(["layers", str(layer.layer_number - 1), name, *([inner] if inner else [])])
