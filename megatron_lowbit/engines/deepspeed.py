"""Text generation and perplexity with a model that DeepSpeed sharded for inference, on CUDA or on the CPU."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from ..config import CommConfig
from .hf_engine import HfEngine
from .hf_folder import HfFolder, read_folder
from .model_facts import UNTRUSTED, Trust


class DeepSpeedEngine(HfEngine):
    """A Hugging Face folder sharded by `deepspeed.init_inference`. Arguments and attributes: see `HfEngine`."""

    @staticmethod
    def read(folder: str | Path, trust: Trust = UNTRUSTED) -> HfFolder:
        """What is known of a folder before it is loaded. Raises ModelError for what cannot be run."""
        return read_folder(folder, trust, _is_sharded)

    def _shard(self, facts: HfFolder, dtype: torch.dtype | None) -> torch.nn.Module:
        model = facts.load(dtype)
        if self.tp == 1:
            return model.to(self.device)
        with nullcontext() if self._debug else _hushed():
            from ..patches import deepspeed

            return deepspeed.init_inference(model, self.tp, None).module

    def _enable(self, config: CommConfig) -> Any:
        from ..patches import deepspeed

        return deepspeed.enable(self.model, config)


@contextmanager
def _hushed() -> Iterator[None]:
    """Without what DeepSpeed logs, warns of and prints; nothing of ours is printed meanwhile."""
    log = logging.getLogger("DeepSpeed")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _is_sharded(model: torch.nn.Module, path: str, module: torch.nn.Module) -> bool:
    """DeepSpeed shards layers with a weight matrix; experts that are kept in one tensor stay whole on every rank."""
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
