"""The engines by name. Each is imported when it is asked for, so that none needs another's framework."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..errors import ConfigError, ModelError

if TYPE_CHECKING:
    from .base import Engine

ENGINES = {  # name: (class, packages, the extra that has them)
    "megatron": ("MegatronEngine", ("megatron", "transformers", "safetensors", "rich"), "megatron"),
    "deepspeed": ("DeepSpeedEngine", ("deepspeed", "accelerate", "transformers", "safetensors", "rich"), "deepspeed"),
    "transformers": ("TransformersEngine", ("transformers", "accelerate", "safetensors", "rich"), "hf"),
}


def engine_class(name: str) -> type[Engine]:
    """The engine of this name. Raises ConfigError for another name, ModelError if its packages are not installed."""
    if name not in ENGINES:
        raise ConfigError(f"unknown engine {name!r}: use one of {', '.join(ENGINES)}")
    kind, packages, extra = ENGINES[name]
    if missing := [package for package in packages if find_spec(package) is None]:
        raise ModelError(f"engine {name} needs {', '.join(missing)}: pip install 'megatron-lowbit[{extra}]'")
    return getattr(import_module(f".{name}", __package__), kind)
