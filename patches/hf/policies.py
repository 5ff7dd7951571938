"""Which layers of a family of Transformers models make partial sums, and what their sites are called: a row a family.

A path in `rows` is that of a layer within its transformer layer, with "*" for one part of it; the value is the end of
its site's name. Rows that a model does not have (experts of a dense layer, another release's spelling) do no harm: an
expert is a module of its own in Transformers 4 ("mlp.experts.3.down_proj"), all of a layer's are one in 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LLAMA_LIKE = {"self_attn.o_proj": "attention", "mlp.down_proj": "mlp"}
# Transformers 5 keeps all experts of a layer in two tensors, and sums a token's chosen ones before they are reduced.
FUSED_EXPERTS = {"mlp.experts": "moe.combine"}
NEOX_LIKE = {"mlp.dense_4h_to_h": "mlp"}


@dataclass(frozen=True)
class Policy:
    """One row of the table."""

    title: str
    layers: tuple[str, ...]  # names of the classes of transformer layers
    rows: Mapping[str, str] = field(default_factory=lambda: LLAMA_LIKE)


POLICIES = {
    "llama": Policy("Llama", ("LlamaDecoderLayer",)),
    "mistral": Policy("Mistral", ("MistralDecoderLayer",)),
    "mixtral": Policy(
        "Mixtral",
        ("MixtralDecoderLayer",),
        {"self_attn.o_proj": "attention", **FUSED_EXPERTS, "block_sparse_moe.experts.*.w2": "moe.experts"},
    ),
    "qwen2": Policy("Qwen2, Qwen2.5", ("Qwen2DecoderLayer",)),
    "qwen2_moe": Policy(
        "Qwen2-MoE",
        ("Qwen2MoeDecoderLayer",),
        LLAMA_LIKE
        | FUSED_EXPERTS
        | {"mlp.shared_expert.down_proj": "moe.shared_experts", "mlp.experts.*.down_proj": "moe.experts"},
    ),
    "qwen3": Policy("Qwen3", ("Qwen3DecoderLayer",)),
    "qwen3_moe": Policy(
        "Qwen3-MoE",
        ("Qwen3MoeDecoderLayer",),
        LLAMA_LIKE | FUSED_EXPERTS | {"mlp.experts.*.down_proj": "moe.experts"},
    ),
    "gemma": Policy("Gemma", ("GemmaDecoderLayer",)),
    "gemma2": Policy("Gemma 2", ("Gemma2DecoderLayer",)),
    "gemma3_text": Policy("Gemma 3", ("Gemma3DecoderLayer",)),
    "phi3": Policy("Phi-3", ("Phi3DecoderLayer",)),
    "opt": Policy("OPT", ("OPTDecoderLayer",), {"self_attn.out_proj": "attention", "fc2": "mlp"}),
    "gpt2": Policy(
        "GPT-2",
        ("GPT2Block",),
        {"attn.c_proj": "attention", "crossattention.c_proj": "cross_attention", "mlp.c_proj": "mlp"},
    ),
    "gpt_neox": Policy("GPT-NeoX", ("GPTNeoXLayer",), {"attention.dense": "attention"} | NEOX_LIKE),
    "gptj": Policy("GPT-J", ("GPTJBlock",), {"attn.out_proj": "attention", "mlp.fc_out": "mlp"}),
    "bloom": Policy("BLOOM", ("BloomBlock",), {"self_attention.dense": "attention"} | NEOX_LIKE),
    "falcon": Policy("Falcon", ("FalconDecoderLayer",), {"self_attention.dense": "attention"} | NEOX_LIKE),
    "starcoder2": Policy(
        "StarCoder2", ("Starcoder2DecoderLayer",), {"self_attn.o_proj": "attention", "mlp.c_proj": "mlp"}
    ),
    "t5": Policy(
        "T5",
        ("T5Block",),
        {
            "layer.*.SelfAttention.o": "attention",
            "layer.*.EncDecAttention.o": "cross_attention",
            "layer.*.DenseReluDense.wo": "mlp",
        },
    ),
    "bert": Policy(
        "BERT",
        ("BertLayer",),
        {
            "attention.output.dense": "attention",
            "crossattention.output.dense": "cross_attention",
            "output.dense": "mlp",
        },
    ),
}
"""`model_type` of config.json, or of the text part in it -> its policy."""
