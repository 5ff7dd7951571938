"""What differs between releases of Megatron-Core, found by looking and never by version number."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer

try:
    from megatron.core.ssm.mamba_layer import MambaLayer
except ImportError:  # its mixer's packages, or a release without it
    MambaLayer = None

LAYERS: tuple[type, ...] = tuple(kind for kind in (TransformerLayer, MambaLayer) if kind is not None)


def group_of(module: torch.nn.Module) -> dist.ProcessGroup:
    """The tensor-parallel group of a linear layer; before 0.14 layers do not know theirs."""
    return getattr(module, "tp_group", None) or parallel_state.get_tensor_model_parallel_group()
