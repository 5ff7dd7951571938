"""Transformer Engine's linear layers: the reduce behind TERowParallelLinear, the gather before TEColumnParallelLinear.

Both communicate inside of TE, which asks its module's attributes whether and how. For the duration of one forward those
say that there is nothing to do, so that TE multiplies and returns the local product without its bias; reducing and the
bias, in that order, come afterwards, as gathering came before. TE's forward is called, never copied, so it keeps its
own precision, weight caches and backward; the backward of what was moved out is the exact collective's.

TELayerNormColumnParallelLinear normalises and gathers in one function of TE and stays exact; its gathers are counted as
such. TE's grouped linear layers do not communicate, dispatchers do it for them (moe.py).

Hazards: two threads must not run one layer at the same time. A layer that gathers saves all tokens for its backward,
where TE would save this rank's alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_lowbit import telemetry
from megatron_lowbit.codecs import backend
from megatron_lowbit.config import CommConfig
from megatron_lowbit.errors import ModelError

from . import collectives
from .compat import group_of
from .hooks import config_of, site_of

try:
    from megatron.core.extensions import transformer_engine as extensions
except ImportError:  # older releases import Transformer Engine unconditionally
    extensions = None
ROW, COLUMN, NORM_COLUMN = (  # without Transformer Engine newer releases derive them from a mock
    kind if isinstance(kind := getattr(extensions, name, None), type) else None
    for name in ("TERowParallelLinear", "TEColumnParallelLinear", "TELayerNormColumnParallelLinear")
)

GATHER, UNNAMED_COLUMN = ".gather", "column_parallel"
FUSED = "gathered within Transformer Engine"
_ALONE = {"parallel_mode": None, "sequence_parallel": False, "tp_size": 1}
WITHOUT_BIAS = _ALONE | {"apply_bias": False, "gemm_bias_unfused_add": False}
_USER_BUFFERS = (  # as releases of Transformer Engine call them
    "ub_overlap_rs_fprop",
    "ub_overlap_ag_fprop",
    "ub_overlap_rs",
    "ub_overlap_ag",
    "ub_split_rs",
    "ub_split_ag",
    "ub_atomic_gemm_rs",
    "ub_atomic_gemm_ag",
)


def takes(module: torch.nn.Module) -> bool:
    return _reduces(module) or _gathers(module, COLUMN) or _gathers(module, NORM_COLUMN)


def messages(module: torch.nn.Module, site: str, config: CommConfig) -> list[str]:
    sent = site if _reduces(module) else site + GATHER
    if config.selects(sent) and not _gathers(module, NORM_COLUMN):
        check(module, site)
        if "forward" in vars(module):
            raise ModelError(
                f"{site} is a {type(module).__name__} whose forward was replaced on the object, as "
                "prepare_model_for_fp8_inference does, and would not be compressed: enable before that, or leave the "
                "site out (--lowbit-comm-sites)"
            )
    return [sent]


def wrappers() -> list[tuple]:
    kinds = ((ROW, _row), (COLUMN, _column), (NORM_COLUMN, _norm_column))
    return [(kind, "forward", wrapper) for kind, wrapper in kinds if kind is not None]


def check(module: torch.nn.Module, site: str) -> None:
    """Raise ModelError if the module communicates in a way that its attributes do not switch off."""
    attributes = vars(module)
    if any(attributes.get(name) for name in _USER_BUFFERS):
        raise ModelError(
            f"{site} is a {type(module).__name__} that communicates while it multiplies, in user buffers: leave out "
            "--tp-comm-overlap (tp_comm_overlap)"
        )
    if attributes.get("symmetric_ar_type") or getattr(module.config, "symmetric_ar_type", None):
        raise ModelError(
            f"{site} is a {type(module).__name__} that all-reduces in symmetric memory: leave out --symmetric-ar-type "
            "(symmetric_ar_type)"
        )


@contextmanager
def saying(module: torch.nn.Module, values: dict[str, object]) -> Iterator[None]:
    """Within, the module has these values of the attributes that it has at all."""
    attributes = vars(module)
    before = {name: attributes[name] for name in values if name in attributes}
    try:
        attributes.update({name: values[name] for name in before})
        yield
    finally:
        attributes.update(before)


def _reduces(module: torch.nn.Module) -> bool:
    return ROW is not None and isinstance(module, ROW) and module.parallel_mode == "row"


def _gathers(module: torch.nn.Module, kind: type | None) -> bool:
    return (
        kind is not None and isinstance(module, kind) and module.parallel_mode == "column" and module.sequence_parallel
    )


def _row(base):
    def forward(self, x):
        config = config_of(self)
        if config is None or self.parallel_mode != "row" or self.tp_size == 1:
            return base(self, x)
        site, apply_bias = site_of(self), self.apply_bias
        if config.selects(site):
            check(self, site)
        with saying(self, WITHOUT_BIAS):
            partial, bias = base(self, x)
        out = collectives.reduce(self, partial, config, site)
        return (out + self.bias.to(out.dtype) if apply_bias else out), bias

    return forward


def _column(base):
    def forward(self, x):
        config = config_of(self)
        if config is None or not _gathers(self, COLUMN) or self.tp_size == 1:
            return base(self, x)
        site = site_of(self, UNNAMED_COLUMN, GATHER)
        if config.selects(site):
            check(self, site)
        x = collectives.all_gather(x, group_of(self), config, site)
        with saying(self, _ALONE):
            return base(self, x)

    return forward


def _norm_column(base):
    def forward(self, x):
        if (config := config_of(self)) is not None and _gathers(self, NORM_COLUMN) and self.tp_size > 1:
            site, sent = site_of(self, UNNAMED_COLUMN, GATHER), (self.tp_size - 1) * x.numel()
            telemetry.record(
                site,
                values=x.numel(),
                plain=2 * sent,
                sent=x.itemsize * sent,
                path="exact",
                backend=backend.of(x.device),
                fallback=FUSED if config.selects(site) else "site not selected",
            )
        return base(self, x)

    return forward
