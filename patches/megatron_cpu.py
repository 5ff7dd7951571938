"""Lets Megatron-Core build a model and run its static inference engine on a machine without CUDA.

Megatron-Core 0.16 asks `torch.cuda` for the current device, for timing events, for streams and for synchronization even
when every tensor lives on the CPU. `enable()` answers those calls; where CUDA exists it changes nothing. What it cannot
cure, the caller must: build with `use_cpu_initialization=True` and an inference RNG tracker, and pass an attention mask
(Megatron makes its default causal mask on "cuda").

`enable_training()` does more, so that scripts that start with `megatron.training` run as they are: it is for
development only, and what the launcher (`megatron-lowbit run`) calls. Such a script still has to be given options that
a CPU can serve, see docs/megatron.md.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext, suppress
from importlib import import_module
from typing import Any

import torch

from ._replacements import Replacements


class Handle:
    """What `enable()` changed. `disable()` puts every original back; calling it again does nothing."""

    def __init__(self) -> None:
        self._replacements = Replacements()

    @property
    def active(self) -> bool:
        """Whether replacements are in place; always False where CUDA exists."""
        return bool(self._replacements)

    def disable(self) -> None:
        """Restores `torch` as it was before `enable()`."""
        self._replacements.undo()


class _Event:
    """Stands in for `torch.cuda.Event`, which Megatron uses to time steps; here every interval is zero."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0


class _Stream:
    """Stands in for `torch.cuda.Stream`: there is one order of execution, so nothing has to wait."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def synchronize(self) -> None:
        pass


_stream = _Stream()
FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "rand", "randn", "tensor", "zeros")
_handle, _training = Handle(), Handle()


def enable() -> Handle:
    """Makes Megatron-Core's CUDA calls harmless on a machine without CUDA.

    There is one set of replacements per process: calling this again returns the same handle, and one `disable()`
    restores everything. Where `torch.cuda.is_available()` nothing is replaced.
    """
    if not torch.cuda.is_available() and not _handle.active:
        _handle._replacements.set(torch.cuda, "current_device", lambda: torch.device("cpu"))
        _handle._replacements.set(torch.cuda, "synchronize", lambda device=None: None)
        _handle._replacements.set(torch.cuda, "Event", _Event)
        _handle._replacements.set(torch.cuda, "Stream", _Stream)
        _handle._replacements.set(torch.cuda, "current_stream", lambda device=None: _stream)
        _handle._replacements.set(torch.cuda, "stream", lambda stream: nullcontext())
        _handle._replacements.set(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    return _handle


def enable_training() -> Handle:
    """`enable()`, and what initialising, building and loading with `megatron.training` asks of CUDA. -> its own handle.

    Tensors meant for "cuda" are made on the CPU, one device is reported, nothing is compiled. Call it before the script
    imports Megatron. Where CUDA exists, nothing is replaced; without Megatron-LM only torch is.
    """
    enable()
    if not torch.cuda.is_available() and not _training.active:
        put = _training._replacements.set
        for name in FACTORIES:
            put(torch, name, _on_cpu(getattr(torch, name)))
        put(torch.Tensor, "to", _on_cpu(torch.Tensor.to))
        put(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)
        put(torch.cuda, "device_count", lambda: 1)
        put(torch.cuda, "set_device", lambda device: None)
        put(torch.cuda, "memory_stats", lambda device=None: defaultdict(int))
        put(torch.cuda, "reset_peak_memory_stats", lambda device=None: None)
        put(torch.cuda, "LongTensor", torch.LongTensor)
        for name in ("range_push", "range_pop"):
            put(torch.cuda.nvtx, name, lambda *args: None)
        _answer_megatron_lm(put)
    return _training


def _answer_megatron_lm(put: Callable) -> None:
    try:
        import megatron.training
        from megatron.core.inference.contexts import dynamic_context
        from megatron.training import arguments, initialize
    except (ImportError, SyntaxError):  # not there, or for a newer Python
        return
    allowed = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    for module in (megatron.training, initialize):
        if hasattr(module, "initialize_megatron"):
            put(module, "initialize_megatron", allowed)
    put(initialize, "_compile_dependencies", lambda: None)
    if hasattr(arguments, "get_device_arch_version"):
        put(arguments, "get_device_arch_version", lambda: 0)
    with suppress(ImportError):  # 0.13 to 0.16 ask for this one of Transformer Engine's where there is none
        vars(import_module("megatron.core.transformer.moe.moe_utils")).setdefault("te_general_gemm", None)
    if hasattr(dynamic_context, "triton_append_key_value_cache"):  # refuses CPU tensors, beside a plain one
        put(dynamic_context, "triton_append_key_value_cache", None)
    for name in ("megatron.core.inference.communication_utils", "megatron.inference.text_generation.communication"):
        with suppress(ImportError):  # releases have one or both of them
            put(import_module(name), "_is_cuda", lambda tensor: None)


def _on_cpu(function: Callable) -> Callable:
    @functools.wraps(function)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        return function(*map(_moved, args), **{name: _moved(value) for name, value in kwargs.items()})

    return on_cpu


def _moved(value: Any) -> Any:
    device = isinstance(value, str | torch.device) and str(value).partition(":")[0] == "cuda"
    return torch.device("cpu") if device else value
