"""A Hugging Face Llama folder as it lies on disk: its config and its safetensors, checked before anything is built.

Tensors are read slice by slice, so a rank reads only its own part; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import ModelError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROPE_NUMBERS = {  # rope type: the numbers config.json must give with it
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


INTEGERS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class LlamaConfig:
    """The parts of a Llama `config.json` that shape the model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    norm_eps: float
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    rope_theta: float
    rope_type: str
    rope: dict[str, float]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `ModelError` when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); download the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not an object; download the model again")
    return value


def read_config(folder: str | Path) -> LlamaConfig:
    """Reads and checks `config.json`, in the spelling of Transformers 4 or 5.

    Raises `ModelError` when the folder or the file is missing, or the model is not a Llama this loader can build.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ModelError(f"model {folder} is a file; give the folder of a Hugging Face model")
    if not folder.is_dir():
        raise ModelError(f"model folder {folder} does not exist; give the path of a downloaded Hugging Face model")
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json; give the folder of a Hugging Face model")
    raw = read_json(path)
    if raw.get("model_type") != "llama":
        raise ModelError(f"{path}: model_type {raw.get('model_type')!r} is not supported; supported: 'llama'")
    if raw.get("quantization_config"):
        raise ModelError(f"{path}: quantized weights are not supported; use an fp32, fp16 or bf16 checkpoint")
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{path}: hidden_act {raw['hidden_act']!r} is not supported; supported: 'silu'")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ModelError(
            f"{path}: the rotary embedding's parameters are {rope!r}, not an object; download the model again"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(
            f"{path}: partial_rotary_factor {rope['partial_rotary_factor']} is not supported; supported: 1.0"
        )
    for name in INTEGERS:
        value = raw.get(name)
        if name in raw and value is not None and (type(value) is not int or value < 1):
            raise ModelError(f"{path}: {name} is {value!r}, not a whole number above 0; download the model again")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ROPE_NUMBERS:
        raise ModelError(f"{path}: rope type {rope_type!r} is not supported; supported: {', '.join(ROPE_NUMBERS)}")
    try:
        heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
        return LlamaConfig(
            layers=raw["num_hidden_layers"],
            hidden=hidden,
            intermediate=raw["intermediate_size"],
            heads=heads,
            kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or hidden // heads,
            vocab=raw["vocab_size"],
            max_positions=raw.get("max_position_embeddings", 2048),
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            tied=raw.get("tie_word_embeddings", False),
            attention_bias=raw.get("attention_bias", False),
            mlp_bias=raw.get("mlp_bias", False),
            rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
            rope_type=rope_type,
            rope={name: float(rope[name]) for name in ROPE_NUMBERS[rope_type]},
        )
    except KeyError as error:
        raise ModelError(f"{path} lacks {error}; download the model again") from error
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path} holds a value of the wrong kind ({error}); download the model again") from error


def check_tensor_parallel(config: LlamaConfig, tp: int) -> None:
    """Raises `ModelError` unless `tp` ranks can share the heads, key-value heads and intermediate features evenly."""
    sizes = {
        "attention heads": config.heads,
        "key-value heads": config.kv_heads,
        "intermediate features": config.intermediate,
    }
    uneven = [f"{size} {what}" for what, size in sizes.items() if tp < 1 or size % tp]
    if uneven:
        common = math.gcd(*sizes.values())
        possible = [str(n) for n in range(1, common + 1) if common % n == 0]
        raise ModelError(f"TP={tp} does not divide {' and '.join(uneven)}; possible TP sizes: {', '.join(possible)}")


def expected_tensors(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor the checkpoint must hold."""
    hidden, queries, keys = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (config.intermediate, hidden),
        "mlp.up_proj": (config.intermediate, hidden),
        "mlp.down_proj": (hidden, config.intermediate),
    }
    tensors = {"model.embed_tokens.weight": (config.vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.tied:
        tensors["lm_head.weight"] = (config.vocab, hidden)
    for layer in (f"model.layers.{i}" for i in range(config.layers)):
        tensors |= {f"{layer}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
        for name, shape in linears.items():
            tensors[f"{layer}.{name}.weight"] = shape
            if config.attention_bias if name.startswith("self_attn") else config.mlp_bias:
                tensors[f"{layer}.{name}.bias"] = shape[:1]
    return tensors


class Checkpoint:
    """The safetensors files of a model folder, read slice by slice.

    Raises `ModelError` when there are none, or when they are not the tensors that `config` asks for.
    """

    def __init__(self, folder: str | Path, config: LlamaConfig) -> None:
        folder = Path(folder)
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.is_file():
            files = sorted({folder / name for name in read_json(index).get("weight_map", {}).values()})
        elif single.is_file():
            files = [single]
        else:
            found = "pickled *.bin weights, which are never loaded" if any(folder.glob("*.bin")) else "no weights"
            raise ModelError(f"{folder} has no safetensors ({found}); save the model with save_pretrained")
        self.folder, self._files = folder, {}
        for file in files:
            if not file.is_file():
                raise ModelError(f"{index} names {file.name}, which is missing; download the model again")
            try:
                opened = safe_open(str(file), "pt")
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{file} is not a readable safetensors file ({error}); download it again") from error
            self._files |= dict.fromkeys(opened.keys(), opened)
        self._check(expected_tensors(config), config)

    def _check(self, expected: dict[str, tuple[int, ...]], config: LlamaConfig) -> None:
        if missing := [name for name in expected if name not in self._files]:
            raise ModelError(f"{self.folder} lacks {_some(missing)}; download the model again")
        harmless = ("rotary_emb.inv_freq",) + (("lm_head.weight",) if config.tied else ())
        if unknown := [name for name in self._files if name not in expected and not name.endswith(harmless)]:
            raise ModelError(f"{self.folder} holds {_some(unknown)}, which a Llama with its config.json does not have")
        for name, shape in expected.items():
            found = tuple(self._files[name].get_slice(name).get_shape())
            if found != shape:
                raise ModelError(f"{self.folder}: {name} is {list(found)}, config.json says {list(shape)}; fix either")

    @property
    def dtype(self) -> torch.dtype:
        """The embedding's dtype, taken for the model's; `ModelError` unless it is fp32, fp16 or bf16."""
        name = self._files["model.embed_tokens.weight"].get_slice("model.embed_tokens.weight").get_dtype()
        if name not in DTYPES:
            raise ModelError(f"{self.folder}: weights are {name}; supported: {', '.join(DTYPES)}")
        return DTYPES[name]

    def read(self, name: str, dim: int = 0, part: int = 0, parts: int = 1) -> torch.Tensor:
        """Part `part` of `parts` of a tensor along `dim`, rounded up: the last parts may be shorter, or empty."""
        tensor = self._files[name].get_slice(name)
        size = tensor.get_shape()[dim]
        step = -(-size // parts)
        span = slice(min(part * step, size), min((part + 1) * step, size))
        return tensor[span] if dim == 0 else tensor[:, span]


def _some(names: list[str], limit: int = 3) -> str:
    rest = f" and {len(names) - limit} more tensors" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
