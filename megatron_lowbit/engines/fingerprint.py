"""A short name for what a model computes, so that statistics of one model are not used with another."""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, fields
from pathlib import Path

import torch

from .hf_model import Checkpoint, ModelConfig, read_config
from .weights import expected_tensors


def fingerprint(folder: str | Path) -> str:
    """SHA-256 over the architecture and a sample of every tensor of a Hugging Face model folder.

    The architecture is what `read_config` makes of config.json, in whichever spelling. The sample is a matrix's middle
    row and all of a vector, with name, dtype and shape: some 10 MB of a 70 B model, so it takes a moment.

    Catches another architecture, size or dtype, and weights that were trained, fine-tuned, merged or quantized further,
    which changes every row. Does not catch a change that spares the middle rows, nor one of the tokenizer. How the
    tensors are spread over files makes no difference. Raises ModelError as `read_config` and `Checkpoint` do.
    """
    config = read_config(folder)
    checkpoint = Checkpoint(folder, config)
    digest = hashlib.sha256(json.dumps(_architecture(config), sort_keys=True).encode())
    for name, shape in sorted(expected_tensors(config).items()):
        middle = (shape[0] // 2, shape[0] // 2 + 1) if len(shape) > 1 else (0, None)
        sample = checkpoint.read(name, *middle)
        digest.update(f"\n{name} {sample.dtype} {shape}\n".encode())
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _architecture(config: ModelConfig) -> dict[str, object]:
    """The fields that say something: one that was added later, and is as it always was, leaves old names valid."""
    said = {field.name: getattr(config, field.name) for field in fields(config)}
    return {f.name: said[f.name] for f in fields(config) if f.default is MISSING or said[f.name] != f.default}
