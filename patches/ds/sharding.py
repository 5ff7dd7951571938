"""`deepspeed.init_inference` with what it needs to know of a model: the injection policy of the family, and its group.

A policy of the user's own is passed on, and so is kernel injection, which has policies of DeepSpeed's; the model is
then neither checked nor repaired. DeepSpeed shards in place: a model for which it raises an error must be loaded again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.inference.engine import InferenceEngine
from deepspeed.module_inject import layers

from megatron_lowbit.errors import ConfigError, ModelError

from . import injection
from .groups import tensor_parallel_group

_GIVEN = ("tensor_parallel", "tp", "mp_size", "mpu")
_POLICIES = ("injection_policy", "injection_dict")
_KERNELS = ("replace_with_kernel_inject", "kernel_inject")


def shard(model: torch.nn.Module, tp_size: int, arguments: Mapping[str, Any]) -> InferenceEngine:
    """The model as an engine of DeepSpeed, cut into tp_size shards in place.

    arguments: of deepspeed.init_inference, where `deepspeed_config` is what it calls config. A collective call of all
    ranks for tp_size > 1. Raises ConfigError for settings that cannot be, ModelError for a model that is sharded.
    """
    arguments = dict(arguments)
    settings = _settings(arguments.pop("deepspeed_config", None)) | arguments
    if isinstance(tp_size, bool) or not isinstance(tp_size, int) or tp_size < 1:
        raise ConfigError(f"tp_size is {tp_size!r}: give the number of ranks that share the model, such as 2")
    if given := [name for name in _GIVEN if name in settings]:
        raise ConfigError(f"{given[0]}={settings[given[0]]!r} is given beside tp_size={tp_size}: leave it out")
    _check_model(model)
    settings.setdefault("dtype", next(model.parameters()).dtype)  # DeepSpeed's is fp16, whatever the weights are
    _check_dtype(settings["dtype"])
    own = any(settings.get(name) for name in (*_POLICIES, *_KERNELS))
    with tensor_parallel_group(tp_size) if tp_size > 1 else nullcontext():
        policy = None if own or tp_size == 1 else injection.prepare(model, tp_size)
        if policy is not None:
            settings["injection_policy"] = policy
        return deepspeed.init_inference(model, tensor_parallel={"tp_size": tp_size}, **settings)


def _settings(config: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """What DeepSpeed's own configuration says, a dict or the name of a JSON file."""
    if isinstance(config, str):
        try:
            config = json.loads(Path(config).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"deepspeed_config={config!r} cannot be read as JSON: {error}") from error
    return dict(config or {})


def _check_dtype(dtype: object) -> None:
    """Raise ConfigError for what DeepSpeed refuses itself, as a ValueError, once the model has been repaired."""
    accelerator = get_accelerator()
    if isinstance(dtype, torch.dtype) and dtype not in (supported := accelerator.supported_dtypes()):
        names = ", ".join(str(one).removeprefix("torch.") for one in supported)
        raise ConfigError(
            f"DeepSpeed does not run {str(dtype).removeprefix('torch.')} on {accelerator.device_name()}: give another "
            f"dtype, of {names}, on a command line as --dtype"
        )


def _check_model(model: torch.nn.Module) -> None:
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"model is {model!r}: pass a model of Transformers, not sharded yet")
    if isinstance(model, InferenceEngine) or any(isinstance(m, layers.TensorParallel_Layer) for m in model.modules()):
        raise ModelError(
            f"this {type(model).__name__} is sharded by DeepSpeed already: pass the model that was loaded, or call "
            "enable(engine, config) instead"
        )
