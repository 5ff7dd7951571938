"""Low-bit communication for tensor-parallel LLM inference.

    import megatron_lowbit as lowbit
    total = lowbit.all_reduce(partial, "int4:g32")

Importing the package needs torch and numpy only; numba, Megatron-Core and the rest are imported when first used.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from pathlib import Path as _Path

from .codecs import Codec, codec
from .communicator import Communicator
from .config import CommConfig
from .errors import ConfigError, LowBitError, ModelError, RankError
from .functional import all_gather, all_reduce, all_reduce_add_rmsnorm, all_to_all, reduce_scatter
from .telemetry import reset_stats, stats

__version__ = "0.1.0"
__all__ = [
    "CommConfig",
    "Codec",
    "Communicator",
    "ConfigError",
    "LowBitError",
    "ModelError",
    "RankError",
    "all_gather",
    "all_reduce",
    "all_reduce_add_rmsnorm",
    "all_to_all",
    "codec",
    "kernels",
    "patches",
    "reduce_scatter",
    "reset_stats",
    "simulate",
    "stats",
]

# `kernels/` and `patches/` lie beside this folder in a checkout; an install maps them in. Without an install, or with
# the checkout shadowing one, the checkout's root has to be searched too.
_package = _Path(__file__).resolve().parent
if not (_package / "kernels").is_dir() and (_package.parent / "setup.cfg").is_file():
    __path__.append(str(_package.parent))

_LAZY = ("kernels", "patches", "simulate")


def __getattr__(name: str):
    if name in _LAZY:
        return _import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
