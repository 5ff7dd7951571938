"""A Hugging Face model folder as it lies on disk: its config and its safetensors, checked before anything is built.

Tensors are read slice by slice, so a rank reads only its own part; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open

from ..errors import ModelError
from .families import FAMILIES, Family

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROPE_NUMBERS = {  # rope type: the numbers config.json must give with it
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
MEGATRON_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 8192.0}  # fmt: skip


INTEGERS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "sliding_window",
    "num_local_experts",
    "num_experts_per_tok",
)
NUMBERS = ("rms_norm_eps", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
REQUIRED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class ModelConfig:
    """The parts of a `config.json` that shape the model. Fields with defaults came after fingerprints were made."""

    layers: int
    hidden: int
    intermediate: int  # of each expert, where there are experts
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    norm_eps: float
    tied: bool
    attention_bias: bool  # of queries, keys, values and the output
    mlp_bias: bool
    rope_theta: float
    rope_type: str
    rope: dict[str, float]
    model_type: str = "llama"
    windows: tuple[int | None, ...] = ()  # per layer: how many tokens a query sees, itself included; (): all see all
    experts: int = 0
    experts_per_token: int = 0
    query_scale: float | None = None  # of the scores; None: 1 / sqrt(head_dim)
    attention_cap: float | None = None  # scores become cap * tanh(scores / cap)
    logit_cap: float | None = None

    scores: ClassVar[bool] = True  # texts alone have a perplexity: they are all decoders

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def sites(self) -> list[str]:
        """What the patch compresses unless told otherwise, in the order of the forward pass."""
        kinds = ("attention", "moe.dispatch", "moe.combine") if self.experts else ("attention", "mlp")
        return [f"layers.{layer}.{kind}" for layer in range(self.layers) for kind in kinds]

    def check_tensor_parallel(self, tp: int) -> None:
        """Raises `ModelError` unless `tp` ranks can share the model."""
        check_tensor_parallel(self, tp)

    @property
    def needs_own_rotary(self) -> bool:
        """Whether Megatron-LM's scripts cannot pass its rope scaling on to Megatron: they know one set of numbers."""
        return self.rope_type == "linear" or (self.rope_type == "llama3" and self.rope != MEGATRON_LLAMA3)

    @property
    def needs_own_layers(self) -> bool:
        """Whether Megatron's local layers lack something that the model has: see `megatron_layers.py`."""
        return bool(self.windows or self.family.gemma)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `ModelError` when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); download the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not an object; download the model again")
    return value


def read_config_json(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """(path, content) of a model folder's config.json. Raises `ModelError` when the folder or the file is missing."""
    folder = Path(folder)
    if folder.is_file():
        raise ModelError(f"model {folder} is a file; give the folder of a Hugging Face model")
    if not folder.is_dir():
        raise ModelError(f"model folder {folder} does not exist; give the path of a downloaded Hugging Face model")
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json; give the folder of a Hugging Face model")
    return path, read_json(path)


def read_config(folder: str | Path) -> ModelConfig:
    """Reads and checks `config.json`, in the spelling of Transformers 4 or 5.

    Raises `ModelError` when the folder or the file is missing, or the model is of no known family (families.py).
    """
    path, raw = read_config_json(folder)
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        raise ModelError(
            f"{path}: model_type {raw.get('model_type')!r} is not supported; supported: {', '.join(FAMILIES)}; "
            "other families: --engine deepspeed or transformers"
        )
    raw = {**family.defaults, **raw}
    _check_values(raw, family, path)
    _check_family(raw, family, path)
    rope_type, rope = _rope(raw, path)
    heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
    try:
        return ModelConfig(
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
            model_type=raw["model_type"],
            windows=_windows(raw, family),
            experts=raw["num_local_experts"] if family.experts else 0,
            experts_per_token=raw["num_experts_per_tok"] if family.experts else 0,
            query_scale=float(raw["query_pre_attn_scalar"]) ** -0.5 if family.gemma else None,
            attention_cap=raw["attn_logit_softcapping"] if family.gemma else None,
            logit_cap=raw["final_logit_softcapping"] if family.gemma else None,
        )
    except KeyError as error:
        raise ModelError(f"{path} lacks {error}; download the model again") from error
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path} holds a value of the wrong kind ({error}); download the model again") from error


def _check_values(raw: dict[str, Any], family: Family, path: Path) -> None:
    """Raise ModelError for sizes and numbers that are missing or make no sense."""
    for name in INTEGERS:
        value = raw.get(name)
        if name in raw and value is not None and (type(value) is not int or value < 1):
            raise ModelError(f"{path}: {name} is {value!r}, not a whole number above 0; download the model again")
    for name in NUMBERS:
        value = raw.get(name)
        if value is not None and (type(value) not in (int, float) or not value > 0):
            raise ModelError(f"{path}: {name} is {value!r}, not a number above 0; download the model again")
    needed = ("rms_norm_eps",) + (("num_local_experts", "num_experts_per_tok") if family.experts else ())
    if nothing := [name for name in needed if name in raw and raw[name] is None]:
        raise ModelError(f"{path}: {nothing[0]} is null; download the model again")
    if missing := [name for name in REQUIRED if raw.get(name) is None]:
        raise ModelError(f"{path} lacks {missing[0]!r}; download the model again")
    heads = raw["num_attention_heads"]
    if heads % (raw.get("num_key_value_heads") or heads):
        raise ModelError(
            f"{path}: num_key_value_heads {raw['num_key_value_heads']} does not divide num_attention_heads {heads}; "
            "download the model again"
        )


