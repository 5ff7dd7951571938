"""A short name for what a model computes, so that statistics of one model are not used with another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path

import torch

from ..errors import ModelError
from .hf_model import Checkpoint, ModelConfig, open_safetensors, read_config, read_config_json
from .weights import expected_tensors

SHAPE_NOTHING = ("transformers_version", "_name_or_path", "use_cache", "dtype", "torch_dtype", "architectures")


def fingerprint(folder: str | Path) -> str:
    """SHA-256 over the architecture and a sample of every tensor of a Hugging Face model folder with safetensors.

    The architecture is what `read_config` makes of config.json, in whichever spelling; of a family that it does not
    know, all of config.json that shapes the model. The sample is a matrix's middle
    row and all of a vector, with name, dtype and shape: some 10 MB of a 70 B model, so it takes a moment.

    Catches another architecture, size or dtype, and weights that were trained, fine-tuned, merged or quantized further,
    which changes every row. Does not catch a change that spares the middle rows, nor one of the tokenizer. How the
    tensors are spread over files makes no difference. Raises ModelError as `read_config` and `Checkpoint` do.
    """
    architecture, samples = _samples(folder)
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    for _, sample in samples:
        digest.update(sample)
    return digest.hexdigest()


def tensor_digests(folder: str | Path) -> dict[str, str]:
    """Name of each tensor -> 12 digits of a hash of its sample, and "config.json" of the architecture: what tells two
    models apart where their fingerprints differ. Raises as `fingerprint` does."""
    architecture, samples = _samples(folder)
    rows = [("config.json", json.dumps(architecture, sort_keys=True).encode()), *samples]
    return {name: hashlib.sha256(sample).hexdigest()[:12] for name, sample in rows}


def _samples(folder: str | Path) -> tuple[dict[str, object], Iterator[tuple[str, bytes]]]:
    """(architecture, (name, what is hashed of it) of each tensor)"""
    try:
        config = read_config(folder)
        checkpoint = Checkpoint(folder, config)
        architecture, shapes, read = _architecture(config), expected_tensors(config), checkpoint.read
    except ModelError:  # another family, or one with something that Megatron is not built with
        architecture, shapes, read = _any_folder(folder)

    def samples() -> Iterator[tuple[str, bytes]]:
        for name, shape in sorted(shapes.items()):
            middle = (shape[0] // 2, shape[0] // 2 + 1) if len(shape) > 1 else (0, None)
            sample = read(name, *middle)
            content = sample.contiguous().view(torch.uint8).numpy().tobytes()
            yield name, f"\n{name} {sample.dtype} {shape}\n".encode() + content

    return architecture, samples()


def _any_folder(folder: str | Path) -> tuple[dict[str, object], dict[str, tuple[int, ...]], Callable]:
    """(architecture, shapes, read as in `Checkpoint`). Raises ModelError for a folder that cannot be read."""
    _, raw = read_config_json(folder)
    tensors = open_safetensors(folder)
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in tensors.items()}

    def read(name: str, start: int, stop: int | None) -> torch.Tensor:
        return tensors[name].get_slice(name)[start:stop] if shapes[name] else tensors[name].get_tensor(name)[None]

    return {name: value for name, value in raw.items() if name not in SHAPE_NOTHING}, shapes, read


def _architecture(config: ModelConfig) -> dict[str, object]:
    """The fields that say something: one that was added later, and is as it always was, leaves old names valid."""
    said = {field.name: getattr(config, field.name) for field in fields(config)}
    return {f.name: said[f.name] for f in fields(config) if f.default is MISSING or said[f.name] != f.default}
