"""A finished ModuleSpec with our layers in it: compression of one model, and no class of Megatron's is touched.

    spec = lowbit_spec(get_gpt_layer_local_spec(), CommConfig("int8:g128"))

A class whose methods `megatron_core.LAYERS` would wrap is replaced by a subclass with the wrapped methods; the layer
around it by one that names what it holds as soon as it stands. What a spec cannot reach, such as collectives that
Megatron calls by a global name (of sequence parallelism, of MoE dispatchers), is an error unless `sites` leaves it out.
Layers of an encoder beside a decoder share their names with the decoder's: only a whole model can tell them apart.
For `--spec MODULE NAME` the spec must be a global of a module of the user's (examples/megatron_spec.py).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec, import_module

from megatron_lowbit.config import CommConfig
from megatron_lowbit.errors import ConfigError, ModelError
from megatron_lowbit.patches._handle import asks_for, check_config

from . import compat, sites


def lowbit_spec(spec: Any, config: CommConfig) -> Any:
    """A copy of `spec` whose row-parallel layers send their partial sums as `config` says; `spec` stays as it is.

    spec: a ModuleSpec of a layer or a block, TransformerBlockSubmodules and the like, or lists, dicts and
    functools.partial of them. Raises ModelError for a spec without layers to compress, or with some that cannot be;
    ConfigError while `enable` holds, which would compress a second time.
    """
    from megatron_lowbit.patches import megatron_core

    check_config(config)
    if megatron_core._handles:
        raise ConfigError("low-bit communication is enabled already: leave out lowbit_spec, or the flag and enable()")
    if outside := [site for site in (sites.EMBEDDING, sites.LOGITS) if asks_for(config, site)]:
        raise ConfigError(f"{outside[0]} is not part of a layer's spec: leave it out of sites, or call enable(config)")
    wrappers = _of_classes(megatron_core.LAYERS)
    replaced: list[type] = []

    def swap(kind: type) -> type:
        uncovered = [base.__name__ for base in kind.__mro__ if base.__name__ in megatron_core.UNCOVERED]
        if uncovered:
            raise ModelError(f"the spec has a {kind.__name__}, {megatron_core.UNCOVERED[uncovered[0]]}")
        methods: dict[str, Callable] = {}
        for owner, name, wrap in wrappers:
            if issubclass(kind, owner) and getattr(kind, name) is getattr(owner, name):  # not one of its own
                methods[name] = wrap(methods.get(name, getattr(kind, name)))
        if methods:
            replaced.append(kind)
            return _subclass(kind, methods, _configured(config))
        return _subclass(kind, {}, _named(config)) if issubclass(kind, compat.LAYERS + compat.MTP_LAYERS) else kind

    copied = _rebuilt(spec, swap)
    if not replaced:
        raise ModelError(
            f"no row-parallel layer in the {type(spec).__name__}: pass a finished spec, such as "
            "get_gpt_layer_local_spec() returns"
        )
    return copied


def _of_classes(layers: tuple) -> list[tuple]:
    """The wrappers of layers that wrap classes alone: others answer functions of Megatron's, which nothing here may."""
    wrapped = [layer.wrappers() for layer in layers]
    return [wrapper for each in wrapped if all(isinstance(owner, type) for owner, *_ in each) for wrapper in each]


def _rebuilt(part: Any, swap: Callable[[type], type]) -> Any:
    """A copy of a part of a spec, as deep as specs nest, with every class replaced by swap(class)."""
    again = functools.partial(_rebuilt, swap=swap)
    if isinstance(part, type):
        return swap(part)
    if isinstance(part, ModuleSpec):
        result = copy.copy(part)
        module = part.module
        result.module = again(import_module(module) if isinstance(module, tuple | list) else module)
        result.params, result.submodules = again(part.params), again(part.submodules)
        return result
    if dataclasses.is_dataclass(part):
        result = copy.copy(part)
        for field in dataclasses.fields(part):
            object.__setattr__(result, field.name, again(getattr(part, field.name)))  # some are frozen
        return result
    if isinstance(part, functools.partial):
        return functools.partial(
            again(part.func), *map(again, part.args), **{name: again(value) for name, value in part.keywords.items()}
        )
    if isinstance(part, dict):
        return {key: again(value) for key, value in part.items()}
    if type(part) in (list, tuple):
        return type(part)(map(again, part))
    return part


def _subclass(kind: type, methods: dict[str, Callable], after_init: Callable[[Any], None]) -> type:
    def init(self, *args, **kwargs):
        kind.__init__(self, *args, **kwargs)
        after_init(self)

    return type(kind)(f"LowBit{kind.__name__}", (kind,), methods | {"__init__": init, "__module__": __name__})


def _configured(config: CommConfig) -> Callable:
    def after_init(module: Any) -> None:
        module.lowbit_config = config

    return after_init


def _named(config: CommConfig) -> Callable:
    def after_init(layer: Any) -> None:
        from megatron_lowbit.patches import megatron_core

        megatron_core.Handle(config)._hook(layer, mark=False)
        for path, module in layer.named_modules():
            site = module.__dict__.get("lowbit_site")
            if site is None or "lowbit_config" in module.__dict__:
                continue
            if sent := [sent for sent in megatron_core._messages(site, module, config) if config.selects(sent)]:
                raise ModelError(
                    f"{sent[0]} would go uncompressed: the {type(module).__name__} at {path} is out of the spec's "
                    "reach. Call enable(config) before building instead of lowbit_spec, or leave it out of sites"
                )

    return after_init
