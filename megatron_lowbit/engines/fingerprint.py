"""A short name for what a model computes, so that statistics of one model are not used with another."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch

from .hf_llama import Checkpoint, expected_tensors, read_config


def fingerprint(folder: str | Path) -> str:
    """SHA-256 over the architecture and a sample of every tensor of a Hugging Face Llama folder.

    The architecture is what `read_config` makes of config.json, in whichever spelling. The sample is a matrix's middle
    row and all of a vector, with name, dtype and shape: some 10 MB of a 70 B model, so it takes a moment.

    Catches another architecture, size or dtype, and weights that were trained, fine-tuned, merged or quantized further,
    which changes every row. Does not catch a change that spares the middle rows, nor one of the tokenizer. How the
    tensors are spread over files makes no difference. Raises ModelError as `read_config` and `Checkpoint` do.
    """
    config = read_config(folder)
    checkpoint = Checkpoint(folder, config)
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for name, shape in sorted(expected_tensors(config).items()):
        rows = shape[0] if len(shape) > 1 else 1
        sample = checkpoint.read(name, part=rows // 2, parts=rows)
        digest.update(f"\n{name} {sample.dtype} {shape}\n".encode())
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
