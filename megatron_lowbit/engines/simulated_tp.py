"""Tensor parallelism of N ranks in one process: a Hugging Face model whose row-parallel layers compute partial sums.

Only these layers differ from the unsplit model: their input features, and the columns of their weights, are cut into N
equal parts, as Megatron cuts them. What the N products become is up to a function, which sees every partial sum that
would cross a link: it can send them through a codec, or look at them. Experts are cut alike, and their partial sums are
those of a token's chosen experts together, as they cross in Megatron's all-gather dispatcher. patches/hf/policies.py
lists the layers of each family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import linear as product

from ..errors import ModelError
from ..patches.hf.policies import POLICIES
from ..patches.hf.sites import half_found, named, policy_of

Reduce = Callable[[str, list[torch.Tensor]], torch.Tensor]
"""(site, one partial sum [..., features] per rank, in rank order) -> their sum, of the same shape and dtype."""


def row_parallel(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Site -> the layer, or all experts of one, whose outputs are partial sums there, in the order of the modules.

    Where each expert is a layer of its own, as in Transformers 4, they share a site, and the last one stands for them.
    Raises ModelError for a model without any, and for one of a family without a policy where they were half found.
    """
    return dict(_row_parallel(model))


def _row_parallel(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    layers = [(site, layer) for site, _, layer in named(model)]
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no row-parallel layer of a name that is known: use a Transformers model of a "
            f"family in patches/hf/policies.py, such as {', '.join(POLICIES)}"
        )
    if policy_of(model) is None and (half := half_found(site for site, _ in layers)):
        raise ModelError(
            f"{type(model).__name__}: {half}, so the others would stay whole; add its model type to POLICIES of "
            "patches/hf/policies.py"
        )
    return layers


@contextmanager
def simulated_tp(model: torch.nn.Module, tp: int, reduce: Reduce) -> Iterator[None]:
    """Within the context, `model` computes what `tp` ranks would that reduce their partial sums with `reduce`.

    Raises ModelError as `check_tp` does.
    """
    layers = _row_parallel(model)
    _check_tp(layers, tp)
    before = [vars(layer).get("forward") for _, layer in layers]
    try:
        for site, layer in layers:
            split = _split_experts if _is_experts(layer) else _split_forward
            layer.forward = split(site, layer, tp, reduce)
        yield
    finally:
        for (_, layer), forward in zip(layers, before):
            vars(layer).pop("forward", None)
            if forward is not None:
                layer.forward = forward


def check_tp(model: torch.nn.Module, tp: int) -> None:
    """Raise ModelError naming the layer whose input features `tp` does not divide, and the sizes that divide all."""
    _check_tp(_row_parallel(model), tp)


def _check_tp(layers: list[tuple[str, torch.nn.Module]], tp: int) -> None:
    for site, layer in layers:
        entering = _features(layer)
        if tp < 1 or entering % tp:
            common = math.gcd(*(_features(layer) for _, layer in layers))
            possible = [str(n) for n in range(2, common + 1) if common % n == 0]
            more = f" … {possible[-1]}" if len(possible) > 8 else ""
            raise ModelError(
                f"TP={tp} does not divide the {entering} features that enter {site}; possible TP sizes: "
                f"{', '.join(possible[:8]) or 'none'}{more}"
            )


def features(model: torch.nn.Module) -> dict[str, int]:
    """Site -> the features of the messages there. Raises ModelError for a model without row-parallel layers."""
    return {
        site: layer.down_proj.shape[1] if _is_experts(layer) else _columns(layer).shape[0]
        for site, layer in row_parallel(model).items()
    }


def whole_experts(model: torch.nn.Module) -> str | None:
    """The first of the modules that hold all experts of a layer and make no partial sums here, as no policy lists them.

    DeepSpeed leaves them whole too; an engine that shards them has sums there that are not simulated.
    """
    split = {id(layer) for _, layer in _row_parallel(model)}
    for path, module in model.named_modules():
        down = vars(module).get("_parameters", {}).get("down_proj")
        if down is not None and down.dim() == 3 and id(module) not in split:
            return path
    return None


def _is_experts(layer: torch.nn.Module) -> bool:
    return not hasattr(layer, "weight")


def _columns(layer: torch.nn.Module) -> torch.Tensor:
    """The weights, [output features, input features], also of GPT-2's Conv1D, which has them the other way round."""
    return layer.weight if isinstance(layer, torch.nn.Linear) else layer.weight.t()


def _features(layer: torch.nn.Module) -> int:
    return (layer.down_proj if _is_experts(layer) else _columns(layer)).shape[-1]


def _split_forward(site: str, layer: torch.nn.Module, tp: int, reduce: Reduce) -> Callable:
    weights = _columns(layer).chunk(tp, dim=1)

    def forward(x: torch.Tensor) -> torch.Tensor:
        total = reduce(site, [product(part, w) for part, w in zip(x.chunk(tp, dim=-1), weights)])
        return total if layer.bias is None else total + layer.bias  # once, behind the sum

    return forward


def _split_experts(site: str, experts: torch.nn.Module, tp: int, reduce: Reduce) -> Callable:
    """Experts as Transformers has them: gate_up_proj [experts, gate and up, hidden], down_proj [experts, hidden, up]"""
    gates, ups = (half.chunk(tp, dim=1) for half in experts.gate_up_proj.chunk(2, dim=1))
    downs, whole = experts.down_proj.chunk(tp, dim=2), type(experts).forward

    def partial(rank: int, x: torch.Tensor, *chosen: torch.Tensor) -> torch.Tensor:
        # Copied anew each time: kept, they would be all experts' weights once more.
        weights = {"gate_up_proj": torch.cat([gates[rank], ups[rank]], dim=1), "down_proj": downs[rank].contiguous()}
        return whole(_Cut(experts, weights), x, *chosen)

    def forward(x: torch.Tensor, *chosen: torch.Tensor) -> torch.Tensor:
        return reduce(site, [partial(rank, x, *chosen) for rank in range(tp)])

    return forward


class _Cut:
    """Experts with other weights, to everyone who only looks at their attributes."""

    def __init__(self, experts: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
        self.__dict__.update(weights)
        self._experts = experts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)
