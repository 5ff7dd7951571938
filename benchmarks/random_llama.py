"""A Hugging Face folder with a Llama of random weights, in bf16, for those who measure time and not what is said.

It has the tokenizer of examples/model, as engines want one; its tokens may be others than the vocabulary's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_lowbit.engines.hf_model import read_config
from megatron_lowbit.engines.weights import expected_tensors

TOKENIZER = Path(__file__).resolve().parents[1] / "examples" / "model"


def write(folder: Path, *, layers: int, hidden: int, heads: int, ffn: int, vocab: int, positions: int) -> None:
    """Into an empty folder. Raises ModelError for sizes that make no model."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
        "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": heads,
        "intermediate_size": ffn, "vocab_size": vocab, "max_position_embeddings": positions, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, shape in expected_tensors(read_config(folder)).items():
        norm = len(shape) == 1
        tensors[name] = torch.ones(shape) if norm else torch.randn(shape, generator=generator) * 0.02
    bf16 = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(bf16, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
