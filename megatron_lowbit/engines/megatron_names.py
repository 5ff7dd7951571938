"""Where Megatron keeps a tensor: on which pipeline stage, under which name, in which file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .hf_model import ModelConfig
from .weights import Weight, weights

LOCAL, ENGINE = "local", "transformer_engine"
FUSED_NORMS = {  # Transformer Engine keeps a norm with the linear layer behind it, but for experts
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # in place of an iteration: there is no optimizer to load


def placed(config: ModelConfig, pp: int, implementation: str) -> Iterator[tuple[int, str, Weight]]:
    """(stage, name on that stage, tensor) of every tensor; with several stages tied embeddings are on two."""
    for weight in weights(config):
        name = weight.name
        if implementation == ENGINE:
            for ours, theirs in FUSED_NORMS.items():
                if not (config.experts and theirs.startswith("mlp")):
                    name = name.replace(f".{ours}", f".{theirs}")
        _, layer, rest = name.partition("decoder.layers.")
        if layer:
            index, _, tail = rest.partition(".")
            stage, local = divmod(int(index), config.layers // pp)
            yield stage, f"{layer}{local}.{tail}", weight
        elif name.startswith("embedding."):
            yield 0, name, weight
            if config.tied and pp > 1:
                yield pp - 1, "output_layer.weight", weight
        else:
            yield pp - 1, name, weight


def rank_file(folder: Path, iteration: str, rank: int, stage: int, pp: int) -> Path:
    """The file of one tensor-parallel rank of one stage."""
    name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
    return folder / iteration / name / "model_optim_rng.pt"
