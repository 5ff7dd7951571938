"""Mixture of experts: the hidden states that token dispatchers send, and the shared experts that run beside them.

The all-gather dispatcher gathers hidden states over TP x EP and reduce-scatters what the experts made of them; the
all-to-all dispatcher sends them to their experts' ranks and back, with an all-gather and a reduce-scatter in between
when experts are tensor-parallel too. Sites: layers.{i}.moe.dispatch and layers.{i}.moe.combine. With
moe_shared_expert_overlap the shared experts reduce by themselves, at layers.{i}.moe.shared_experts.

A dispatcher calls the collectives of its own module, so those are wrapped, and act only while a method of a dispatcher
runs that belongs to a hooked layer. Of what it sends then only the hidden states are taken: floating point, two
dimensions, as wide as what the method was given, and not the probabilities it was given. Token counts, routing maps,
indices and probabilities (one dimension behind `permute`) pass untouched.

Hazards: which method runs is kept in module variables, so two threads must not run hooked layers at the same time. With
overlap, shared experts communicate on a CUDA stream of their own; their group must not be the dispatcher's (Megatron
makes a group for each).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe import shared_experts, token_dispatcher
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_lowbit.config import CommConfig
from megatron_lowbit.errors import ModelError

from . import collectives
from .hooks import config_of, site_of

DISPATCH, COMBINE, SHARED = ".dispatch", ".combine", ".shared_experts"
FUSED = "FusedSharedExpertMLP"  # of newer releases
UNNAMED = "moe"  # layers that were built before a process-wide enable
_DISPATCHERS = (token_dispatcher.MoEAllGatherTokenDispatcher, token_dispatcher.MoEAlltoAllTokenDispatcher)
# What releases have of these: 0.12 sends in the two named *permutation, and its layer has no methods but forward.
_PARTS = {
    "token_permutation": DISPATCH,
    "token_dispatch": DISPATCH,
    "dispatch_postprocess": DISPATCH,
    "token_unpermutation": COMBINE,
    "combine_preprocess": COMBINE,
    "token_combine": COMBINE,
}
_LAYER_METHODS = ("forward", "dispatch", "experts_compute", "routed_experts_compute", "combine")
_SHARED_METHODS = ("pre_forward_comm", "post_forward_comm")


@dataclass
class _Scope:
    """What the collectives that are called now belong to."""

    config: CommConfig
    site: str
    hidden: Callable[[torch.Tensor], bool]  # whether this is what is to be compressed
    calls: int = 0  # of collectives
    taken: int = 0


_layer: torch.nn.Module | None = None  # the hooked MoELayer that runs now
_scope: _Scope | None = None


def takes(module: torch.nn.Module) -> bool:
    if isinstance(module, MoELayer):
        return module.token_dispatcher.tp_size * module.token_dispatcher.ep_size > 1
    return isinstance(module, shared_experts.SharedExpertMLP) and (
        module.config.moe_shared_expert_overlap or type(module).__name__ == FUSED
    )


def messages(module: torch.nn.Module, site: str, config: CommConfig) -> list[str]:
    if not isinstance(module, MoELayer):
        if type(module).__name__ == FUSED and config.selects(site + SHARED):
            raise ModelError(
                f"{site + SHARED} is a {FUSED}, which reduces around Transformer Engine's fused operations: leave out "
                "use_grouped_gemm_for_shared_expert, or leave the site out (--lowbit-comm-sites)"
            )
        return [site + SHARED]
    sent = [site + DISPATCH, site + COMBINE]
    if _covered(type(module.token_dispatcher)):
        return sent
    if any(config.selects(each) for each in sent):
        kind = type(module.token_dispatcher)
        inference = kind.__module__.endswith("token_dispatcher_inference")  # of inference_optimized, from 0.17 on
        option = "--transformer-impl local" if inference else "--moe-token-dispatcher-type alltoall or allgather"
        raise ModelError(
            f"{site} has a {kind.__name__}, which communicates where this patch cannot reach: use {option}, or leave "
            "its sites out (--lowbit-comm-sites)"
        )
    return []


def wrappers() -> list[tuple]:
    found = [(MoELayer, name, _running) for name in _LAYER_METHODS if hasattr(MoELayer, name)]
    for kind in _DISPATCHERS:
        found += [(kind, name, _sending(suffix)) for name, suffix in _PARTS.items() if name in vars(kind)]
    shared = shared_experts.SharedExpertMLP
    found += [(shared, name, _sharing) for name in _SHARED_METHODS]
    for module in (token_dispatcher, shared_experts):
        found += [(module, name, wrap) for name, wrap in _COLLECTIVES.items() if hasattr(module, name)]
    return found


@functools.cache
def _covered(kind: type) -> bool:
    """Whether a dispatcher's methods are those that are wrapped; newer ones derive from them and send otherwise."""
    owners = (next((k for k in kind.__mro__ if name in vars(k)), None) for name in _PARTS if hasattr(kind, name))
    return issubclass(kind, _DISPATCHERS) and all(
        owner in (*_DISPATCHERS, token_dispatcher.MoETokenDispatcher) for owner in owners
    )


