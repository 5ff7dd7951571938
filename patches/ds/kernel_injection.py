"""Layers of kernel injection, `replace_with_kernel_inject=True`: their attention, MLP and experts, CUDA or Triton.

They call `deepspeed.comm.all_reduce`, which is answered while one of them runs. The attention and the experts sum plain
partial products. The MLP does not: every rank first adds its N-th part of the residual stream (`residual_add_func`), so
that one sum makes the new residual. Quantizing that would round the residual of every layer anew. So the residual's
part is computed with zeros in place of the partial product, which travels alone, and both are added behind the sum:
new residual = N * part + sum. A layer whose attention runs beside its MLP (GPT-J) sums both at once, at the MLP's site.

DeepSpeed builds these layers on CUDA only. The tests run its own classes on CPU, with its own fallbacks of the kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from deepspeed.comm import get_world_size

from megatron_lowbit.communicator import communicator
from megatron_lowbit.config import CommConfig
from megatron_lowbit.errors import ModelError

from .answered import Sums, answered

# By name: the Triton classes import a Triton that not every machine has.
_PACKAGE = "deepspeed.ops.transformer.inference."
_ATTENTIONS = {"DeepSpeedSelfAttention", "TritonSelfAttention"}
_MLPS = {"DeepSpeedMLP", "TritonMLP"}
_EXPERTS = {"DeepSpeedMoEMLP"}


def takes(module: torch.nn.Module) -> bool:
    return _is(type(module), _ATTENTIONS | _MLPS | _EXPERTS)


def group_of(module: torch.nn.Module) -> object:
    return module.mp_group


def messages(module: torch.nn.Module, site: str, config: CommConfig) -> list[str]:
    """The sites of what the module sums: none for an attention whose sum the MLP makes."""
    if _is(type(module), _EXPERTS):
        layer = site.rpartition(".")[0]
        return [f"{layer}.moe.experts"]
    if _is(type(module), _ATTENTIONS) and not module.config.mlp_after_attn:
        return []
    return [site]


@functools.cache
def lowbit_class(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """`kind` with compressed communication, as module.lowbit_config says, at module.lowbit_sites[0]."""
    base = _MLP if _is(kind, _MLPS) else _Plain
    return type(f"LowBit{kind.__name__}", (base, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _is(kind: type, names: set[str]) -> bool:
    return any(base.__name__ in names and base.__module__.startswith(_PACKAGE) for base in kind.__mro__)


class _Plain:
    def forward(self, *args, **kwargs) -> object:
        sums = Sums(self.lowbit_config, self.lowbit_sites)
        with answered("all_reduce", sums):
            out = super().forward(*args, **kwargs)
        sums.verify()
        return out


class _MLP:
    def forward(self, *args, **kwargs) -> torch.Tensor:
        split = _Split(self)
        self.__dict__["residual_add_func"] = split.add  # found before the submodule of that name
        try:
            with answered("all_reduce", split.sum):
                out = super().forward(*args, **kwargs)
        finally:
            del self.__dict__["residual_add_func"]
        split.verify()
        return out


class _Split:
    """One MLP's sum, taken apart into the residual's part, alike on all ranks, and the partial product."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module, self._partial, self._summed = module, None, False
        self._add: Callable = module.residual_add_func

    def add(self, *, hidden_state: torch.Tensor, attention_output: torch.Tensor, **others) -> torch.Tensor:
        self._partial, zeros = hidden_state, torch.zeros_like(hidden_state)
        if not self._module.config.mlp_after_attn:  # the attention's output is a partial product, too
            if others.get("attention_bias") is None and others.get("final_bias") is None:
                raise ModelError(
                    f"{self._module.lowbit_sites[0]} adds its attention without a bias, and DeepSpeed then scales what "
                    "is a partial product: leave its site out of CommConfig(sites=...), or disable() this patch"
                )
            self._partial, attention_output = hidden_state + attention_output, torch.zeros_like(attention_output)
        return self._add(hidden_state=zeros, attention_output=attention_output, **others)

    def sum(self, part: torch.Tensor, op: object = None, group: object = None, **_) -> None:
        """In place of `deepspeed.comm.all_reduce(part)`."""
        module, self._summed = self._module, True
        total = communicator(group, module.lowbit_config).all_reduce(self._partial, module.lowbit_sites[0])
        part.copy_(part.float() * get_world_size(group) + total.float())

    def verify(self) -> None:
        if not self._summed:
            raise ModelError(
                f"{self._module.lowbit_sites[0]} did not communicate as in DeepSpeed 0.16 to 0.19: disable() this patch"
            )
