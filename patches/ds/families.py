"""Families that DeepSpeed's tensor parallelism breaks, mended before it shards them.

Each repair changes a transformer layer in place so that it computes the same, with or without DeepSpeed, whatever part
of its weights it is left with:

- GPT-2 has Conv1D, whose weights lie the other way round, and one of them for query, key and value side by side, which
  DeepSpeed cuts across. They become one nn.Linear each.
- Phi-3 asks the config, which knows all heads, where the query ends. It asks a config that knows the rank's heads.
- BLOOM, and Falcon with alibi, add biases of all heads to the scores of the rank's own. The biases are cut.
- Falcon's older multi-query attention has one key and value behind all queries. They are kept whole on every rank.

Hazard: a layer forgets the names of its parameters (GPT-2, Falcon). Load weights before, never after.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from megatron_lowbit.errors import ModelError


def repair(model: nn.Module) -> None:
    """Mend every layer that needs it. Doing it again changes nothing. Raises ModelError for what cannot be mended."""
    for layer in list(model.modules()):
        if (mend := _REPAIRS.get(type(layer).__name__)) and "lowbit_repaired" not in vars(layer):
            mend(layer)
            layer.lowbit_repaired = True


def is_linear(module: nn.Module) -> bool:
    """Whether it is an unsharded linear layer, of either orientation."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def in_features(module: nn.Module) -> int:
    return module.weight.shape[0] if _is_conv1d(module) else module.in_features


def shares_key_and_value(config: Any) -> bool:
    """Whether all queries share one key and value, which then are not split: Falcon-7B."""
    return bool(getattr(config, "multi_query", False)) and not getattr(config, "new_decoder_architecture", False)


def fuses_query_and_key(model: nn.Module) -> bool:
    """Whether one linear layer makes query, key and value, as Falcon's and Phi-3's do."""
    return any(path.endswith(("query_key_value", "qkv_proj")) for path, _ in model.named_modules())


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and getattr(module, "weight", None) is not None


class SideBySide(nn.Module):
    """Several linear layers as one, whose output has theirs next to each other."""

    def __init__(self, parts: Iterable[nn.Linear]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)  # their names must not say c_attn, which DeepSpeed takes for a fused layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


class QueryAndShared(nn.Module):
    """A linear layer of which the last rows belong to all ranks. DeepSpeed splits what is an nn.Linear, and no more."""

    def __init__(self, whole: nn.Linear, queries: int) -> None:
        super().__init__()
        bias = whole.bias
        self.query = _linear(whole.weight[:queries], None if bias is None else bias[:queries])
        self.shared_weight = _parameter(whole.weight[queries:])
        self.shared_bias = None if bias is None else _parameter(bias[queries:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.query(x), linear(x, self.shared_weight, self.shared_bias)], dim=-1)


class _LocalConfig:
    """The config of a layer with some of the heads, to everyone who only looks at its attributes."""

    def __init__(self, config: Any, attention: nn.Module) -> None:
        self._config, self._attention = config, attention

    @property
    def num_attention_heads(self) -> int:
        return self._attention.o_proj.weight.shape[1] // self._attention.head_dim

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask before __init__ ran
            raise AttributeError(name)
        return getattr(vars(self)["_config"], name)


def _gpt2(block: nn.Module) -> None:
    for attention in (block.attn, getattr(block, "crossattention", None)):
        if attention is not None:
            conv = attention.c_attn
            widths = conv.weight.shape[1] // attention.embed_dim
            biases = conv.bias.chunk(widths)
            attention.c_attn = SideBySide(map(_linear, conv.weight.t().chunk(widths), biases))
            attention.register_forward_pre_hook(_set_split_size)
    for path, module in list(block.named_modules()):
        if _is_conv1d(module):
            parent, _, name = path.rpartition(".")
            setattr(block.get_submodule(parent), name, _linear(module.weight.t(), module.bias))
    block.__class__ = _renamed(type(block))  # of GPT2Block itself DeepSpeed expects Conv1D


def _set_split_size(attention: nn.Module, args: tuple) -> None:
    attention.split_size = attention.c_attn.parts[0].weight.shape[0]


@functools.cache
def _renamed(kind: type[nn.Module]) -> type[nn.Module]:
    """Another class that is the same."""
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _phi3(layer: nn.Module) -> None:
    attention, config = layer.self_attn, layer.self_attn.config
    expected = config.hidden_size // config.num_attention_heads
    if attention.head_dim != expected:
        raise ModelError(
            f"Phi-3 with heads of {attention.head_dim} features: DeepSpeed cuts qkv_proj into heads of hidden size / "
            f"heads = {expected}; use Transformers' own tensor parallelism"
        )
    attention.config = _LocalConfig(config, attention)


def _bloom(block: nn.Module) -> None:
    # With this switch, dense layers are computed without being called. It is there to repeat a training's rounding.
    block.self_attention.slow_but_exact = block.mlp.slow_but_exact = False
    block.self_attention.register_forward_pre_hook(_keep_own_heads, with_kwargs=True)


def _falcon(layer: nn.Module) -> None:
    attention = layer.self_attention
    if shares_key_and_value(attention.config):
        attention.query_key_value = QueryAndShared(attention.query_key_value, attention.hidden_size)
        attention.register_forward_pre_hook(_set_one_key)
        # DeepSpeed splits the queries by this number, which has no other meaning here
        attention.config.num_kv_heads = attention.config.num_attention_heads
    attention.register_forward_pre_hook(_keep_own_heads, with_kwargs=True)


def _set_one_key(attention: nn.Module, args: tuple) -> None:
    attention.num_kv_heads = 1  # DeepSpeed divides it among the ranks


def _keep_own_heads(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Of alibi, [batch * heads, 1, keys] or [batch, heads, 1, keys], and of the mask made with it, the rank's heads."""
    alibi, mask, own = kwargs.get("alibi"), kwargs.get("attention_mask"), attention.num_heads
    if alibi is None:
        return None
    batch = args[0].shape[0]
    heads = alibi.shape[1] if alibi.dim() == 4 else alibi.shape[0] // batch
    if heads == own:
        return None
    start = torch.distributed.get_rank(attention.dense.mp_group) * own
    each = alibi.reshape(batch, heads, *alibi.shape[-2:])[:, start : start + own]
    kwargs = kwargs | {"alibi": each.reshape(*((batch, own) if alibi.dim() == 4 else (batch * own,)), *each.shape[-2:])}
    if mask is not None and mask.dim() == 4 and mask.shape[1] == heads:
        kwargs["attention_mask"] = mask[:, start : start + own]
    return args, kwargs


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """nn.Linear with a copy of weight [out, in] and bias [out]"""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight, made.bias = _parameter(weight), None if bias is None else _parameter(bias)
    return made


def _parameter(part: torch.Tensor) -> nn.Parameter:
    copy = part.detach().clone(memory_format=torch.contiguous_format)
    return nn.Parameter(copy, requires_grad=part.requires_grad)


_REPAIRS = {"GPT2Block": _gpt2, "Phi3DecoderLayer": _phi3, "BloomBlock": _bloom, "FalconDecoderLayer": _falcon}
