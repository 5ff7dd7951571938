"""Names of sites: "layers.3.attention", from where a module stands in its transformer layer and that layer's number.

Megatron counts layers from 1 and through all pipeline stages. Two stacks of one model count alike, so layers of an
encoder beside a decoder (T5) are "encoder.layers.3", and those that predict further tokens "mtp.0". Names do not depend
on what a model is wrapped in (Float16Module, DDP), nor on whether it was named while it was built or afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.moe.moe_layer import BaseMoELayer

from .compat import LAYERS, MTP_LAYERS

EMBEDDING, LOGITS, OUTPUT_LAYER = "embedding", "logits", "output_layer"
_NAMES = {"self_attention": "attention", "mixer": "mamba"}
_ONLY_COLUMNS = ("linear_qkv", "linear_fc1", "in_proj")  # alone in gathering for their part of a layer


def named(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """(site, module) of all modules; those outside of transformer layers are called by their path."""
    beside = tuple(
        f"{path}.encoder.".lstrip(".")
        for path, module in model.named_modules()
        if hasattr(module, "encoder") and hasattr(module, "decoder")
    )
    around: list[tuple[str, str, torch.nn.Module]] = []  # (path, name, layer), the innermost last
    for path, module in model.named_modules():
        while around and not _within(path, around[-1][0]):
            around.pop()
        if isinstance(module, LAYERS + MTP_LAYERS):
            around.append((path, _layer(path, module, around, beside), module))
        if around:
            at, name, layer = around[-1]
            yield _site(path.removeprefix(at).strip("."), name, layer, module), module
        elif isinstance(module, VocabParallelEmbedding):
            yield EMBEDDING, module
        else:
            while path.startswith("module."):  # of Float16Module and DDP
                path = path.removeprefix("module.")
            yield OUTPUT_LAYER if path.endswith(OUTPUT_LAYER) else path, module


def _within(path: str, outer: str) -> bool:
    return not outer or path.startswith(outer + ".")


def _layer(path: str, layer: torch.nn.Module, around: list, beside: tuple[str, ...]) -> str:
    """The name of a layer, such as "layers.0"."""
    if isinstance(layer, MTP_LAYERS):
        return f"mtp.{layer.layer_number - 1}"
    if around:  # the one layer of an MTP layer, whose number says nothing before 0.16, or one of its own stack's
        outer, name, _ = around[-1]
        inner = path.removeprefix(outer).strip(".")
        return f"{name}.layers.{inner.rpartition('.')[2]}" if "." in inner else name
    return f"{'encoder.' if path.startswith(beside) else ''}layers.{layer.layer_number - 1}"


def _site(path: str, name: str, layer: torch.nn.Module, module: torch.nn.Module) -> str:
    """A path within a layer, such as "self_attention.linear_proj" -> "layers.0.attention"."""
    if not path:
        return name
    part, _, rest = path.partition(".")
    inner, _, leaf = rest.rpartition(".")  # such as shared_experts within mlp
    name = f"{name}.{'moe' if isinstance(getattr(layer, part, None), BaseMoELayer) else _NAMES.get(part, part)}"
    if isinstance(module, ColumnParallelLinear) and leaf and leaf not in _ONLY_COLUMNS:
        inner = f"{inner}.{leaf.removeprefix('linear_')}".strip(".")
    return f"{name}.{inner}" if inner else name
