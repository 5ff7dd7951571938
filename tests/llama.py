"""A tiny random Llama for the tests, as Transformers makes it."""

from __future__ import annotations

import torch


def tiny_llama(seed: int = 7, **changes) -> torch.nn.Module:
    """2 layers, hidden size 32, 4 heads, intermediate size 48, 61 tokens; biases that are not zero if asked for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    model = LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model
