"""Tiny random models of every family, as Transformers makes them: no weight of them is 0 or 1."""

from __future__ import annotations

import torch

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
FAMILIES = {  # what the family's own settings are in the tests: windows shorter than the tests' 24 tokens, small caps
    "llama": {},
    "mistral": {"sliding_window": 7},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {
        "head_dim": 16,
        "sliding_window": 7,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
    },
}


def random_model(family: str, seed: int = 7, **changes) -> torch.nn.Module:
    """2 layers, hidden size 32, 4 heads, 2 key-value heads, 61 tokens; `changes` are the config's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(SIZES | FAMILIES[family] | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif parameter.std() < 0.01:  # what the family's own initialisation leaves at zero
                parameter.normal_(std=0.2)
    return model
