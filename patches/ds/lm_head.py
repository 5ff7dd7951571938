"""The output head, whose input DeepSpeed splits unasked, so that the logits are summed. Exact unless asked for by name.

The logits decide the next token. `CommConfig(sites=("layers.*", "logits"))` asks for them, a bare "*" does not. They
are [batch, sequence, vocabulary], whole on every rank.
"""

from __future__ import annotations

import torch

from megatron_lowbit.config import CommConfig
from megatron_lowbit.patches._handle import asks_for
from megatron_lowbit.patches.hf.sites import LOGITS

from .row_parallel import HEADS, group_of, lowbit_class

__all__ = ["group_of", "lowbit_class", "messages", "takes"]


def takes(module: torch.nn.Module) -> bool:
    return isinstance(module, HEADS)


def messages(module: torch.nn.Module, site: str, config: CommConfig) -> list[str]:
    return [LOGITS] if asks_for(config, LOGITS) else []
