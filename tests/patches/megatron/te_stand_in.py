"""Stands in for Transformer Engine, which needs CUDA: a package of that name with what Megatron-Core imports of it.

`install()` puts it into sys.modules, before Megatron is imported, so that Megatron's own TERowParallelLinear and its
kin build and run on the CPU. Linear has the attributes and the order of things of TE 2.x's pytorch/module/linear.py:
what is sent in which parallel_mode, whether the bias is fused, added behind the reduce or returned, what the backward
sends. There are no kernels, no FP8, no user buffers. All collectives are torch.distributed's own, and noted in `sent`.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F

VERSION = "2.6.0"
sent: list[tuple[str, tuple[int, ...]]] = []  # (collective, shape) of what this stand-in sent in forwards


def gather_along_first_dim(x, process_group, **_):
    sent.append(("all-gather", tuple(x.shape)))
    out = x.new_empty((x.shape[0] * process_group.size(), *x.shape[1:]))
    dist.all_gather_into_tensor(out, x.contiguous(), group=process_group)
    return out, None


def reduce_scatter_along_first_dim(x, tp_group, **_):
    sent.append(("reduce-scatter", tuple(x.shape)))
    out = x.new_empty((x.shape[0] // tp_group.size(), *x.shape[1:]))
    dist.reduce_scatter_tensor(out, x.contiguous(), group=tp_group)
    return out, None


def allreduce(x, tp_group, **_):
    sent.append(("all-reduce", tuple(x.shape)))
    x = x.clone()
    dist.all_reduce(x, group=tp_group)
    return x, None


def _as_function(forward, backward):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, group):
            ctx.group = group
            return forward(x, group)

        @staticmethod
        def backward(ctx, grad):
            return backward(grad, ctx.group), None

    return Function.apply


def _nothing(x, group):
    return x.view_as(x)


def _first(function):
    return lambda x, group: function(x, group)[0]


_gather = _gather_normed = _as_function(_first(gather_along_first_dim), _first(reduce_scatter_along_first_dim))
_scatter = _as_function(_first(reduce_scatter_along_first_dim), _first(gather_along_first_dim))
_reduce = _as_function(_first(allreduce), _nothing)
_copy = _as_function(_nothing, _first(allreduce))


class _Module(torch.nn.Module):
    """TransformerEngineBaseModule: the process group, and whether it was set."""

    def set_tensor_parallel_group(self, tp_group):
        self.tp_group = tp_group
        self.tp_group_initialized = True

    def prepare_forward(self):
        if self.tp_size > 1:
            assert self.tp_group_initialized, "TP group not initialized."


class Linear(_Module):
    def __init__(
        self, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None,
        tp_size=1, get_rng_state_tracker=None, init_method=None, bias=True, return_bias=False, params_dtype=None,
        parallel_mode=None, parameters_split=None, device="cuda", ub_overlap_ag=False, ub_overlap_rs=False,
        ub_name=None, rng_tracker_name=None, symmetric_ar_type=None, **_,
    ):  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.use_bias, self.return_bias, self.apply_bias = bias, return_bias, bias and not return_bias
        self.symmetric_ar_type, self.ub_name = symmetric_ar_type, ub_name
        if tp_group is None:
            self.tp_size = tp_size
            if tp_size == 1:
                self.set_tensor_parallel_group(tp_group)
        else:
            self.tp_size = dist.get_world_size(tp_group)
            self.set_tensor_parallel_group(tp_group)
        self.parallel_mode = parallel_mode
        assert parallel_mode in ("column", "row", None)
        if parallel_mode == "column":
            self.out_features //= self.tp_size
        elif parallel_mode == "row":
            self.in_features //= self.tp_size
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        row, column = (parallel_mode == mode and self.sequence_parallel for mode in ("row", "column"))
        self.ub_overlap_ag_fprop, self.ub_overlap_rs_fprop = column and ub_overlap_ag, row and ub_overlap_rs
        self.weight = torch.nn.Parameter(torch.empty(self.out_features, self.in_features, dtype=params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(self.out_features, dtype=params_dtype)) if bias else torch.Tensor()
        if init_method is not None:
            init_method(self.weight)
        self.gemm_bias_unfused_add = parallel_mode == "row" and self.apply_bias

    def forward(self, x, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        self.prepare_forward()
        return self._multiply(x, _gather)

    def _multiply(self, x, gather):
        if self.parallel_mode == "column" and self.tp_size > 1:
            x = gather(x, self.tp_group) if self.sequence_parallel else _copy(x, self.tp_group)
        out = F.linear(x, self.weight, self.bias if self.apply_bias and not self.gemm_bias_unfused_add else None)
        if self.parallel_mode == "row" and self.tp_size > 1:
            out = _scatter(out, self.tp_group) if self.sequence_parallel else _reduce(out, self.tp_group)
        if self.gemm_bias_unfused_add:
            out = out + self.bias
        return (out, self.bias) if self.return_bias else out


class RMSNorm(torch.nn.Module):
    def __init__(self, hidden_size, eps=1e-5, sequence_parallel=False, **_):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(hidden_size)), eps

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, eps=1e-5, normalization="LayerNorm", **kwargs):
        for name in ("return_layernorm_output", "zero_centered_gamma"):
            kwargs.pop(name, None)
        super().__init__(in_features, out_features, **kwargs)
        self.layer_norm_weight, self.eps = torch.nn.Parameter(torch.ones(in_features)), eps
        self.normalization = normalization

    def forward(self, x, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        self.prepare_forward()
        return self._multiply(F.rms_norm(x, (x.shape[-1],), self.layer_norm_weight, self.eps), _gather_normed)


class _Unused(torch.nn.Module):
    """Classes that Megatron only derives from or names."""


@contextmanager
def _autocast(*_, **__):
    yield


def _module(name: str, **contents) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = []  # a package: what is not there is an ImportError, which Megatron expects
    vars(module).update(contents)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    return module


def rmsnorm_fwd(x, weight, eps, *_):
    return F.rms_norm(x, (x.shape[-1],), weight, eps), None, None


def install() -> None:
    """Put the package into sys.modules. Megatron must not have been imported."""
    assert "megatron.core" not in sys.modules
    unused = {name: type(name, (_Unused,), {}) for name in ("GroupedLinear", "DotProductAttention", "LayerNorm")}
    names = ("Sequential", "FusibleOperation", "BasicLinear", "Bias", "AllReduce", "ReduceScatter")
    collectives = (gather_along_first_dim, reduce_scatter_along_first_dim, allreduce)
    _module("transformer_engine", __version__=VERSION)
    _module("transformer_engine.common")
    _module("transformer_engine.common.recipe", DelayedScaling=type("DelayedScaling", (), {}))
    _module("transformer_engine.pytorch", Linear=Linear, LayerNormLinear=LayerNormLinear, RMSNorm=RMSNorm, **unused)
    _module("transformer_engine.pytorch.ops", **{name: type(name, (_Unused,), {}) for name in names})
    state = SimpleNamespace(is_fp8_enabled=lambda: False)
    _module("transformer_engine.pytorch.fp8", FP8GlobalStateManager=state, fp8_autocast=_autocast)
    _module(
        "transformer_engine.pytorch.distributed",
        CudaRNGStatesTracker=type("CudaRNGStatesTracker", (), {}),
        activation_recompute_forward=_autocast,
        **{function.__name__: function for function in collectives},
    )
    _module("transformer_engine.pytorch.tensor", QuantizedTensor=type("QuantizedTensor", (), {}))
    _module("transformer_engine.pytorch.constants", TE_DType={torch.float32: 0, torch.bfloat16: 1})
    _module("transformer_engine.pytorch.cpp_extensions", rmsnorm_fwd=rmsnorm_fwd)
