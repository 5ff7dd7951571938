"""Layers that Megatron-Core's local spec lacks: windows and caps for attention, rope scalings, Gemma 2's norms.

Thin: each is Megatron's own class with one part replaced. In the releases before 0.15 local attention refuses windows,
in later ones it makes their mask on "cuda", so models with windows are built with the attention of this file.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer

from ..errors import ModelError
from .hf_model import ROPE_NUMBERS, ModelConfig


class MaskedSoftmax(torch.nn.Module):
    """Scores [batch, heads, queries, keys] -> probabilities of the same dtype, computed in fp32.

    The queries are the last of the keys. Each sees itself and the tokens before it, at most `window` in all, except
    where `mask` is True. With `cap` scores become cap * tanh(scores / cap) first.
    """

    def __init__(self, window: int | None, cap: float | None) -> None:
        super().__init__()
        self.window, self.cap = window, cap

    def forward(self, scores: torch.Tensor, mask: torch.Tensor | None, *offset: None) -> torch.Tensor:
        queries, keys = scores.shape[-2:]
        wide = scores.float()
        if self.cap is not None:
            wide = self.cap * torch.tanh(wide / self.cap)
        key = torch.arange(keys, device=scores.device)
        query = key[keys - queries :, None]
        hidden = key > query
        if self.window is not None:
            hidden = hidden | (key <= query - self.window)
        if mask is not None:
            hidden = hidden | mask
        return wide.masked_fill(hidden, torch.finfo(torch.float32).min).softmax(-1).to(scores.dtype)


class ZeroCenteredRMSNorm(torch.nn.Module):
    """RMS norm that multiplies by 1 + weight, in fp32; any shape [..., hidden_size], the dtype stays."""

    def __init__(self, config: Any, hidden_size: int, eps: float, **unused: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight.float())).to(x)


class GemmaLayer(TransformerLayer):
    """Megatron's layer with norms behind attention and MLP, and tanh-approximated gelu for its activation.

    The first one scales the embeddings by sqrt(hidden_size), which no layer spec can do elsewhere.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.activation_func, config.bias_activation_fusion = partial(F.gelu, approximate="tanh"), False
        super().__init__(config, *args, **kwargs)
        sizes = {"hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        self.post_self_attn_layernorm = ZeroCenteredRMSNorm(config, **sizes)
        self.post_mlp_layernorm = ZeroCenteredRMSNorm(config, **sizes)
        self.self_attn_bda = _behind(self.post_self_attn_layernorm, self.self_attn_bda)
        self.mlp_bda = _behind(self.post_mlp_layernorm, self.mlp_bda)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.layer_number == 1:
            scale = torch.tensor(self.config.hidden_size**0.5, dtype=hidden_states.dtype)
            hidden_states = hidden_states * scale.to(hidden_states.device)
        return super().forward(hidden_states, *args, **kwargs)


def _behind(norm: torch.nn.Module, add: Callable) -> Callable:
    """Megatron's function that adds (output, bias) to the residual, with `norm` over the output first."""

    def with_norm(training: bool, fused: bool) -> Callable:
        plain = add(training, fused)

        def step(output_and_bias: tuple, residual: torch.Tensor, dropout: float) -> torch.Tensor:
            output, bias = output_and_bias
            return plain((norm(output if bias is None else output + bias), None), residual, dropout)

        return step

    return with_norm


def attention(model: ModelConfig) -> type[DotProductAttention]:
    """Megatron's local attention with this model's windows, cap and scale of the scores."""

    class Attention(DotProductAttention):
        def __init__(self, config: Any, layer_number: int, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, layer_number, *args, **kwargs)
            window = model.windows[layer_number - 1] if model.windows else None  # counted from 1, over all stages
            self.scale_mask_softmax = MaskedSoftmax(window, model.attention_cap)
            if model.query_scale is not None:
                self.softmax_scale = model.query_scale

    return Attention


def rotary(model: ModelConfig, base: type[SelfAttention]) -> type[SelfAttention]:
    """`base` that scales the unscaled angles that it is given as this model's rope asks."""
    plain = model.rope_theta ** -(torch.arange(0, model.head_dim, 2).double() / model.head_dim)
    if model.rope_type == "linear":
        ratio = torch.full_like(plain, 1 / model.rope["factor"])
    else:
        factor, low, high, positions = (model.rope[name] for name in ROPE_NUMBERS["llama3"])
        turns = positions * plain / (2 * math.pi)  # over the original positions: few turns are stretched, many are not
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        ratio = kept + (1 - kept) / factor
    ratio = torch.cat([ratio, ratio]).float()

    class Attention(base):
        def forward(self, *args: Any, rotary_pos_emb: torch.Tensor | None = None, **kwargs: Any) -> Any:
            if rotary_pos_emb is None:  # so with flash decoding, whose angles come as cosines
                raise ModelError(f"rope scaling {model.rope_type} needs angles: build the model without flash decoding")
            return super().forward(*args, rotary_pos_emb=rotary_pos_emb * ratio.to(rotary_pos_emb.device), **kwargs)

    return Attention


class StaticAttention(SelfAttention):
    """Megatron's self-attention, for a core attention that kernels of dynamic batching and flash decoding leave out."""

    def forward(self, *args: Any, inference_context: Any = None, **kwargs: Any) -> Any:
        if self.config.flash_decode or (inference_context is not None and not inference_context.is_static_batching()):
            raise ModelError(
                "windows and caps of attention are for static batching only, and dynamic batching or flash decoding "
                "would compute without them: use the static engine (--use-legacy-static-engine where Megatron-LM has "
                "it), without --flash-decode"
            )
        return super().forward(*args, inference_context=inference_context, **kwargs)


def layer_spec(config: ModelConfig, stages: int = 1, rope: bool = False) -> ModuleSpec | TransformerBlockSubmodules:
    """What GPTModel takes as `transformer_layer_spec`, on each of `stages` pipeline stages.

    Megatron's local spec, changed where the family asks for it. With `rope`, the layers scale the angles of a model
    that was built without rope scaling, if it needs any that Megatron's scripts lack.
    """
    layers = config.layers // stages
    experts = {"num_experts": config.experts, "moe_grouped_gemm": False} if config.experts else {}
    spec = get_gpt_layer_local_spec(qk_layernorm=config.family.qk_norm, normalization="RMSNorm", **experts)
    own = spec.submodules.self_attention
    if config.needs_own_layers:
        own.module, own.submodules.core_attention = StaticAttention, attention(config)
    if rope and config.needs_own_rotary:
        own.module = rotary(config, own.module)
    if not config.family.gemma:
        return spec
    spec.module = GemmaLayer
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = ZeroCenteredRMSNorm
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=ZeroCenteredRMSNorm)
