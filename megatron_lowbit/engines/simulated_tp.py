"""Tensor parallelism of N ranks in one process: a Hugging Face model whose row-parallel layers compute partial sums.

Only these layers differ from the unsplit model: their input features, and the columns of their weights, are cut into N
equal parts, as Megatron cuts them. What the N products become is up to a function, which sees every partial sum that
would cross a link: it can send them through a codec, or look at them. Experts, which Transformers keeps in one tensor
and Megatron sends token by token, compute as they are: of their layers only the attention is split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.nn.functional import linear as product

from ..errors import ModelError

Reduce = Callable[[str, list[torch.Tensor]], torch.Tensor]
"""(site, one partial sum [..., features] per rank, in rank order) -> their sum, of the same shape and dtype."""


def row_parallel(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Site -> the layer whose outputs are partial sums there, in the order of the forward pass."""
    sites = {}
    try:
        for index, layer in enumerate(model.model.layers):
            sites[f"layers.{index}.attention"] = layer.self_attn.o_proj
            if not hasattr(layer.mlp, "experts"):
                sites[f"layers.{index}.mlp"] = layer.mlp.down_proj
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
        if tp < 1 or layer.in_features % tp:
            raise ModelError(f"TP={tp} does not divide the {layer.in_features} features that enter {site}; use another")
    before = {site: vars(layer).get("forward") for site, layer in sites.items()}
    try:
        for site, layer in sites.items():
            layer.forward = _split_forward(site, layer, tp, reduce)
        yield
    finally:
        for site, layer in sites.items():
            del layer.forward
            if before[site] is not None:
                layer.forward = before[site]


def _split_forward(site: str, layer: torch.nn.Linear, tp: int, reduce: Reduce) -> Callable:
    weights = layer.weight.chunk(tp, dim=1)

    def forward(x: torch.Tensor) -> torch.Tensor:
        total = reduce(site, [product(part, w) for part, w in zip(x.chunk(tp, dim=-1), weights)])
        return total if layer.bias is None else total + layer.bias  # once, behind the sum

    return forward
