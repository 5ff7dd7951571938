"""Every tensor of a model: Megatron's name for it, what Hugging Face keeps it in, and how the ranks share it.

Megatron packs what Hugging Face keeps apart: per key-value group `[queries…, key, value]` into `linear_qkv`, and per
rank `[gate, up]` into `linear_fc1`. The rotary layout is the same, so no rows are permuted. A cut goes both ways:
`split` makes one rank's tensor from Hugging Face's, `join` makes those again from all ranks' tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..errors import ModelError
from .hf_model import ModelConfig, query_groups

Read = Callable[..., torch.Tensor]
"""(Hugging Face name, start, stop, dim) -> those rows or columns, as `Checkpoint.read`."""


@dataclass(frozen=True)
class Ranks:
    """How many ranks share a model, and to how many rows its vocabulary is padded."""

    tp: int
    vocab: int


@dataclass(frozen=True)
class Weight:
    """One Megatron tensor. `sources`: Hugging Face names and shapes, in the order in which they are packed."""

    name: str
    sources: dict[str, tuple[int, ...]]
    cut: type[Whole]
    absent: bool = False  # Megatron has it, Hugging Face has not: all zero

    def split(self, read: Read, config: ModelConfig, ranks: Ranks, rank: int) -> torch.Tensor:
        """What rank `rank` of `ranks` holds."""
        return self.cut(self, config, ranks).split(self._zeros if self.absent else read, rank)

    def _zeros(self, name: str, start: int = 0, stop: int | None = None, dim: int = 0) -> torch.Tensor:
        return torch.zeros(self.sources[name])[start:stop]  # of one dimension: only biases are ever absent

    def join(self, parts: Sequence[torch.Tensor], config: ModelConfig, ranks: Ranks) -> dict[str, torch.Tensor]:
        """All ranks' parts, in rank order -> the Hugging Face tensors. ModelError if copies differ."""
        for part in parts:
            if part.shape != parts[0].shape:
                raise ModelError(f"{self.name} is {list(parts[0].shape)} on rank 0, {list(part.shape)} on another")
        joined = dict(zip(self.sources, self.cut(self, config, ranks).join(parts), strict=True))
        if self.absent and any(tensor.any() for tensor in joined.values()):
            raise ModelError(f"{self.name} is not zero, and Hugging Face's model has no {' or '.join(joined)}")
        return {} if self.absent else joined


