"""Which implementation of a codec runs: the definition in `codecs/`, or the same arithmetic in `kernels/`.

`LOWBIT_BACKEND=reference|numba` forces one. The default is numba on CPU and the definition elsewhere.
"""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from importlib.util import find_spec

import torch

from ..errors import ConfigError

BACKENDS = ("reference", "numba")
PLANNED = ("triton",)


def of(device: torch.device) -> str:
    """Name of the backend for tensors on `device`. Raises ConfigError for a backend that cannot run there."""
    return _choose(device.type, os.environ.get("LOWBIT_BACKEND", ""))


@lru_cache
def _choose(device: str, forced: str) -> str:
    if forced in PLANNED:
        raise ConfigError(f"LOWBIT_BACKEND={forced} is not available in this version: use one of {', '.join(BACKENDS)}")
    if forced and forced not in BACKENDS:
        raise ConfigError(f"LOWBIT_BACKEND={forced!r} is unknown: use one of {', '.join(BACKENDS)}, or leave it unset")
    if forced == "numba" and device != "cpu":
        raise ConfigError(f"LOWBIT_BACKEND=numba cannot run on {device} tensors: unset it, or use reference")
    if forced == "reference" or device != "cpu":
        return "reference"
    if find_spec("numba") is not None:
        return "numba"
    if forced:
        raise ConfigError("LOWBIT_BACKEND=numba, but numba is not installed: pip install 'megatron-lowbit[cpu]'")
    warnings.warn(
        "numba is not installed, so codecs run in plain PyTorch, many times slower: pip install 'megatron-lowbit[cpu]'",
        stacklevel=2,
    )
    return "reference"
