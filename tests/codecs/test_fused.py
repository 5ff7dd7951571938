"""Several steps at once, against the single steps; RMSNorm against PyTorch's in fp64."""

from __future__ import annotations

import pytest
import torch

import megatron_lowbit as lowbit
from megatron_lowbit.codecs import fused
from megatron_lowbit.collectives import layout
from tests.codecs.samples import same_bits
from tests.tensors import DTYPES, sample

pytest.importorskip("triton")
BACKENDS = ["reference", "numba", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setenv("LOWBIT_BACKEND", request.param)
    return request.param


@pytest.fixture
def launches(monkeypatch):
    """The Triton kernels that were launched."""
    from megatron_lowbit.kernels.triton_launch import Launch

    seen, run = [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self: (seen.append(self.kernel.fn.__name__), run(self)))
    return seen


@pytest.mark.parametrize("features", [64, 41])
def test_shards_there_and_back(backend, launches, features):
    x, codec = sample(0, (7, features), torch.bfloat16), lowbit.codec("int5:g32")
    shards = layout.shard(x.shape, (codec,), 3)
    lengths = shards.wire_nbytes(codec)
    wires = torch.full((sum(lengths),), 0xA5, dtype=torch.uint8)
    fused.encode_shards(codec, shards.of_all(x), shards.bounds, wires)
    assert torch.equal(wires, torch.cat([codec.encode(shards.of(x, rank)) for rank in range(3)]))

    slots = torch.full((3, max(lengths) + 16), 0xA5, dtype=torch.uint8)
    for slot, wire in zip(slots, wires.split(lengths)):
        slot[: len(wire)] = wire
    out = torch.empty_like(x)
    fused.decode_shards(codec, slots, shards.bounds, shards.of_all(out))
    expected = [codec.decode(w, shards.shape(r), x.dtype) for r, w in enumerate(wires.split(lengths))]
    assert same_bits(shards.of_all(out), torch.cat(expected))
    if backend == "triton":
        assert launches.count("encode") == 4 and launches.count("reduce") == 4  # one of each does three shards


def test_uneven_shards_are_done_one_by_one(backend):
    x, codec, bounds = sample(0, (5, 32), torch.float32), lowbit.codec("int4:g32"), (0, 3, 3, 5)
    wires = torch.empty(codec.wire_nbytes((3, 32)) + codec.wire_nbytes((2, 32)), dtype=torch.uint8)
    fused.encode_shards(codec, x, bounds, wires)
    assert torch.equal(wires, torch.cat([codec.encode(x[:3]), codec.encode(x[3:])]))


def test_shards_without_values(backend):
    codec = lowbit.codec("int4:g32")
    fused.encode_shards(codec, torch.empty(0, 32), (0, 0, 0), torch.empty(0, dtype=torch.uint8))
    x, out = sample(0, (1, 32), torch.float32), torch.empty(1, 32)
    wires = torch.zeros(3, codec.wire_nbytes((1, 32)), dtype=torch.uint8)
    fused.encode_shards(codec, x, (0, 0, 0, 1), wires[2])
    fused.decode_shards(codec, wires, (0, 0, 0, 1), out)
    assert same_bits(out, codec.decode(codec.encode(x), x.shape, x.dtype))


@pytest.mark.parametrize("target", ["int4:g32", "int8:g128"])
def test_reduce_encode(backend, launches, target):
    source, target = lowbit.codec("int4:g32"), lowbit.codec(target)
    parts = [sample(seed, (3, 96), torch.float32) for seed in range(4)]
    wires, total = torch.stack([source.encode(x) for x in parts]), torch.empty(3, 96)
    wire = torch.empty(target.wire_nbytes((3, 96)), dtype=torch.uint8)
    asked = []
    fused.reduce_encode(source, wires, target, (3, 96), wire, lambda: asked.append(1) or torch.empty(3, 96))
    source.reduce_rows(wires, total)
    assert torch.equal(wire, target.encode(total))
    assert asked == ([] if backend == "triton" else [1])  # on a GPU the sum is written nowhere
    if backend == "triton":
        assert launches[-3:-2] == ["reduce_encode"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [1, 32, 41, 256, 300])
def test_rmsnorm_of_one_shot_and_of_shards(backend, launches, dtype, features):
    codec, world = lowbit.codec("int8:g128" if features == 256 else "int6:g32"), 3
    parts = [sample(seed, (5, features), dtype) for seed in range(world)]
    residual, weight = sample(9, (5, features), dtype) * 4, sample(10, (features,), DTYPES[features % 3])
    wires = torch.stack([codec.encode(x) for x in parts])
    total = torch.empty_like(residual)
    codec.reduce_rows(wires, total)
    h = (total.float() + residual.float()).to(dtype)
    root = (h.double().square().mean(1, keepdim=True) + 1e-5).sqrt()
    exact = h.double() / root * (weight.double() + 1)

    shards = layout.shard(total.shape, (codec,), world)
    slots = torch.zeros(world, max(shards.wire_nbytes(codec)), dtype=torch.uint8)
    for rank, slot in enumerate(slots):
        wire = codec.encode(shards.of(parts[0], rank))
        slot[: len(wire)] = wire
    single = codec.decode(codec.encode(parts[0]), (5, features), dtype)
    for bounds, given, expected in ((None, wires, h), (shards.bounds, slots, (single.float() + residual.float()))):
        normed, summed = torch.full_like(residual, 7), torch.full_like(residual, 7)
        del launches[:]
        fused.reduce_add_rmsnorm(codec, given, bounds, residual, weight, 1e-5, 1.0, normed, summed)
        assert same_bits(summed, expected.to(dtype))
        defined, copy = torch.empty_like(residual), (total if bounds is None else single).clone()
        fused.add_rmsnorm(copy, residual, weight, 1e-5, 1.0, defined)
        assert same_bits(normed, defined)
        if bounds is None:
            error = (normed.double() - exact).abs()
            assert (error <= exact.abs() * (2e-6 + torch.finfo(dtype).eps) + 1e-6).all()
        assert launches == (["reduce_add_rmsnorm"] if backend == "triton" else [])


def test_rmsnorm_of_non_finite_rows(backend):
    codec, x = lowbit.codec("int8:g32"), sample(0, (3, 64), torch.float32)
    x[1, 5] = torch.nan
    normed, summed = torch.empty_like(x), torch.empty_like(x)
    wires = codec.encode(x)[None]
    fused.reduce_add_rmsnorm(codec, wires, None, torch.zeros(3, 64), torch.ones(64), 1e-6, 0.0, normed, summed)
    assert normed[1].isnan().all() and normed[[0, 2]].isfinite().all()


def test_what_does_not_fit_is_refused():
    x = torch.zeros(2, 8, dtype=torch.bfloat16)
    with pytest.raises(lowbit.ConfigError, match="residual is .*float32.* pass tensors that are alike"):
        fused.check_norm(x, x.float(), torch.ones(8))
    for weight in (torch.ones(4), torch.ones(8, dtype=torch.int32), torch.ones(1, 8)):
        with pytest.raises(lowbit.ConfigError, match="pass one bf16, fp16 or fp32 number for each of the 8 features"):
            fused.check_norm(x, x, weight)
