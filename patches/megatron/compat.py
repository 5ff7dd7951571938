"""What differs between releases of Megatron-Core, found by looking and never by version number."""

from __future__ import annotations

from importlib import import_module

import torch
import torch.distributed as dist
from megatron.core import parallel_state


def _known(*names: str) -> tuple[type, ...]:
    """The classes "module:Class" of megatron.core that there are, and whose own requirements are installed."""
    found: list[type] = []
    for name in names:
        module, _, kind = name.partition(":")
        try:
            found.append(getattr(import_module(f"megatron.core.{module}"), kind))
        except (ImportError, AttributeError):  # of another release, or of packages that are not here
            continue
    return tuple(found)


LAYERS = _known("transformer.transformer_layer:TransformerLayer", "ssm.mamba_layer:MambaLayer")
MTP_LAYERS = _known("transformer.multi_token_prediction:MultiTokenPredictionLayer")
MODELS = _known(
    "models.gpt.gpt_model:GPTModel",
    "models.bert.bert_model:BertModel",
    "models.T5.t5_model:T5Model",
    "models.hybrid.hybrid_model:HybridModel",  # the name of MambaModel from 0.19 on, which remains as a subclass
    "models.mamba.mamba_model:MambaModel",
)


def group_of(module: torch.nn.Module) -> dist.ProcessGroup:
    """The tensor-parallel group of a layer; before 0.14 linear layers do not know theirs."""
    return getattr(module, "tp_group", None) or parallel_state.get_tensor_model_parallel_group()
