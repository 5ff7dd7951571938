"""A Hugging Face Llama folder as a Megatron-Core `GPTModel`, sharded over the tensor-parallel ranks.

Only this rank's part of each tensor is read, from safetensors; nothing is unpickled. Megatron packs tensors that
Hugging Face keeps apart: per key-value group `[queries…, key, value]` into `linear_qkv`, and per rank `[gate, up]` into
`linear_fc1`. The rotary layout is the same, so no rows are permuted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from ..errors import ConfigError, ModelError
from .hf_llama import DTYPES, Checkpoint, LlamaConfig, check_tensor_parallel, read_config


def shards(config: LlamaConfig, checkpoint: Checkpoint, rank: int, tp: int) -> Iterator[tuple[str, Callable]]:
    """Megatron parameter names, each with a function that reads rank `rank`'s part of it (fp32, fp16 or bf16)."""
    read, groups = checkpoint.read, config.kv_heads // tp

    def whole(name: str) -> Callable:
        return lambda: read(name)

    def rows(name: str) -> Callable:
        return lambda: read(name, 0, rank, tp)

    def columns(name: str) -> Callable:
        return lambda: read(name, 1, rank, tp)

    def qkv(layer: str, kind: str) -> Callable:
        names = [f"{layer}.self_attn.{x}_proj.{kind}" for x in "qkv"]

        def packed() -> torch.Tensor:
            parts = [read(name, 0, rank, tp).unflatten(0, (groups, -1)) for name in names]
            return torch.cat(parts, dim=1).flatten(0, 1)

        return packed

    def gate_up(layer: str, kind: str) -> Callable:
        names = [f"{layer}.mlp.{x}_proj.{kind}" for x in ("gate", "up")]
        return lambda: torch.cat([read(name, 0, rank, tp) for name in names])

    yield "embedding.word_embeddings.weight", rows("model.embed_tokens.weight")
    for i in range(config.layers):
        ours, theirs = f"decoder.layers.{i}", f"model.layers.{i}"
        yield f"{ours}.input_layernorm.weight", whole(f"{theirs}.input_layernorm.weight")
        yield f"{ours}.self_attention.linear_qkv.weight", qkv(theirs, "weight")
        yield f"{ours}.self_attention.linear_proj.weight", columns(f"{theirs}.self_attn.o_proj.weight")
        yield f"{ours}.pre_mlp_layernorm.weight", whole(f"{theirs}.post_attention_layernorm.weight")
        yield f"{ours}.mlp.linear_fc1.weight", gate_up(theirs, "weight")
        yield f"{ours}.mlp.linear_fc2.weight", columns(f"{theirs}.mlp.down_proj.weight")
        if config.attention_bias:
            yield f"{ours}.self_attention.linear_qkv.bias", qkv(theirs, "bias")
            yield f"{ours}.self_attention.linear_proj.bias", whole(f"{theirs}.self_attn.o_proj.bias")
        if config.mlp_bias:
            yield f"{ours}.mlp.linear_fc1.bias", gate_up(theirs, "bias")
            yield f"{ours}.mlp.linear_fc2.bias", whole(f"{theirs}.mlp.down_proj.bias")
    yield "decoder.final_layernorm.weight", whole("model.norm.weight")
    if not config.tied:
        yield "output_layer.weight", rows("lm_head.weight")


def build(config: LlamaConfig, dtype: torch.dtype) -> torch.nn.Module:
    """An uninitialised `GPTModel` (local spec) on the CPU. Its vocabulary is padded to a multiple of the TP size."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnBackend

    tp = parallel_state.get_tensor_model_parallel_world_size()
    transformer = TransformerConfig(
        num_layers=config.layers,
        hidden_size=config.hidden,
        ffn_hidden_size=config.intermediate,
        num_attention_heads=config.heads,
        num_query_groups=config.kv_heads,
        kv_channels=config.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=config.attention_bias or config.mlp_bias,  # all or none; absent biases stay zero
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        attention_backend=AttnBackend.local,  # the engine then passes a mask instead of making one on "cuda"
        tensor_model_parallel_size=tp,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    model = GPTModel(
        config=transformer,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=-(-config.vocab // tp) * tp,
        max_sequence_length=config.max_positions,
        share_embeddings_and_output_weights=config.tied,
        position_embedding_type="rope",
        rotary_base=config.rope_theta,
        seq_len_interpolation_factor=config.rope["factor"] if config.rope_type == "linear" else None,
    )
    if config.rope_type == "llama3":  # GPTModel's own switch fixes three of the four numbers
        rotary = model.rotary_pos_emb
        rotary.inv_freq = rotary._apply_scaling(rotary.inv_freq, **config.rope)
    return model.to(dtype)


def load_llama(
    folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", progress: bool = False
) -> torch.nn.Module:
    """This rank's shard of the Llama in `folder`: a Megatron `GPTModel` in evaluation mode, without gradients.

    Megatron's parallel state must be initialised; without CUDA, `patches.megatron_cpu` must be enabled. `dtype` is
    fp32, fp16 or bf16, by default the checkpoint's. The logits' last dimension is the vocabulary padded to a multiple
    of the TP size. With `progress`, TP rank 0 shows a bar. Raises `ModelError` for a folder that cannot be loaded,
    `ConfigError` for another dtype.
    """
    from megatron.core import parallel_state
    from tqdm import tqdm

    if dtype not in (None, *DTYPES.values()):
        raise ConfigError(f"dtype {dtype} is not supported; supported: {', '.join(map(str, DTYPES.values()))}")
    rank = parallel_state.get_tensor_model_parallel_rank()
    tp = parallel_state.get_tensor_model_parallel_world_size()
    config = read_config(folder)
    check_tensor_parallel(config, tp)
    checkpoint = Checkpoint(folder, config)
    model = build(config, dtype or checkpoint.dtype)
    parameters = dict(model.named_parameters())
    plan = list(shards(config, checkpoint, rank, tp))
    with torch.no_grad():
        for name, read in tqdm(plan, desc="loading", unit="tensor", disable=None if progress and rank == 0 else True):
            parameter, part = parameters.pop(name), read()
            parameter[: len(part)].copy_(part)
            parameter[len(part) :].zero_()  # vocabulary padding
        for name, parameter in parameters.items():  # biases that this Llama does not have
            if not name.endswith(".bias"):
                raise ModelError(f"{folder}: nothing to load into {name}; Megatron-Core's GPTModel has changed")
            parameter.zero_()
    return model.to(device).requires_grad_(False).eval()
