"""A Hugging Face model folder as a Megatron-Core `GPTModel`, sharded over the tensor-parallel ranks.

Only this rank's part of each tensor is read, from safetensors; nothing is unpickled. What the families differ in:
`families.py`; which tensor goes where: `weights.py`; layers that Megatron lacks: `megatron_layers.py`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import ConfigError, ModelError
from .hf_model import DTYPES, Checkpoint, ModelConfig, check_tensor_parallel, query_groups, read_config
from .weights import Ranks, shards


def build(config: ModelConfig, dtype: torch.dtype) -> torch.nn.Module:
    """An uninitialised `GPTModel` (local spec) on the CPU. Its vocabulary is padded to a multiple of the TP size."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnBackend

    from .megatron_layers import layer_spec

    tp = parallel_state.get_tensor_model_parallel_world_size()
    experts = {
        "num_moe_experts": config.experts,
        "moe_ffn_hidden_size": config.intermediate,
        "moe_router_topk": config.experts_per_token,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",  # the others want CUDA
    }
    transformer = TransformerConfig(
        num_layers=config.layers,
        hidden_size=config.hidden,
        ffn_hidden_size=config.intermediate,
        num_attention_heads=config.heads,
        num_query_groups=query_groups(config, tp),
        kv_channels=config.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        qk_layernorm=config.family.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=config.attention_bias or config.mlp_bias,  # all or none; absent biases stay zero
        add_qkv_bias=config.family.qkv_bias,
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
        **(experts if config.experts else {}),
    )
    if config.experts:
        from megatron.core.transformer.moe import moe_utils

        if not hasattr(moe_utils, "te_general_gemm"):  # 0.13 to 0.16 ask for it, also without Transformer Engine
            moe_utils.te_general_gemm = None
    model = GPTModel(
        config=transformer,
        transformer_layer_spec=layer_spec(config),
        vocab_size=-(-config.vocab // tp) * tp,
        max_sequence_length=config.max_positions,
        share_embeddings_and_output_weights=config.tied,
        position_embedding_type="rope",
        rotary_base=config.rope_theta,
        seq_len_interpolation_factor=config.rope["factor"] if config.rope_type == "linear" else None,
    )
    if config.logit_cap is not None:
        model.output_layer.register_forward_hook(functools.partial(_cap, config.logit_cap))
    if config.rope_type == "llama3":  # GPTModel's own switch fixes three of the four numbers
        rotary = model.rotary_pos_emb
        rotary.inv_freq = rotary._apply_scaling(rotary.inv_freq, **config.rope)
    return model.to(dtype)


def _cap(cap: float, module: torch.nn.Module, inputs: Any, output: tuple) -> tuple:
    """Logits -> cap * tanh(logits / cap), as they leave the output layer."""
    logits, bias = output
    return cap * torch.tanh(logits / cap), bias


def load_model(
    folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", progress: bool = False
) -> torch.nn.Module:
    """This rank's shard of the model in `folder`: a Megatron `GPTModel` in evaluation mode, without gradients.

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
    plan = list(shards(config, checkpoint.read, Ranks(tp, model.vocab_size), rank))
    with torch.no_grad():
        for name, read in tqdm(plan, desc="loading", unit="tensor", disable=None if progress and rank == 0 else True):
            parameters.pop(name).copy_(read())
    if parameters:
        raise ModelError(
            f"{folder}: nothing to load into {', '.join(parameters)}; Megatron-Core's GPTModel has changed"
        )
    return model.to(device).requires_grad_(False).eval()
