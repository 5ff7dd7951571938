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
    """The engine of this name, whether or not its framework is installed. Raises ConfigError for another name."""
    kind, _, _ = _row(name)
    return getattr(import_module(f".{name}", __package__), kind)


def check_framework(name: str) -> None:
    """Raise ModelError if a package is missing that the engine of this name needs, ConfigError for another name."""
    _, packages, extra = _row(name)
    if missing := [package for package in packages if find_spec(package) is None]:
        raise ModelError(f"engine {name} needs {', '.join(missing)}: pip install 'megatron-lowbit[{extra}]'")


def _row(name: str) -> tuple[str, tuple[str, ...], str]:
    if name not in ENGINES:
        raise ConfigError(f"unknown engine {name!r}: use one of {', '.join(ENGINES)}")
    return ENGINES[name]
