"""FastGen (DeepSpeed inference v2): its models of ragged batches, whose parameters lie in no layer modules.

The model's own method runs one transformer layer, by number, and calls `deepspeed.comm.all_reduce` for the attention
and for the MLP or the experts; Phi and Falcon, whose attention runs beside the MLP, once for both. Those calls are
answered while the method runs. Messages are [tokens, hidden]. Embeddings and logits are gathered, not summed, and stay
exact.

FastGen's kernels are CUDA only. The tests run its own methods on CPU, with matrix products in place of the kernels.
"""

from __future__ import annotations

import functools

import torch

from megatron_lowbit.config import CommConfig

from .answered import Sums, answered

_METHODS = "_forward_transformer_layer", "_forward_transformer"  # most models have the first, some the second
_BESIDE = {"PhiInferenceModel", "FalconInferenceModel"}
_MOE = "DSMoETransformerModelBase"


def takes(module: torch.nn.Module) -> bool:
    return _is(type(module), {"DSInferenceModelBase"}) and _method(type(module)) is not None


def group_of(module: torch.nn.Module) -> object:
    return module._base_mp_group


def messages(module: torch.nn.Module, site: str, config: CommConfig) -> list[str]:
    return [site for layer in range(module.num_layers) for site in _sites(type(module), layer)]


@functools.cache
def lowbit_class(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """`kind` with compressed communication, as module.lowbit_config says."""
    name = _method(kind)
    base = getattr(kind, name)

    @functools.wraps(base)
    def layer(self, layer_idx: int, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        sums = Sums(self.lowbit_config, _sites(kind, layer_idx))
        with answered("all_reduce", sums):
            out = base(self, layer_idx, *args, **kwargs)
        sums.verify()
        return out

    return type(
        f"LowBit{kind.__name__}", (kind,), {"__module__": kind.__module__, "__doc__": kind.__doc__, name: layer}
    )


def _sites(kind: type, layer: int) -> list[str]:
    last = f"layers.{layer}.moe.combine" if _is(kind, {_MOE}) else f"layers.{layer}.mlp"
    return [last] if _is(kind, _BESIDE) else [f"layers.{layer}.attention", last]


def _method(kind: type) -> str | None:
    return next((name for name in _METHODS if hasattr(kind, name)), None)


def _is(kind: type, names: set[str]) -> bool:
    """By name: FastGen's modules are imported when its engine is made, and not for others."""
    return any(
        base.__name__ in names and base.__module__.startswith("deepspeed.inference.v2.") for base in kind.__mro__
    )