def _check_family(raw: dict[str, Any], family: Family, path: Path) -> None:
    """Raise ModelError for what the family is not built with here."""
    if raw.get("quantization_config"):
        raise ModelError(f"{path}: quantized weights are not supported; use an fp32, fp16 or bf16 checkpoint")
    activation = raw.get("hidden_activation") or raw.get("hidden_act") or family.activation
    if activation != family.activation:
        raise ModelError(
            f"{path}: hidden_act {activation!r} is not supported for a {family.title}; supported: {family.activation!r}"
        )
    if raw.get("use_bidirectional_attention"):
        raise ModelError(f"{path}: use_bidirectional_attention is not supported; use a model that generates text")
    if family.experts and raw["num_experts_per_tok"] == 1:  # Megatron would weigh it by its share of all experts
        raise ModelError(f"{path}: num_experts_per_tok is 1; a {family.title} needs at least 2 here")
    if family.experts and raw["num_experts_per_tok"] > raw["num_local_experts"]:
        raise ModelError(
            f"{path}: num_experts_per_tok is {raw['num_experts_per_tok']}, and there are {raw['num_local_experts']} "
            "experts; download the model again"
        )


def _rope(raw: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """(rope type, the rotary embedding's parameters). Raises ModelError for a kind that is not built here."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ModelError(
            f"{path}: the rotary embedding's parameters are {rope!r}, not an object; download the model again"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(
            f"{path}: partial_rotary_factor {rope['partial_rotary_factor']} is not supported; supported: 1.0"
        )
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ROPE_NUMBERS:
        raise ModelError(f"{path}: rope type {rope_type!r} is not supported; supported: {', '.join(ROPE_NUMBERS)}")
    return rope_type, rope


def _windows(raw: dict[str, Any], family: Family) -> tuple[int | None, ...]:
    """Per layer how many tokens a query sees; () if no window is shorter than the positions."""
    window, layers = raw.get("sliding_window"), raw["num_hidden_layers"]
    if family.windowed is None or not window or window >= raw.get("max_position_embeddings", 2048):
        return ()
    kinds = raw.get("layer_types")
    if kinds is not None and len(kinds) != layers:
        raise ValueError(f"layer_types names {len(kinds)} layers, num_hidden_layers {layers}")
    if unknown := set(kinds or ()) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types has {unknown.pop()!r}; full_attention and sliding_attention are known")
    slides = [kinds[i] == "sliding_attention" if kinds else family.windowed(raw, i) for i in range(layers)]
    return tuple(window if each else None for each in slides) if any(slides) else ()


def query_groups(config: ModelConfig, tp: int) -> int:
    """Key-value heads after as many copies of each as let every rank hold its own."""
    return math.lcm(config.kv_heads, tp)


def check_tensor_parallel(config: ModelConfig, tp: int) -> None:
    """Raises `ModelError` unless `tp` ranks can share the heads and intermediate features evenly.

    Key-value heads that are fewer than the ranks, or do not divide evenly, are copied: see `query_groups`.
    """
    sizes = {"attention heads": config.heads, "intermediate features": config.intermediate}
    uneven = [f"{size} {what}" for what, size in sizes.items() if tp < 1 or size % tp]
    if uneven:
        common = math.gcd(*sizes.values())
        possible = [str(n) for n in range(1, common + 1) if common % n == 0]
        raise ModelError(f"TP={tp} does not divide {' and '.join(uneven)}; possible TP sizes: {', '.join(possible)}")


def open_safetensors(folder: str | Path) -> dict[str, Any]:
    """Tensor name -> the opened file that holds it. Raises `ModelError` when there are none, or one cannot be read."""
    folder = Path(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        files = sorted({folder / name for name in read_json(index).get("weight_map", {}).values()})
    elif single.is_file():
        files = [single]
    else:
        found = "pickled *.bin weights, which are never loaded" if any(folder.glob("*.bin")) else "no weights"
        raise ModelError(f"{folder} has no safetensors ({found}); save the model with save_pretrained")
    tensors: dict[str, Any] = {}
    for file in files:
        if not file.is_file():
            raise ModelError(f"{index} names {file.name}, which is missing; download the model again")
        try:
            opened = safe_open(str(file), "pt")
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} is not a readable safetensors file ({error}); download it again") from error
        tensors |= dict.fromkeys(opened.keys(), opened)
    return tensors


class Checkpoint:
    """The safetensors files of a model folder, read slice by slice.

    Raises `ModelError` when there are none, or when they are not the tensors that `config` asks for.
    """

    def __init__(self, folder: str | Path, config: ModelConfig) -> None:
        self.folder, self._files = Path(folder), open_safetensors(folder)
        from .weights import expected_tensors

        self._check(expected_tensors(config), config)

    def _check(self, expected: dict[str, tuple[int, ...]], config: ModelConfig) -> None:
        if missing := [name for name in expected if name not in self._files]:
            raise ModelError(f"{self.folder} lacks {_some(missing)}; download the model again")
        harmless = ("rotary_emb.inv_freq",) + (("lm_head.weight",) if config.tied else ())
        if unknown := [name for name in self._files if name not in expected and not name.endswith(harmless)]:
            raise ModelError(
                f"{self.folder} holds {_some(unknown)}, which a {config.family.title} with its "
                "config.json does not have"
            )
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

    def read(self, name: str, start: int = 0, stop: int | None = None, dim: int = 0) -> torch.Tensor:
        """Rows (or, with dim=1, columns) `start` to `stop` of a tensor; fewer, or none, where it ends before."""
        tensor = self._files[name].get_slice(name)
        size = tensor.get_shape()[dim]
        span = slice(min(start, size), size if stop is None else min(stop, size))
        return tensor[span] if dim == 0 else tensor[:, span]


def _some(names: list[str], limit: int = 3) -> str:
    rest = f" and {len(names) - limit} more tensors" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
