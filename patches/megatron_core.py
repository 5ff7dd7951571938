"""Compressed all-reduce behind Megatron-Core's row-parallel layers.

    handle = lowbit.patches.megatron_core.enable(config)           # every model of the process; call before building
    handle = lowbit.patches.megatron_core.enable(config, model)    # a built model, or a list of its pipeline chunks
    handle.disable()                                               # restores everything

Technique: with `explicit_expert_comm` set, the base forward returns the partial product it would have reduced
(Megatron's own shared experts use it so). The base forward is called, never copied, so it stays right from release to
release. The integer reduces of the MoE router and the embedding's reduce do not pass here and stay exact.

Hazard: the flag is set for the duration of one forward, so two threads must not run one layer at the same time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from megatron_lowbit import telemetry
from megatron_lowbit.communicator import communicator
from megatron_lowbit.config import CommConfig
from megatron_lowbit.errors import ConfigError, ModelError

try:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import RowParallelLinear
    from megatron.core.transformer.transformer_layer import TransformerLayer
except ImportError as error:
    raise ModelError(f"Megatron-Core cannot be imported ({error}): pip install 'megatron-lowbit[megatron]'") from error

# Row-parallel layers that reduce inside other libraries, where this patch cannot reach.
UNCOVERED = ("TERowParallelLinear", "TERowParallelGroupedLinear", "InferenceRowParallelLinear")
_SITE_NAMES = {"self_attention": "attention", "cross_attention": "cross_attention", "mlp": "mlp"}
UNNAMED = "row_parallel"  # the site of layers that were built before a process-wide enable
_installed: Handle | None = None


class Handle:
    """What `enable` did, and how to undo it. As a context manager: disables on exit, raises if nothing was hooked."""

    def __init__(self, config: CommConfig) -> None:
        self.config = config
        self.sites: list[str] = []  # hooked so far; grows while models are built under a process-wide enable
        self._swapped: list[RowParallelLinear] = []
        self._originals = RowParallelLinear.forward, TransformerLayer.__init__

    def disable(self) -> None:
        """Restore the original classes. Calling it again does nothing."""
        global _installed
        for module in self._swapped:
            module.__class__ = RowParallelLinear
            del module.lowbit_config, module.lowbit_site
        self._swapped.clear()
        if _installed is self:
            RowParallelLinear.forward, TransformerLayer.__init__ = self._originals
            _installed = None

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


class LowBitRowParallelLinear(RowParallelLinear):
    """A RowParallelLinear that reduces in low bits; takes the place of a built layer, parameters and all."""

    def forward(self, input_: torch.Tensor):
        return _forward(self, input_, self.lowbit_config, _plain_forward())


def enable(config: CommConfig, model: torch.nn.Module | Iterable[torch.nn.Module] | None = None) -> Handle:
    """Send the row-parallel layers' partial sums as `config` says.

    Without `model`: in every model of this process, best before it is built, so that its layers are checked and named.
    With `model`: in that built model only. Raises ModelError when nothing can be hooked or a layer reduces where this
    patch does not reach, ConfigError when it is already enabled.
    """
    global _installed
    if not isinstance(config, CommConfig):
        raise ConfigError(f"config is {config!r}: pass a CommConfig, such as CommConfig(spec='int4:g32')")
    handle = Handle(config)
    if model is not None:
        chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
        rows = [(site, module) for chunk in chunks for site, module in _row_parallel(chunk)]
        if not rows:
            raise ModelError(
                f"no RowParallelLinear in {' and '.join(type(c).__name__ for c in chunks) or 'an empty list'}: "
                "pass a Megatron-Core model built with the local layer spec and tensor parallelism"
            )
        _check_calibration(config, [site for site, _ in rows])
        for site, module in rows:
            if type(module) is not RowParallelLinear:
                kind = type(module).__name__
                handle.disable()
                raise ModelError(
                    f"{site} is a {kind}, not a plain RowParallelLinear: "
                    + (
                        "disable the earlier handle first"
                        if kind == LowBitRowParallelLinear.__name__
                        else "enable before the model is built, without `model`"
                    )
                )
            module.lowbit_site, module.lowbit_config, module.__class__ = site, config, LowBitRowParallelLinear
            handle._swapped.append(module)
            handle.sites.append(site)
        return handle
    if _installed is not None:
        raise ConfigError(f"already enabled with spec {_installed.config.spec!r}: call that handle's disable() first")

    base_forward, base_layer_init = handle._originals

    def forward(self, input_):
        if not hasattr(self, "lowbit_site"):  # built before: hooked all the same, but its layer is not known
            self.lowbit_site = UNNAMED
        if self.lowbit_site not in handle.sites:
            handle.sites.append(self.lowbit_site)
        return _forward(self, input_, config, base_forward)

    def layer_init(self, *args, **kwargs):
        base_layer_init(self, *args, **kwargs)
        rows = list(_row_parallel(self))
        _check_calibration(config, [site for site, _ in rows])
        for site, module in rows:
            module.lowbit_site = site
            handle.sites.append(site)

    RowParallelLinear.forward, TransformerLayer.__init__ = forward, layer_init
    _installed = handle
    return handle


def _check_calibration(config: CommConfig, sites: list[str]) -> None:
    """Raise ConfigError at once, and not in the middle of a forward, if the calibration lacks a site."""
    if config.calibrated:
        config.calibrated.check(sites=[site for site in sites if config.selects(site)])


def _plain_forward():
    """RowParallelLinear's forward without a process-wide enable() of ours, but with anybody else's patch."""
    return _installed._originals[0] if _installed is not None else RowParallelLinear.forward


def _forward(self: RowParallelLinear, input_: torch.Tensor, config: CommConfig, base_forward):
    group = getattr(self, "tp_group", None) or parallel_state.get_tensor_model_parallel_group()
    if self.explicit_expert_comm or group.size() == 1:
        return base_forward(self, input_)
    if self.sequence_parallel:
        raise ModelError(
            "sequence parallelism reduce-scatters, which is not available in this version: build the model with "
            "sequence_parallel=False"
        )
    site = self.lowbit_site
    if torch.is_grad_enabled() and (input_.requires_grad or self.weight.requires_grad):
        out = base_forward(self, input_)
        telemetry.record(
            site,
            values=out[0].numel(),
            plain=telemetry.ring_bytes(2 * out[0].numel(), group.size()),
            path="exact",
            backend="",
            sent=telemetry.ring_bytes(out[0].numel() * out[0].itemsize, group.size()),
            fallback="gradient mode",
        )
        return out
    flags = self.explicit_expert_comm, self.skip_bias_add
    self.explicit_expert_comm = self.skip_bias_add = True
    try:
        partial, _ = base_forward(self, input_)
    finally:
        self.explicit_expert_comm, self.skip_bias_add = flags
    out = communicator(group, config).all_reduce(partial, site)
    if self.skip_bias_add:
        return out, self.bias
    return (out if self.bias is None else out + self.bias), None


def _row_parallel(model: torch.nn.Module) -> Iterator[tuple[str, RowParallelLinear]]:
    """(site, module) of each row-parallel layer. Raises ModelError for one whose reduce cannot be compressed."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, TransformerLayer)]
    for name, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if kinds & set(UNCOVERED):
            raise ModelError(
                f"{name} is a {type(module).__name__}, whose reduce is not covered in this version: build the "
                "model with the local layer spec (--transformer-impl local)"
            )
        if not isinstance(module, RowParallelLinear) or module.explicit_expert_comm:
            continue
        if module.sequence_parallel:
            raise ModelError(
                f"{name} is sequence parallel, which is not available in this version: build the model with "
                "sequence_parallel=False"
            )
        owner = next(((prefix, layer) for prefix, layer in layers if not prefix or name.startswith(prefix + ".")), None)
        yield (_site(name.removeprefix(owner[0]).strip("."), owner[1].layer_number) if owner else name), module


def _site(path: str, layer_number: int) -> str:
    """A layer-relative module path such as "self_attention.linear_proj" -> "layers.0.attention"."""
    part, _, rest = path.partition(".")
    inner = rest.rpartition(".")[0]  # such as shared_experts within mlp
    return ".".join(["layers", str(layer_number - 1), _SITE_NAMES.get(part, part), *([inner] if inner else [])])
