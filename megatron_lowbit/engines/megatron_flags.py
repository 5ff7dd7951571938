"""The command line with which Megatron-LM's scripts build a converted model, and what they cannot be told.

The same facts go into the checkpoint as the namespace that `--use-checkpoint-args` reads, which is how a script learns
the padded size of the vocabulary: by itself it would derive that from the tokenizer, which may know fewer tokens.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from .hf_model import MEGATRON_LLAMA3, ModelConfig, query_groups
from .megatron_names import LOCAL

SPEC = ("megatron_lowbit.engines.megatron_spec", "spec")


@dataclass(frozen=True)
class Layout:
    """How a checkpoint is cut and written."""

    tp: int
    pp: int = 1
    dtype: str = "float32"
    divisible_by: int = 128  # Megatron's --make-vocab-size-divisible-by
    implementation: str = LOCAL  # Megatron's --transformer-impl

    def vocab(self, config: ModelConfig) -> int:
        """The vocabulary as Megatron pads it."""
        step = self.divisible_by * self.tp
        return -(-config.vocab // step) * step


def needs_spec(config: ModelConfig, layout: Layout) -> bool:
    """Whether a script needs `--spec` of this package; Transformer Engine has windows of its own."""
    return layout.implementation == LOCAL and (config.needs_own_layers or config.needs_own_rotary)


def arguments(config: ModelConfig, layout: Layout) -> dict[str, object]:
    """Megatron's arguments by their names in `args`; True stands for a flag without a value."""
    found: dict[str, object] = {
        "num_layers": config.layers,
        "hidden_size": config.hidden,
        "ffn_hidden_size": config.intermediate,
        "num_attention_heads": config.heads,
        "group_query_attention": True,
        "num_query_groups": query_groups(config, layout.tp),
        "kv_channels": config.head_dim,
        "seq_length": config.max_positions,
        "max_position_embeddings": config.max_positions,
        "position_embedding_type": "rope",
        "rotary_base": int(config.rope_theta),
        "rotary_percent": 1.0,
        "normalization": "RMSNorm",
        "norm_epsilon": config.norm_eps,
        "swiglu": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "make_vocab_size_divisible_by": layout.divisible_by,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "transformer_impl": layout.implementation,
    }
    if not config.tied:
        found["untie_embeddings_and_output_weights"] = True
    if config.family.qkv_bias:
        found["add_qkv_bias"] = True
    if config.family.qk_norm:
        found["qk_layernorm"] = True
    if config.rope_type == "llama3" and not config.needs_own_rotary:
        found["use_rope_scaling"] = True
    if config.experts:
        found |= {
            "num_experts": config.experts,
            "moe_router_topk": config.experts_per_token,
            "moe_ffn_hidden_size": config.intermediate,
            "moe_router_load_balancing_type": "none",
        }
    if config.windows and not needs_spec(config, layout):
        found["window_size"] = f"{max(filter(None, config.windows)) - 1},0"  # how far back, not how many
        if None in config.windows:
            found["window_attn_skip_freq"] = "[" + ",".join(str(int(bool(w))) for w in config.windows) + "]"
    if layout.dtype in ("bfloat16", "float16"):
        found["bf16" if layout.dtype == "bfloat16" else "fp16"] = True
    return found


def command_line(config: ModelConfig, layout: Layout, folder: Path) -> str:
    """One line of flags for Megatron-LM's scripts, to be used as $(cat megatron_args.txt)."""
    words = []
    for name, value in arguments(config, layout).items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    if not (config.attention_bias or config.mlp_bias):
        words.append("--disable-bias-linear")
    if layout.implementation == LOCAL:
        words += ["--no-persist-layer-norm", "--attention-softmax-in-fp32"]
    if needs_spec(config, layout):
        words += ["--spec", *SPEC]
    words += ["--load", str(folder), "--use-checkpoint-args", "--ckpt-format", "torch", "--no-load-optim"]
    words += ["--no-load-rng", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder / "hf")]
    return " ".join(words)


def namespace(config: ModelConfig, layout: Layout) -> argparse.Namespace:
    """What the checkpoint holds as `args`: numbers, strings and truths only."""
    said = arguments(config, layout)
    for name in ("window_size", "window_attn_skip_freq"):  # spelt otherwise there, and not read from it
        said.pop(name, None)
    return argparse.Namespace(
        **said,
        **{name: False for name in ("untie_embeddings_and_output_weights", "add_qkv_bias") if name not in said},
        add_bias_linear=config.attention_bias or config.mlp_bias,
        add_position_embedding=True,
        use_rotary_position_embeddings=False,
        rotary_interleaved=False,
        squared_relu=False,
        apply_layernorm_1p=False,
        apply_query_key_layer_scaling=False,
        padded_vocab_size=layout.vocab(config),
        tokenizer_type="HuggingFaceTokenizer",
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )


def limits(config: ModelConfig, layout: Layout) -> list[str]:
    """What Megatron-LM's own scripts would compute otherwise than the model does, in sentences."""
    found = []
    if config.needs_own_rotary and not needs_spec(config, layout):
        found.append(
            f"its rope scaling is {config.rope_type} {config.rope}, and scripts know only llama3 {MEGATRON_LLAMA3}: "
            "convert with --transformer-impl local, whose spec takes care of it"
        )
    if config.rope_theta != int(config.rope_theta):
        found.append(f"its rotary base is {config.rope_theta}, and Megatron-LM's --rotary-base is a whole number")
    if config.logit_cap is not None:
        found.append(
            f"its logits are capped at {config.logit_cap}, which no spec can do: greedy text is the same, "
            "probabilities are not"
        )
    if needs_spec(config, layout):
        found.append(
            f"its layers are not all Megatron's: megatron_lowbit must be importable for --spec {' '.join(SPEC)}"
            + (", and engines must batch statically (--use-legacy-static-engine)" if config.needs_own_layers else "")
        )
    return found
