"""What tells one family of Hugging Face models from another, as data: a row here is all that a family needs.

Every family is a stack of [norm, attention, norm, MLP or experts] over a vocabulary, with RMS norms, rotary positions
and gated activations; a row says what differs. `hf_model.py` reads config.json with it, `weights.py` lists the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Raw = Mapping[str, Any]
"""The object in config.json."""


def _always(raw: Raw, layer: int) -> bool:
    return True


def _from_max_window_layers(raw: Raw, layer: int) -> bool:
    return bool(raw.get("use_sliding_window")) and layer >= raw.get("max_window_layers", 28)


def _every_other(raw: Raw, layer: int) -> bool:
    return layer % 2 == 0


@dataclass(frozen=True)
class Family:
    """One row. `windowed` matters only where config.json has a `sliding_window` and no `layer_types`."""

    title: str
    windowed: Callable[[Raw, int], bool] | None = None  # None: config.json's sliding_window means nothing
    activation: str = "silu"
    qkv_bias: bool = False  # always; where config.json says it, with the output's: attention_bias
    qk_norm: bool = False  # of each head's query and key
    experts: bool = False
    gemma: bool = False  # norms by 1 + w, norms behind attention and MLP too, scaled embeddings, capped scores
    norms: Mapping[str, str] = field(  # Megatron's name -> Hugging Face's
        default_factory=lambda: {
            "input_layernorm": "input_layernorm",
            "pre_mlp_layernorm": "post_attention_layernorm",
        }
    )
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what config.json may leave out


FAMILIES = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral", windowed=_always),
    "mixtral": Family(
        "Mixtral",
        windowed=_always,
        experts=True,
        defaults={"rms_norm_eps": 1e-5, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen2": Family("Qwen2", windowed=_from_max_window_layers, qkv_bias=True),
    "qwen3": Family("Qwen3", windowed=_from_max_window_layers, qk_norm=True, defaults={"head_dim": 128}),
    "gemma2": Family(
        "Gemma 2",
        windowed=_every_other,
        activation="gelu_pytorch_tanh",
        gemma=True,
        norms={
            "input_layernorm": "input_layernorm",
            "post_self_attn_layernorm": "post_attention_layernorm",
            "pre_mlp_layernorm": "pre_feedforward_layernorm",
            "post_mlp_layernorm": "post_feedforward_layernorm",
        },
        defaults={
            "tie_word_embeddings": True,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
        },
    ),
}
"""`model_type` of config.json -> its family."""
