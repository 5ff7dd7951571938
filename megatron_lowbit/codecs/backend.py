"""Which implementation of a codec runs: the definition in `codecs/`, or the same arithmetic in `kernels/`.

`LOWBIT_BACKEND=reference|numba|triton` forces one. The default is numba on CPU, Triton on CUDA and the definition
elsewhere. With TRITON_INTERPRET=1 as well, `triton` runs on CPU tensors, slowly, in Triton's interpreter.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from ..errors import ConfigError

if TYPE_CHECKING:
    from .base import Codec

BACKENDS = ("reference", "numba", "triton")
OLDEST_TRITON = (3, 2)
BROKEN_TRITON = (3, 3)  # its compiler fails over some of the kernels ("'tt.join' op failed to infer returned types")
OLDEST_GPU = (8, 0)
_chosen: dict[tuple, str] = {}  # no lru_cache, which torch.compile warns about


def of(device: torch.device) -> str:
    """Name of the backend for tensors on `device`. Raises ConfigError for a backend that cannot run there."""
    interpreted = os.environ.get("TRITON_INTERPRET", "") == "1"
    facts = device.type, device.index, os.environ.get("LOWBIT_BACKEND", ""), interpreted
    if facts not in _chosen:
        _chosen[facts] = _choose(*facts)
    return _chosen[facts]


def run(operation: str, codec: Codec, device: torch.device) -> Callable[..., None]:
    """What does "encode" (x, wire) or "reduce" (wires, out) for `codec` on tensors of `device`.

    Triton's kernels take more arguments and have more operations (kernels/triton_launch.py): ask `fuses` first.
    """
    backend = of(device)
    if backend == "numba" and codec.numba:
        kernels = import_module(f"megatron_lowbit.kernels.{codec.numba}")
        return partial(getattr(kernels, f"{operation}_rows"), codec)
    if backend == "triton" and codec.kernel:
        launch = getattr(import_module("megatron_lowbit.kernels.triton_launch"), operation)
        return lambda *arguments: launch(codec, *arguments)()
    return getattr(codec, f"define_{operation}")


def fuses(codec: Codec, device: torch.device, *others: Codec) -> bool:
    """Whether all of these codecs have a Triton kernel and `device` runs it."""
    return of(device) == "triton" and all(one.kernel is not None for one in (codec, *others))


def _choose(device: str, index: int | None, forced: str, interpreted: bool) -> str:
    if forced and forced not in BACKENDS:
        raise ConfigError(f"LOWBIT_BACKEND={forced!r} is unknown: use one of {', '.join(BACKENDS)}, or leave it unset")
    if forced == "numba" and device != "cpu":
        raise ConfigError(f"LOWBIT_BACKEND=numba cannot run on {device} tensors: unset it, or use reference")
    if forced == "reference":
        return "reference"
    if forced == "triton" or (device == "cuda" and not forced):
        if (problem := _triton_problem(device, index, interpreted)) is None:
            return "triton"
        if forced:
            raise ConfigError(f"LOWBIT_BACKEND=triton, but {problem}")
        _warn(f"codecs run in plain PyTorch on the GPU, many times slower, because {problem}")
        return "reference"
    if device != "cpu":
        return "reference"
    if find_spec("numba") is not None:
        return "numba"
    if forced:
        raise ConfigError("LOWBIT_BACKEND=numba, but numba is not installed: pip install 'megatron-lowbit[cpu]'")
    _warn(
        "numba is not installed, so codecs run in plain PyTorch, many times slower: pip install 'megatron-lowbit[cpu]'"
    )
    return "reference"


def _triton_problem(device: str, index: int | None, interpreted: bool) -> str | None:
    """Why Triton kernels cannot run on tensors of `device`, and what to do; None if they can."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "triton is not installed: pip install 'megatron-lowbit[gpu]'"
    release = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if release < OLDEST_TRITON:
        return f"triton {found} is too old: pip install 'triton>={'.'.join(map(str, OLDEST_TRITON))}'"
    if interpreted:
        return None
    if release == BROKEN_TRITON:
        return f"triton {found} cannot compile all of the kernels: pip install 'triton>=3.4', or 3.2"
    if device == "cpu":
        return "these are CPU tensors: move them to a GPU, or set TRITON_INTERPRET=1 to try the kernels out on a CPU"
    if device != "cuda":
        return f"these are {device} tensors: unset LOWBIT_BACKEND, or use reference"
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_GPU:
        name = torch.cuda.get_device_name(index)
        return (
            f"{name} has compute capability {capability[0]}.{capability[1]} and the kernels need "
            f"{'.'.join(map(str, OLDEST_GPU))} or higher: set LOWBIT_BACKEND=reference"
        )
    return None


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=5)
