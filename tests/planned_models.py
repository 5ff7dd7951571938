"""Tiny random models of the families that Transformers has a tensor-parallel plan for, one folder each."""

from __future__ import annotations

import os
from pathlib import Path

import torch

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SHARED = _MOE | {"shared_expert_intermediate_size": 24}
_HEADS = {"head_dim": 16, "query_pre_attn_scalar": 24}
FAMILIES = {  # name here: (model_type, settings of its own)
    "llama": ("llama", {"num_key_value_heads": 2}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 7, "num_key_value_heads": 2}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3 biased": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen2_moe": ("qwen2_moe", _SHARED),
    "qwen3_moe": ("qwen3_moe", _MOE | {"head_dim": 16}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", _HEADS | {"sliding_window": 7, "final_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", _HEADS | {"sliding_window": 7}),
    "phi3": ("phi3", {}),
    "gpt_neox": ("gpt_neox", {}),
    "starcoder2": ("starcoder2", {"use_bias": True}),
}


def sharded(model: torch.nn.Module) -> str | None:
    """What the second sum of a layer is called, None if this release of Transformers does not shard what makes it."""
    plan = type(model.config).base_model_tp_plan
    if "experts" not in str(model.config):
        return "mlp"
    if "layers.*.mlp.experts" in plan:
        return "moe.combine"
    return "moe.experts" if any(".experts.*." in key for key in plan) else None


def runs(name: str) -> bool:
    """Whether this release of Transformers can run the family on two ranks itself: 5.0 fails at experts."""
    from transformers import AutoConfig

    return "gather" not in AutoConfig.for_model(FAMILIES[name][0]).base_model_tp_plan.values()


def save(folder: Path, *names: str, **changes) -> None:
    """Write the models of these families to folder/NAME, the same at every call."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for name in names:
        kind, own = FAMILIES[name]
        torch.manual_seed(7)
        config = AutoConfig.for_model(kind, **(SIZES | own | changes))
        model = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):
                    parameter.normal_(std=0.3)
                elif "norm" in key:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder / name)


def load(folder: str, world: int, plan: dict | None = None, **options) -> torch.nn.Module:
    """The model of that folder, sharded over all ranks as this release of Transformers does it, without gradients."""
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if world == 1:
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    os.environ["LOCAL_RANK"] = os.environ["RANK"]  # torchrun sets it
    try:
        from transformers.distributed import DistributedConfig

        distributed = {"distributed_config": DistributedConfig(tp_size=world, tp_plan=plan)}
    except (ImportError, TypeError):
        distributed = {"tp_plan": plan or "auto"}
    return AutoModelForCausalLM.from_pretrained(folder, **distributed, **options).eval()
