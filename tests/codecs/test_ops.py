"""The PyTorch operators: what compiled graphs see of the codecs."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

import megatron_lowbit as lowbit
from megatron_lowbit.codecs import backend, fused, ops
from tests.codecs.samples import same_bits
from tests.tensors import DTYPES, sample

pytest.importorskip("triton")
OPERATORS = torch.ops.megatron_lowbit


@pytest.fixture(params=["reference", "numba", "triton"], autouse=True)
def chosen(request, monkeypatch):
    monkeypatch.setenv("LOWBIT_BACKEND", request.param)


def compiled(function, dynamic=None):
    """Without Inductor, which would need a C compiler; fullgraph raises at anything that is not part of the graph."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)


@pytest.mark.parametrize("spec", ["int4:g32", "int8:g128:sym", "bf16"])
def test_encode_and_decode_are_part_of_a_graph(spec):
    codec = lowbit.codec(spec)
    there_and_back = compiled(lambda x: codec.decode(codec.encode(x * 2), x.shape, x.dtype) + 1)
    for dtype in DTYPES:
        x = sample(0, (3, 100), dtype)
        assert same_bits(there_and_back(x), codec.decode(codec.encode(x * 2), x.shape, dtype) + 1)


def test_a_graph_holds_the_operators_and_nothing_of_what_they_do(monkeypatch):
    seen, codec = [], lowbit.codec("int4:g32")

    def keep(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    torch.compile(lambda x: codec.decode(codec.encode(x), x.shape, x.dtype), fullgraph=True, backend=keep)(
        torch.ones(2, 32)
    )
    assert {"megatron_lowbit.encode", "megatron_lowbit.reduce"} <= set(seen)


def test_shapes_may_be_dynamic():
    codec = lowbit.codec("int4:g32")
    there_and_back = compiled(lambda x: codec.decode(codec.encode(x), x.shape, x.dtype), dynamic=True)
    for shape in ((3, 64), (5, 96), (2, 41), (2, 3, 64)):
        x = sample(1, shape, torch.bfloat16)
        assert same_bits(there_and_back(x), codec.decode(codec.encode(x), shape, x.dtype))


def test_the_whole_middle_and_end_of_an_all_reduce():
    source, target, shape = lowbit.codec("int4:g32"), lowbit.codec("int8:g32"), (4, 64)
    parts = torch.stack([source.encode(sample(seed, shape, torch.bfloat16)) for seed in range(3)])
    residual, weight = sample(5, shape, torch.bfloat16), sample(6, (64,), torch.bfloat16)

    def step(wires, residual, weight):
        wire = torch.empty(target.wire_nbytes(shape), dtype=torch.uint8)
        fused.reduce_encode(source, wires, target, shape, wire, lambda: torch.empty(shape))
        normed, summed = torch.empty_like(residual), torch.empty_like(residual)
        fused.reduce_add_rmsnorm(target, wire[None], None, residual, weight, 1e-6, 0.0, normed, summed)
        return wire, normed, summed

    for a, b in zip(compiled(step)(parts, residual, weight), step(parts, residual, weight)):
        assert same_bits(a, b)


def test_operators_do_what_their_schemas_say():
    codec, x = lowbit.codec("int4:g32"), sample(0, (4, 64), torch.float32)
    wire = torch.zeros(codec.wire_nbytes(x.shape), dtype=torch.uint8)
    torch.library.opcheck(OPERATORS.encode.default, (x, wire, codec.handle, 1, 0, 0))
    wires = torch.stack([codec.encode(x)] * 2)
    torch.library.opcheck(OPERATORS.reduce.default, (wires, torch.empty(4, 64), codec.handle, 1, 0, 0))
    if backend.fuses(codec, x.device):
        torch.library.opcheck(OPERATORS.reduce_encode.default, (wires, wire, codec.handle, codec.handle, 4, 64))
        normed, summed = torch.empty(4, 64), torch.empty(4, 64)
        arguments = (wires, x, torch.ones(64), normed, summed, codec.handle, 4, 1, 0, 1e-6, 0.0)
        torch.library.opcheck(OPERATORS.reduce_add_rmsnorm.default, arguments)


def test_numbers_of_codecs():
    codec = lowbit.codec("int4:g32")
    assert codec.handle == lowbit.codec("int4").handle  # the same object
    other = copy.copy(codec)
    assert other.handle != codec.handle and other == codec and ops._codec(other.handle) is other
    handle, x = other.handle, torch.zeros(1, 32)
    del other
    gc.collect()
    with pytest.raises(lowbit.ConfigError, match=f"codec number {handle} is gone: .* compile anew"):
        OPERATORS.encode(x, torch.zeros(48, dtype=torch.uint8), handle, 1, 0, 0)
