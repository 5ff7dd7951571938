"""Gradients through a compressed collective: those of the exact one, as if nothing had been rounded.

Hazard: torch.compile must not trace a collective. It can, into the buffers that the communicator's calls share, and
what Inductor made of that for a second shape was garbage (torch 2.13). So the graph breaks here, and `fullgraph=True`
is an error.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Map = Callable[[torch.Tensor], torch.Tensor]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, collective: Map, gradient: Map) -> torch.Tensor:
        ctx.gradient = gradient
        return collective(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return ctx.gradient(grad), None, None


@torch.compiler.disable
def straight_through(x: torch.Tensor, collective: Map, gradient: Map) -> torch.Tensor:
    """collective(x). gradient: of the output -> of x, exactly."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _StraightThrough.apply(x, collective, gradient)
    return collective(x)
