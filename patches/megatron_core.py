"""Compressed communication behind Megatron-Core's layers.

    handle = lowbit.patches.megatron_core.enable(config)           # every model of the process; call before building
    handle = lowbit.patches.megatron_core.enable(config, model)    # a built model, or a list of its pipeline chunks
    handle.disable()                                               # restores everything

The first `enable` wraps the methods that `LAYERS` name, the last `disable` puts the originals back. In between a
wrapped method asks which configuration holds for its module (megatron/hooks.py). The integer reduces of the MoE router
do not pass here; the embedding's reduce and the logits' gather stay exact unless `sites` names them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import wraps

import torch

from megatron_lowbit.config import CommConfig
from megatron_lowbit.errors import ConfigError, ModelError

try:
    from .megatron import (
        compat,
        hooks,
        inference_layers,
        moe,
        row_parallel,
        sequence_parallel,
        sites,
        transformer_engine,
        vocab_parallel,
    )
    from .megatron.module_spec import lowbit_spec
except ImportError as error:
    raise ModelError(f"Megatron-Core cannot be imported ({error}): pip install 'megatron-lowbit[megatron]'") from error
from ._handle import check_config
from ._replacements import Replacements
from .megatron.arguments import add_lowbit_args, enable_from_args

__all__ = ["Handle", "add_lowbit_args", "enable", "enable_from_args", "lowbit_spec"]

LAYERS = (row_parallel, sequence_parallel, vocab_parallel, moe, transformer_engine, inference_layers)
# Classes that reduce where this patch cannot reach, and what to do about them.
UNCOVERED = {
    "TEFusedMLP": "which reduces among Transformer Engine's fused operations: leave out use_te_op_fuser",
}
_wrapped, _handles = Replacements(), set()


class Handle:
    """What `enable` did, and how to undo it. As a context manager: disables on exit, raises if nothing was hooked."""

    def __init__(self, config: CommConfig) -> None:
        self.config = config
        self.sites: list[str] = []  # hooked so far; grows while models are built under a process-wide enable
        self._counted: set[str] = set()  # the same, to look up at every call
        self._modules: list[torch.nn.Module] = []

    def count(self, site: str) -> None:
        if site not in self._counted:
            self._counted.add(site)
            self.sites.append(site)

    def disable(self) -> None:
        """Restore what there was before. Calling it again does nothing."""
        for module in self._modules:
            del module.lowbit_config
        self._modules.clear()
        if hooks.process_wide is self:
            hooks.process_wide = None
        if self in _handles:
            _handles.remove(self)
            if not _handles:
                _wrapped.undo()

    def verify(self) -> None:
        """Raise ModelError if nothing has been hooked: a no-op must not pass for compression."""
        if not self.sites:
            raise ModelError(
                "low-bit communication is enabled, but no row-parallel layer was built or run under it: enable it "
                "before the model is built, or pass the model to enable()"
            )

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: type | None, *exception) -> None:
        self.disable()
        if kind is None:
            self.verify()

    def _hook(self, model: torch.nn.Module, mark: bool) -> None:
        """Name the modules of a model or layer whose messages will be compressed; mark: as those of this handle."""
        found = [(site, module, _messages(site, module, self.config)) for site, module in sites.named(model)]
        found = [row for row in found if row[-1]]
        messages = [message for *_, sent in found for message in sent]
        if self.config.planned:  # at once, and not in the middle of a forward
            self.config.planned.check(sites=filter(self.config.selects, messages))
        if self.config.calibrated:
            _check_calibrated(self.config, messages)
        for site, module, sent in found:
            if mark and "lowbit_config" in module.__dict__:
                raise ModelError(f"{site} is enabled already: disable the earlier handle first")
            module.lowbit_site = site
            if mark:
                module.lowbit_config = self.config
                self._modules.append(module)
            for message in sent:
                self.count(message)


def enable(config: CommConfig, model: torch.nn.Module | Iterable[torch.nn.Module] | None = None) -> Handle:
    """Send the row-parallel layers' partial sums as `config` says.

    Without `model`: in every model of this process, best before it is built, so that its layers are checked and named.
    With `model`: in that built model only, in place of a process-wide configuration. Raises ModelError when nothing can
    be hooked or a layer reduces where this patch does not reach, ConfigError when it is already enabled.
    """
    check_config(config)
    handle = Handle(config)
    if model is None:
        if hooks.process_wide is not None:
            spec = hooks.process_wide.config.spec
            raise ConfigError(
                f"already enabled with spec {spec!r}: call that handle's disable() first, or start the script without "
                "the launcher's --lowbit-comm"
            )
        hooks.process_wide = handle
    else:
        chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
        try:
            for chunk in chunks:
                handle._hook(chunk, mark=True)
        except Exception:
            handle.disable()
            raise
        if not handle.sites:
            raise ModelError(
                f"no RowParallelLinear in {' and '.join(type(c).__name__ for c in chunks) or 'an empty list'}: "
                "pass a Megatron-Core model built with tensor parallelism"
            )
    if not _handles:
        for owner, name, wrapper in [w for layer in LAYERS for w in layer.wrappers()] + _naming():
            _wrapped.set(owner, name, wrapper(getattr(owner, name)))
    _handles.add(handle)
    return handle


def _messages(site: str, module: torch.nn.Module, config: CommConfig) -> list[str]:
    """The sites of what a module sends, as far as it is compressed."""
    why = next((UNCOVERED[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in UNCOVERED), None)
    if why is not None:
        if config.selects(site):
            raise ModelError(f"{site} is a {type(module).__name__}, {why}")
        return []
    sent: list[str] = []
    for layer in LAYERS:
        if layer.takes(module):
            sent += layer.messages(module, site, config) if hasattr(layer, "messages") else [site]
    return sent


def _check_calibrated(config: CommConfig, messages: list[str]) -> None:
    """Raise ConfigError if the calibration does not know what will be sent."""
    messages = [m for m in messages if config.selects(m) and not config.keeps_exact(m) and config.legs_at(m).calibrated]
    gathers = [message for message in messages if message.endswith((sequence_parallel.GATHER, sites.LOGITS))]
    if any(legs.gather.calibrated for legs in config.specs):
        if unknown := [message for message in gathers if message not in config.calibrated.sites]:
            raise ConfigError(
                f"{config.calibrated.name} lacks {unknown[0]}: calibrations are of sums and say nothing about what is "
                "gathered. Leave the gathers exact with CommConfig(sites=('layers.*.attention', 'layers.*.mlp')), or "
                "give them a codec that needs none, as in 'selective4/int8'"
            )
        for message in gathers:
            config.calibrated.statistics(message, "gather")
    config.calibrated.check(sites=[message for message in messages if message not in gathers])


def _naming() -> list[tuple]:
    """Models and layers that are built under a process-wide enable are named as soon as the outermost of them stands.

    Only then is it known whether a layer is an encoder's, a decoder's or an MTP layer's.
    """
    building = []

    def wrapper(base):
        @wraps(base)
        def init(self, *args, **kwargs):
            building.append(self)
            try:
                base(self, *args, **kwargs)
            finally:
                building.pop()
            if hooks.process_wide is not None and not building:
                hooks.process_wide._hook(self, mark=False)

        return init

    return [(kind, "__init__", wrapper) for kind in compat.MODELS + compat.MTP_LAYERS + compat.LAYERS]
