"""Tiny Megatron-Core models for the tests. Every function runs inside a rank: Megatron is imported there only."""

from __future__ import annotations

import torch

HIDDEN, HEADS, VOCAB, LENGTH, BATCH = 64, 4, 96, 8, 2


class Norm(torch.nn.LayerNorm):
    """A LayerNorm that takes part in sequence parallelism, which Megatron's own over torch refuses to do."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)


def start(tp: int, pp: int = 1) -> None:
    """Megatron's parallel state, and what it needs on a machine without CUDA."""
    from megatron.core import parallel_state

    from megatron_lowbit.engines.megatron import init_tensor_parallel
    from megatron_lowbit.patches import megatron_cpu

    megatron_cpu.enable()
    if pp > 1 and not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tp, pp, create_gloo_process_groups=False)
    init_tensor_parallel(tp)


def settings(tp: int, layers: int = 2, kind: type | None = None, **changes):
    """A TransformerConfig, or one of another kind."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnBackend

    sizes = {
        "num_layers": layers,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": 128,
        "num_attention_heads": HEADS,
        "add_bias_linear": False,
        "tensor_model_parallel_size": tp,
        "use_cpu_initialization": True,
        "attention_backend": AttnBackend.local,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "pipeline_dtype": torch.float32,
    }
    return (kind or TransformerConfig)(**(sizes | changes))


def gpt(config, spec=None, **changes):
    """A GPTModel in evaluation mode, with filled weights. `spec`: of a layer; the local one if it is not given."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    spec = spec or get_gpt_layer_local_spec(normalization="LayerNorm")
    if config.sequence_parallel:
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = Norm
        spec = TransformerBlockSubmodules([spec] * config.num_layers, layer_norm=Norm)
    options = {"vocab_size": VOCAB, "max_sequence_length": 32, "position_embedding_type": "rope"}
    return fill(GPTModel(config, spec, **(options | changes)).eval())


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Weights that depend on nothing but their order and this rank's shard of them; norms keep theirs."""
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    for index, parameter in enumerate(model.parameters()):
        split = getattr(parameter, "tensor_model_parallel", False)
        generator = torch.Generator().manual_seed(100 * index + (rank if split else 0))
        if parameter.ndim > 1:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, positions, mask) of a batch."""
    ids = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) * 5 % VOCAB
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return ids, torch.arange(LENGTH).expand_as(ids), mask


def logits(model: torch.nn.Module) -> torch.Tensor:
    """[batch, sequence, vocabulary]"""
    if model.config.sequence_parallel:  # 0.12 does not gather logits then
        return torch.cat(gathered(model(*tokens())), -1)
    return model(*tokens(), runtime_gather_output=True)


def gathered(x: torch.Tensor) -> list[torch.Tensor]:
    """All ranks' x, exactly."""
    parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, x.contiguous())
    return parts


def refused(function, *args, **kwargs) -> str:
    """The message of the LowBitError that function(...) raises."""
    from megatron_lowbit import LowBitError

    try:
        function(*args, **kwargs)
    except LowBitError as error:
        return str(error)
    return "no error"
