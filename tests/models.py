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

# Families that Megatron's tests do not need, and how their config.json differs. Names with a suffix are variants.
_UNGROUPED = {"num_key_value_heads": None}  # what a family does not know DeepSpeed would believe
MORE_FAMILIES = {
    "qwen2_moe": {
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 40,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    "gemma": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 24},
    "phi3": {"pad_token_id": 0, "sliding_window": 9},
    "opt": _UNGROUPED | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2},
    "gpt2": _UNGROUPED | {"n_positions": 64},
    "gpt_neox": _UNGROUPED,
    "gptj": _UNGROUPED | {"n_positions": 64, "rotary_dim": 4},
    "bloom": _UNGROUPED,
    "falcon": _UNGROUPED | {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "falcon-7b": _UNGROUPED | {"new_decoder_architecture": False, "multi_query": True, "alibi": False},
    "falcon-rw": _UNGROUPED
    | {
        "new_decoder_architecture": False,
        "multi_query": False,
        "alibi": True,
        "parallel_attn": False,
        "bias": True,
    },
    "starcoder2": {"sliding_window": 7},
    "t5": _UNGROUPED
    | {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "initializer_factor": 0.2,
    },
    "bert": _UNGROUPED,
}
EVERY_FAMILY = FAMILIES | MORE_FAMILIES


def fused_experts() -> bool:
    """Whether this Transformers keeps all experts of a layer in one module, as 5 does."""
    from transformers.models.mixtral import modeling_mixtral

    return hasattr(modeling_mixtral, "MixtralExperts") and not issubclass(
        modeling_mixtral.MixtralExperts, torch.nn.ModuleList
    )


def site_names(family: str) -> list[str]:
    """The sites of `random_model(family)`, those of experts included, in the order of its modules."""
    experts = "moe.combine" if fused_experts() else "moe.experts"
    if family == "qwen2_moe":  # whose second layer is dense here
        first = [f"layers.0.{part}" for part in ("attention", experts, "moe.shared_experts")]
        return [*first, "layers.1.attention", "layers.1.mlp"]
    parts = ["attention", experts if family in ("mixtral", "qwen3_moe") else "mlp"]
    if family == "t5":
        encoder = [f"encoder.layers.{layer}.{part}" for layer in range(2) for part in parts]
        return encoder + [f"layers.{i}.{part}" for i in range(2) for part in ("attention", "cross_attention", "mlp")]
    return [f"layers.{layer}.{part}" for layer in range(2) for part in parts]


def random_model(family: str, seed: int = 7, **changes) -> torch.nn.Module:
    """2 layers, hidden size 32, 4 heads, 2 key-value heads, 61 tokens; `changes` are the config's.

    With its head: causal, masked (BERT) or sequence-to-sequence (T5).
    """
    import transformers

    torch.manual_seed(seed)
    kind = family.split("-")[0]
    config = transformers.AutoConfig.for_model(kind, **(SIZES | EVERY_FAMILY[family] | changes))
    heads = {"bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}
    head = getattr(transformers, heads.get(kind, "AutoModelForCausalLM"))
    model = head.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif parameter.std() < 0.01:  # what the family's own initialisation leaves at zero
                parameter.normal_(std=0.2)
    return model