@dataclass(frozen=True)
class Whole:
    """Every rank holds all of it."""

    weight: Weight
    config: ModelConfig
    ranks: Ranks

    def split(self, read: Read, rank: int) -> torch.Tensor:
        return read(*self.weight.sources)

    def join(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if any(not torch.equal(part, parts[0]) for part in parts):
            raise ModelError(f"{self.weight.name} is not the same on all ranks; convert the model again")
        return [parts[0]]

    def _rows(self, read: Read, name: str, rank: int) -> torch.Tensor:
        step = self.weight.sources[name][0] // self.ranks.tp
        return read(name, rank * step, (rank + 1) * step)


class Rows(Whole):
    """Output features; several sources lie behind each other in each rank's part, as `[gate, up]`."""

    def split(self, read: Read, rank: int) -> torch.Tensor:
        return torch.cat([self._rows(read, name, rank) for name in self.weight.sources])

    def join(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        pieces = [part.chunk(len(self.weight.sources)) for part in parts]
        return [torch.cat(each) for each in zip(*pieces, strict=True)]


class Columns(Whole):
    """Input features, of a row-parallel layer."""

    def split(self, read: Read, rank: int) -> torch.Tensor:
        ((name, shape),) = self.weight.sources.items()
        step = shape[1] // self.ranks.tp
        return read(name, rank * step, (rank + 1) * step, 1)

    def join(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat(list(parts), dim=1)]


class Vocabulary(Whole):
    """Rows for tokens; those that only fill the vocabulary up are zero."""

    def split(self, read: Read, rank: int) -> torch.Tensor:
        step = self.ranks.vocab // self.ranks.tp
        part = read(*self.weight.sources, rank * step, (rank + 1) * step)
        return torch.cat([part, part.new_zeros(step - len(part), part.shape[1])])

    def join(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat(list(parts))[: self.config.vocab]]


class GroupedHeads(Whole):
    """Queries, keys and values by group. Where groups outnumber key-value heads, neighbours hold copies of one."""

    @property
    def _groups(self) -> int:
        return query_groups(self.config, self.ranks.tp)

    def split(self, read: Read, rank: int) -> torch.Tensor:
        queries, *others = self.weight.sources
        count, size = self._groups // self.ranks.tp, self.config.head_dim
        heads = [(rank * count + i) * self.config.kv_heads // self._groups for i in range(count)]
        parts = [self._rows(read, queries, rank).unflatten(0, (count, -1))]
        for name in others:
            span = read(name, heads[0] * size, (heads[-1] + 1) * size).unflatten(0, (-1, size))
            parts.append(span[[head - heads[0] for head in heads]])
        return torch.cat(parts, dim=1).flatten(0, 1)

    def join(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        size, per_group = self.config.head_dim, self.config.heads // self._groups
        packed = torch.cat(list(parts)).unflatten(0, (self._groups, -1))
        queries, *others = packed.split([per_group * size, size, size], dim=1)
        kept = []
        for copies in (each.unflatten(0, (self.config.kv_heads, -1)) for each in others):
            if any(not torch.equal(copies[:, i], copies[:, 0]) for i in range(copies.shape[1])):
                raise ModelError(f"{self.weight.name}: copies of a key-value head differ; convert the model again")
            kept.append(copies[:, 0].flatten(0, 1))
        return [queries.flatten(0, 1), *kept]


def weights(config: ModelConfig) -> Iterator[Weight]:
    """Every tensor of the model, in the order of the forward pass."""
    vocab = (config.vocab, config.hidden)
    yield Weight("embedding.word_embeddings.weight", {"model.embed_tokens.weight": vocab}, Vocabulary)
    for index in range(config.layers):
        for weight in _layer(config, f"model.layers.{index}"):
            yield replace(weight, name=f"decoder.layers.{index}.{weight.name}")
    yield Weight("decoder.final_layernorm.weight", {"model.norm.weight": (config.hidden,)}, Whole)
    if not config.tied:
        yield Weight("output_layer.weight", {"lm_head.weight": vocab}, Vocabulary)


def _layer(config: ModelConfig, hf: str) -> Iterator[Weight]:
    hidden, queries, keys = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim
    qkv = {f"{hf}.self_attn.{x}_proj": rows for x, rows in zip("qkv", (queries, keys, keys))}
    for ours, theirs in config.family.norms.items():
        yield Weight(f"{ours}.weight", {f"{hf}.{theirs}.weight": (hidden,)}, Whole)
    yield Weight(
        "self_attention.linear_qkv.weight", {f"{x}.weight": (rows, hidden) for x, rows in qkv.items()}, GroupedHeads
    )
    every = config.attention_bias or config.mlp_bias  # Megatron has all biases or none, but for add_qkv_bias
    if every or config.family.qkv_bias:
        sources = {f"{x}.bias": (rows,) for x, rows in qkv.items()}
        absent = not (config.attention_bias or config.family.qkv_bias)
        yield Weight("self_attention.linear_qkv.bias", sources, GroupedHeads, absent)
    if config.family.qk_norm:
        for x in "qk":
            name = f"{hf}.self_attn.{x}_norm.weight"
            yield Weight(f"self_attention.{x}_layernorm.weight", {name: (config.head_dim,)}, Whole)
    output = f"{hf}.self_attn.o_proj"
    yield Weight("self_attention.linear_proj.weight", {f"{output}.weight": (hidden, queries)}, Columns)
    if every:
        sources = {f"{output}.bias": (hidden,)}
        yield Weight("self_attention.linear_proj.bias", sources, Whole, not config.attention_bias)
    if config.experts:
        moe = f"{hf}.block_sparse_moe"
        yield Weight("mlp.router.weight", {f"{moe}.gate.weight": (config.experts, hidden)}, Whole)
        for expert in range(config.experts):
            names = [f"{moe}.experts.{expert}.{w}" for w in ("w1", "w3", "w2")]
            yield from _mlp(config, f"mlp.experts.local_experts.{expert}", *names)
    else:
        yield from _mlp(config, "mlp", *(f"{hf}.mlp.{x}_proj" for x in ("gate", "up", "down")))


def _mlp(config: ModelConfig, ours: str, gate: str, up: str, down: str) -> Iterator[Weight]:
    hidden, inner = config.hidden, config.intermediate
    yield Weight(f"{ours}.linear_fc1.weight", {f"{x}.weight": (inner, hidden) for x in (gate, up)}, Rows)
    yield Weight(f"{ours}.linear_fc2.weight", {f"{down}.weight": (hidden, inner)}, Columns)
    if config.attention_bias or config.mlp_bias:
        absent = not config.mlp_bias
        yield Weight(f"{ours}.linear_fc1.bias", {f"{x}.bias": (inner,) for x in (gate, up)}, Rows, absent)
        yield Weight(f"{ours}.linear_fc2.bias", {f"{down}.bias": (hidden,)}, Whole, absent)


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the Hugging Face checkpoint must hold."""
    found = [weight for weight in weights(config) if not weight.absent]
    return {name: shape for weight in found for name, shape in weight.sources.items()}


def shards(
    config: ModelConfig, read: Read, ranks: Ranks, rank: int
) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Megatron's names, each with a function that reads rank `rank`'s part of it."""
    for weight in weights(config):
        yield weight.name, partial(weight.split, read, config, ranks, rank)
