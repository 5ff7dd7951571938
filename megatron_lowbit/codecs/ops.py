"""The operations of codecs as PyTorch operators (`torch.ops.megatron_lowbit`), so that compiled graphs can hold them.

An operator names its codec by number (`Codec.handle`), as graphs hold no objects. All of them write into tensors they
are given. Outside of torch.compile the functions below call the kernels without the detour over the dispatcher, which
costs some microseconds. Fake implementations have nothing to do: nothing is returned.
"""

from __future__ import annotations

import weakref

import torch

from ..errors import ConfigError
from . import backend

ALIGNMENT = 16
_codecs: weakref.WeakValueDictionary[int, object] = weakref.WeakValueDictionary()
_library = torch.library.Library("megatron_lowbit", "DEF")
_count = 0


def register(codec: object) -> int:
    """A number by which operators find `codec` as long as it lives."""
    global _count
    _count += 1
    _codecs[_count] = codec
    return _count


def _codec(handle: int):
    try:
        return _codecs[handle]
    except KeyError:
        raise ConfigError(
            f"codec number {handle} is gone: a compiled graph outlived the codec it was made with; keep a reference to "
            "that, or compile anew"
        ) from None


def encode(codec, x, wires, world: int = 1, small: int = 0, large: int = 0) -> None:
    """x [rows, features] -> wires: of all rows, or of `world` shards of `small` or `large` bytes, one after another."""
    call = torch.ops.megatron_lowbit.encode if torch.compiler.is_compiling() else _encode
    call(x, wires, codec.handle, world, small, large)


def reduce(codec, wires, out, world: int = 1, small: int = 0, large: int = 0) -> None:
    """wires uint8 [n, bytes], each as `encode` makes them -> their sum, out [rows, features]."""
    call = torch.ops.megatron_lowbit.reduce if torch.compiler.is_compiling() else _reduce
    call(wires, out, codec.handle, world, small, large)


def reduce_encode(source, wires, target, shape: tuple[int, int], out) -> None:
    """wires uint8 [n, bytes] in `source` -> the wire in `target` of their sum."""
    call = torch.ops.megatron_lowbit.reduce_encode if torch.compiler.is_compiling() else _reduce_encode
    call(wires, out, source.handle, target.handle, *shape)


def reduce_add_rmsnorm(codec, wires, rows, world, slot, residual, weight, eps, offset, normed, summed) -> None:
    """wires uint8 [n, bytes], of `rows` rows in `world` shards `slot` bytes apart; see fused.reduce_add_rmsnorm."""
    compiling = torch.compiler.is_compiling()
    call = torch.ops.megatron_lowbit.reduce_add_rmsnorm if compiling else _reduce_add_rmsnorm
    call(wires, residual, weight, normed, summed, codec.handle, rows, world, slot, eps, offset)


def _encode(x, wires, handle, world, small, large):
    shards = () if world == 1 else (world, (small, large))
    backend.run("encode", _codec(handle), x.device)(x, wires, *shards)


def _reduce(wires, out, handle, world, small, large):
    if wires.data_ptr() % ALIGNMENT:  # a slice of some larger buffer
        wires = wires.clone()
    shards = () if world == 1 else (world, (small, large))
    backend.run("reduce", _codec(handle), out.device)(wires, out, *shards)


def _reduce_encode(wires, out, source, target, rows, features):
    backend.run("reduce_encode", _codec(source), out.device)(wires, _codec(target), (rows, features), out)


def _reduce_add_rmsnorm(wires, residual, weight, normed, summed, handle, rows, world, slot, eps, offset):
    launch = backend.run("reduce_add_rmsnorm", _codec(handle), residual.device)
    launch(wires, rows, world, slot, residual, weight, eps, offset, normed, summed)


def _define(name: str, schema: str, function) -> None:
    _library.define(f"{name}({schema}) -> ()")
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"megatron_lowbit::{name}", lambda *_: None, lib=_library)


_SHARDS = "int codec, SymInt world, SymInt small, SymInt large"
_define("encode", f"Tensor x, Tensor(a!) wires, {_SHARDS}", _encode)
_define("reduce", f"Tensor wires, Tensor(a!) out, {_SHARDS}", _reduce)
_define(
    "reduce_encode",
    "Tensor wires, Tensor(a!) out, int source, int target, SymInt rows, SymInt features",
    _reduce_encode,
)
_define(
    "reduce_add_rmsnorm",
    "Tensor wires, Tensor residual, Tensor weight, Tensor(a!) normed, Tensor(b!) summed, int codec, SymInt rows, "
    "SymInt world, SymInt slot, float eps, float offset",
    _reduce_add_rmsnorm,
)
