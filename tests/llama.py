"""A tiny random Llama for the tests, as Transformers makes it."""

from __future__ import annotations

import torch

from tests.models import SIZES


def tiny_llama(seed: int = 7, **changes) -> torch.nn.Module:
    """2 layers, hidden size 32, 4 heads, intermediate size 48, 61 tokens; biases that are not zero if asked for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(SIZES | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model
