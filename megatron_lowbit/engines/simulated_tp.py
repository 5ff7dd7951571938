"""Tensor parallelism of N ranks in one process: a Hugging Face model whose row-parallel layers compute partial sums.

Only these layers differ from the unsplit model: their input features, and the columns of their weights, are cut into N
equal parts, as Megatron cuts them. What the N products become is up to a function, which sees every partial sum that
would cross a link: it can send them through a codec, or look at them. Experts are cut alike, and their partial sums are
those of a token's chosen experts together, as they cross in Megatron's all-gather dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import linear as product

from ..errors import ModelError

Reduce = Callable[[str, list[torch.Tensor]], torch.Tensor]
"""(site, one partial sum [..., features] per rank, in rank order) -> their sum, of the same shape and dtype."""


def row_parallel(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Site -> the layer, or all experts of one, whose outputs are partial sums there, in order of the forward pass."""
    sites = {}
    try:
        for index, layer in enumerate(model.model.layers):
            sites[f"layers.{index}.attention"] = layer.self_attn.o_proj
            experts = getattr(layer.mlp, "experts", None)
            kind, summing = ("moe.combine", experts) if experts is not None else ("mlp", layer.mlp.down_proj)
            sites[f"layers.{index}.{kind}"] = summing
    except AttributeError as error:
        raise ModelError(
            f"{type(model).__name__} is not built like a Llama ({error}); use a model of a family in families.py"
        ) from error
    return sites


@contextmanager
def simulated_tp(model: torch.nn.Module, tp: int, reduce: Reduce) -> Iterator[None]:
    """Within the context, `model` computes what `tp` ranks would that reduce their partial sums with `reduce`.

    Raises ModelError if `tp` does not divide the input features of a layer.
    """
    sites = row_parallel(model)
    for site, layer in sites.items():
        features = _features(layer)
        if tp < 1 or features % tp:
            raise ModelError(f"TP={tp} does not divide the {features} features that enter {site}; use another")
    before = {site: vars(layer).get("forward") for site, layer in sites.items()}
    try:
        for site, layer in sites.items():
            split = _split_forward if isinstance(layer, torch.nn.Linear) else _split_experts
            layer.forward = split(site, layer, tp, reduce)
        yield
    finally:
        for site, layer in sites.items():
            del layer.forward
            if before[site] is not None:
                layer.forward = before[site]


def _features(layer: torch.nn.Module) -> int:
    return layer.in_features if isinstance(layer, torch.nn.Linear) else layer.down_proj.shape[-1]


def _split_forward(site: str, layer: torch.nn.Linear, tp: int, reduce: Reduce) -> Callable:
    weights = layer.weight.chunk(tp, dim=1)

    def forward(x: torch.Tensor) -> torch.Tensor:
        total = reduce(site, [product(part, w) for part, w in zip(x.chunk(tp, dim=-1), weights)])
        return total if layer.bias is None else total + layer.bias  # once, behind the sum

    return forward


def _split_experts(site: str, experts: torch.nn.Module, tp: int, reduce: Reduce) -> Callable:
    """Experts as Transformers has them: gate_up_proj [experts, gate and up, hidden], down_proj [experts, hidden, up]"""
    gates, ups = (half.chunk(tp, dim=1) for half in experts.gate_up_proj.chunk(2, dim=1))
    downs, whole = experts.down_proj.chunk(tp, dim=2), type(experts).forward
    parts = [
        {"gate_up_proj": torch.cat(pair, dim=1), "down_proj": down.contiguous()}
        for *pair, down in zip(gates, ups, downs, strict=True)
    ]

    def forward(x: torch.Tensor, *chosen: torch.Tensor) -> torch.Tensor:
        return reduce(site, [whole(_Cut(experts, part), x, *chosen) for part in parts])

    return forward


class _Cut:
    """Experts with other weights, to everyone who only looks at their attributes."""

    def __init__(self, experts: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
        self.__dict__.update(weights)
        self._experts = experts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)
