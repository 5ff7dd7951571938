"""Text generation and perplexity with Transformers' own tensor parallelism, on CUDA or on the CPU."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch

from ..config import CommConfig
from .hf_engine import HfEngine
from .hf_folder import HfFolder, read_folder
from .model_facts import UNTRUSTED, Trust


class TransformersEngine(HfEngine):
    """A Hugging Face folder sharded by Transformers' own plan for it. Arguments and attributes: see `HfEngine`."""

    @staticmethod
    def read(folder: str | Path, trust: Trust = UNTRUSTED) -> HfFolder:
        """What is known of a folder before it is loaded. Raises ModelError for what cannot be run."""
        return read_folder(folder, trust, _is_sharded, _obstacle)

    def _shard(self, facts: HfFolder, dtype: torch.dtype | None) -> torch.nn.Module:
        if self.tp == 1:
            return facts.load(dtype).to(self.device)
        return facts.load(dtype, **_options(self.tp))

    def _enable(self, config: CommConfig) -> Any:
        from ..patches import transformers

        return transformers.enable(self.model, config)


def _options(tp: int) -> dict[str, Any]:
    """What `from_pretrained` is told."""
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:
        return {"tp_plan": "auto"}
    if "tp_size" not in {field.name for field in dataclasses.fields(DistributedConfig)}:
        return {"tp_plan": "auto"}  # Transformers 4
    return {"distributed_config": DistributedConfig(tp_size=tp)}


def _plan(model: torch.nn.Module) -> dict[str, str]:
    return getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None) or {}


def _is_sharded(model: torch.nn.Module, path: str, module: torch.nn.Module) -> bool:
    """Whether the plan shards the features that enter the module; a plan's paths have "*" for numbers."""
    place = re.sub(r"\.\d+\b", ".*", path)
    return any(name in _plan(model) for name in (place, f"{place}.down_proj"))


def _obstacle(model: torch.nn.Module) -> str:
    if _plan(model):
        return ""
    return f"Transformers has no tensor-parallel plan for a {type(model).__name__}; use --engine deepspeed"
