"""How the sums of row-parallel layers and of experts are replaced, in the two ways that Transformers makes them.

Releases that wrap `forward` look their output functions up in the style's class at every call: those are wrapped for as
long as anything is enabled (`wrappers`), and ask the module at hand what holds for it. Older releases register forward
hooks, one a module, which are exchanged (`exchange_hook`): what Transformers' own output function then gets is summed
already, with word that there is nothing left to sum, so that it does the rest as it always does.

A bias is hidden from the product by Transformers and added behind the sum by it, or here where that is one function.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Partial, Replicate

from megatron_lowbit import telemetry
from megatron_lowbit.codecs import backend
from megatron_lowbit.communicator import communicator
from megatron_lowbit.config import CommConfig
from megatron_lowbit.errors import ConfigError
from megatron_lowbit.spec import PASSTHROUGH

from .installed import EXPERTS, POST, ROW, Installed, group_of

_LOSSLESS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # and for which dtype; None: for all


def config_of(module: torch.nn.Module) -> CommConfig | None:
    """What holds for this module: what `enable` was given, else what its parallel style was made for."""
    own = module.__dict__
    return own.get("lowbit_config", own.get("lowbit_planned"))


def wrappers() -> list[tuple]:
    """(class, name of a method, what makes the wrapped method of the original)"""
    rows = [(ROW, POST, _row)]
    return rows + [(kind, POST, _experts) for kind in EXPERTS]


def _row(base: Callable) -> Callable:
    @wraps(base)
    def transform_output_post_forward(self, module, output, mesh):
        config = config_of(module)
        if config is None or _with_gradients(module, output, config, group_of(mesh)):
            return base(self, module, output, mesh)
        hidden = self.should_use_local_tensors(module)  # the bias, which belongs behind the sum
        total = _sum(module, _partial(module, output), config, group_of(mesh))
        bias = module._parameters.get("bias") if hidden else None
        if bias is None:
            return total
        return total + (bias.to_local() if isinstance(bias, DTensor) else bias)

    return transform_output_post_forward


def _experts(base: Callable) -> Callable:
    @wraps(base)
    def transform_output_post_forward(self, module, output, mesh, *rest, **named):
        config = config_of(module)
        whole = any(isinstance(given, Replicate) for given in (*rest, *named.values()))  # no expert is sharded
        if config is None or output is None or whole or _with_gradients(module, output, config, group_of(mesh)):
            return base(self, module, output, mesh, *rest, **named)
        return _sum(module, _partial(module, output), config, group_of(mesh))

    return transform_output_post_forward


class _OneRank:
    """A mesh, to those who are about to sum what has been summed."""

    @staticmethod
    def size() -> int:
        return 1


def exchange_hook(module: torch.nn.Module, found: Installed) -> Callable[[], None]:
    """Put the compressed sum into the module's forward hook -> what puts the original hook back."""
    original = module._forward_hooks[found.hook]

    def hook(module, inputs, outputs):
        config = config_of(module)
        if config is None or _with_gradients(module, outputs, config, found.group):
            return original(module, inputs, outputs)
        total = _sum(module, _partial(module, outputs), config, found.group)
        if isinstance(outputs, DTensor):
            return found.output(
                module, DTensor.from_local(total, found.mesh, [Replicate()], run_check=False), found.mesh
            )
        return found.output(module, total, _OneRank)

    hook.lowbit_installed = found
    module._forward_hooks[found.hook] = hook

    def undo() -> None:
        module._forward_hooks[found.hook] = original

    return undo


def _sum(module: torch.nn.Module, partial: torch.Tensor, config: CommConfig, group: ProcessGroup) -> torch.Tensor:
    return communicator(group, config).all_reduce(partial, module.lowbit_site)


def _partial(module: torch.nn.Module, output: torch.Tensor) -> torch.Tensor:
    """This rank's part of the sum, an ordinary tensor."""
    if not isinstance(output, DTensor):
        return output
    if not all(isinstance(placement, Partial) for placement in output.placements):
        raise ConfigError(
            f"{module.lowbit_site} was summed before it could be compressed: call the model under torch.no_grad()"
        )
    return output.to_local()


def _with_gradients(module: torch.nn.Module, output: torch.Tensor, config: CommConfig, group: ProcessGroup) -> bool:
    """Whether Transformers has to make this sum, which needs gradients and would not be rounded anyway.

    Raises ConfigError if it would be.
    """
    if not (torch.is_grad_enabled() and output.requires_grad):
        return False
    site = module.lowbit_site
    if config.algorithm != "exact" and config.selects(site) and not _lossless(config, output.dtype):
        raise ConfigError(
            f"{site} needs gradients, and {config.spec} has none: call the model under torch.no_grad() "
            "(model.generate does), or train with the handle disabled"
        )
    telemetry.record(
        site,
        values=output.numel(),
        plain=telemetry.ring_bytes(2 * output.numel(), group.size()),
        sent=telemetry.ring_bytes(output.numel() * output.itemsize, group.size()),
        path="exact",
        backend=backend.of(output.device),
        fallback="gradients",
    )
    return True


def _lossless(config: CommConfig, dtype: torch.dtype) -> bool:
    legs = [leg for spec in config.all_specs for leg in (spec.scatter, spec.gather)]
    return all(leg.name in PASSTHROUGH and _LOSSLESS[leg.name] in (None, dtype) for leg in legs)