def _running(base):
    """A method of MoELayer: what its dispatcher sends now belongs to this layer."""

    def method(self, *args, **kwargs):
        global _layer
        if (config := config_of(self)) is None:
            return base(self, *args, **kwargs)
        messages(self, self.__dict__.get("lowbit_site", UNNAMED), config)  # a dispatcher may have been swapped since
        outer, _layer = _layer, self
        try:
            return base(self, *args, **kwargs)
        finally:
            _layer = outer

    return method


def _sending(suffix: str):
    """A method of a dispatcher that is given hidden states, and probabilities or not."""

    def wrapper(base):
        def method(self, hidden, *args, **kwargs):
            if _layer is None or _layer.token_dispatcher is not self:
                return base(self, hidden, *args, **kwargs)
            width, given = hidden.shape[-1], (*args, *kwargs.values())

            def is_hidden(x: torch.Tensor) -> bool:
                return (
                    x.is_floating_point()
                    and x.dim() == 2
                    and x.shape[-1] == width
                    and not any(x is other for other in given)
                )

            scope = _Scope(config_of(_layer), site_of(_layer, UNNAMED, suffix), is_hidden)
            out = _within(scope, base, self, hidden, *args, **kwargs)
            if scope.calls and not scope.taken:
                raise ModelError(
                    f"{scope.site}: {type(self).__name__}.{base.__name__} communicated, but no hidden "
                    f"states [tokens, {width}] were seen: leave the site out (--lowbit-comm-sites)"
                )
            return out

        return method

    return wrapper


def _sharing(base):
    """A method of the shared experts that communicates; it runs within a dispatcher's."""

    def method(self, *args, **kwargs):
        config = config_of(self)
        scope = None if config is None else _Scope(config, site_of(self, UNNAMED, SHARED), lambda x: True)
        return _within(scope, base, self, *args, **kwargs)

    return method


def _within(scope: _Scope | None, function: Callable, *args, **kwargs):
    global _scope
    outer, _scope = _scope, scope
    try:
        return function(*args, **kwargs)
    finally:
        _scope = outer


def _taken(x: torch.Tensor) -> _Scope | None:
    """The scope, if x is to be compressed."""
    if _scope is None:
        return None
    _scope.calls += 1
    if not _scope.hidden(x):
        return None
    _scope.taken += 1
    return _scope


def _all_to_all(base):
    def all_to_all(group, input_, output_splits=None, input_splits=None, **kwargs):
        if (scope := _taken(input_)) is None or group.size() == 1:
            return base(group, input_, output_splits, input_splits, **kwargs)
        return collectives.all_to_all(input_, group, scope.config, scope.site, output_splits, input_splits)

    return all_to_all


def _gather(base):
    def gather(input_, *, group=None, output_split_sizes=None, **kwargs):
        if (scope := _taken(input_)) is None or (among := _group(group)).size() == 1:
            return base(input_, group=group, output_split_sizes=output_split_sizes, **kwargs)
        return collectives.all_gather(input_, among, scope.config, scope.site, output_split_sizes)

    return gather


def _reduce_scatter(base):
    def reduce_scatter(input_, *, group=None, input_split_sizes=None, **kwargs):
        if (scope := _taken(input_)) is None or (among := _group(group)).size() == 1:
            return base(input_, group=group, input_split_sizes=input_split_sizes, **kwargs)
        return collectives.reduce_scatter(input_, among, scope.config, scope.site, input_split_sizes)

    return reduce_scatter


def _reduce(base):
    def reduce(input_, *args, **kwargs):
        if (scope := _taken(input_)) is None or (group := _group(*args, **kwargs)).size() == 1:
            return base(input_, *args, **kwargs)
        return collectives.all_reduce(input_, group, scope.config, scope.site)

    return reduce


_COLLECTIVES = {
    "all_to_all": _all_to_all,
    "gather_from_sequence_parallel_region": _gather,
    "reduce_scatter_to_sequence_parallel_region": _reduce_scatter,
    "reduce_from_tensor_model_parallel_region": _reduce,
}


def _group(group: dist.ProcessGroup | None = None) -> dist.ProcessGroup:
    return group if group is not None else parallel_state.get_tensor_model_parallel_group()
