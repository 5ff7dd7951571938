"""Outlier features in Triton kernels: which they are, how rows and tiles meet, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch

import megatron_lowbit as lowbit
from megatron_lowbit.codecs import fused
from megatron_lowbit.codecs.statistics import Statistics
from tests.codecs import samples
from tests.codecs.test_outliers import bound_codec

launch = pytest.importorskip("megatron_lowbit.kernels.triton_launch")
KINDS = ("gaussian", "heavy", "nan", "span", "both infs", "ramp")
BASES = ("int4:g32", "int5:g64:sym", "fp8:g128", "int3:g32:spike")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def everything_else_as_defined(monkeypatch):
    monkeypatch.setenv("LOWBIT_BACKEND", "reference")


def spread(features: int, count: int) -> tuple[int, ...]:
    return samples.statistics(features, count, seed=features).outliers


def encoded(codec, x: torch.Tensor) -> torch.Tensor:
    wire = torch.full((codec.wire_nbytes(x.shape),), 0xA5, dtype=torch.uint8)
    codec.define_encode(x, wire)
    return wire


def check(codec, other, features: int, rows: int, seed: int, wires: int) -> None:
    """Every operation, on rows as they are and on split ones. other: with the same outliers."""
    dtype = DTYPES[seed % 3]
    parts = [samples.rows(features, seed + n, KINDS[:rows]).to(dtype) for n in range(wires)]
    for own in (codec, codec.inner):
        wire = torch.full((own.wire_nbytes(parts[0].shape) + 32,), 0xA5, dtype=torch.uint8)
        launch.encode(own, parts[0], wire[16:-16])()
        assert torch.equal(wire[16:-16], encoded(own, parts[0]))
        assert (wire[:16] == 0xA5).all() and (wire[-16:] == 0xA5).all()
        received = torch.stack([encoded(own, x) for x in parts])
        out = torch.full((rows + 2, features), 7.0, dtype=dtype)
        launch.reduce(own, received, out[1:-1])()
        expected = torch.empty(rows, features, dtype=dtype)
        own.define_reduce(received, expected)
        assert samples.same_bits(out[1:-1], expected)
        assert (out[0] == 7).all() and (out[-1] == 7).all()
    source, target, total = codec.inner, other.inner, torch.empty(rows, features)
    wire = torch.full((target.wire_nbytes(total.shape) + 32,), 0xA5, dtype=torch.uint8)
    launch.reduce_encode(source, received, target, (rows, features), wire[16:-16])()
    source.define_reduce(received, total)
    assert torch.equal(wire[16:-16], encoded(target, total))
    assert (wire[:16] == 0xA5).all() and (wire[-16:] == 0xA5).all()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("features", [1, 33, 292])
def test_any_features_may_be_outliers(base, features):
    seed = BASES.index(base)
    every = tuple(range(features))
    chosen = (
        spread(features, max(1, features // 20)),
        every[:1],
        every[-1:],
        every[features // 3 :],
        every[1::2],
        every,
    )
    for n, outliers in enumerate(chosen[seed % 2 :: 2]):
        if outliers:
            codec, other = (bound_codec(name, features, outliers) for name in (base, "int8:g32"))
            check(codec, other, features, 3, seed + n, 1 + n)


@pytest.mark.parametrize("base, features, count, rows", [
    ("int4:g32", 4096, 64, 3),  # rows of 126 blocks in tiles of 128
    ("int4:g128", 4096, 64, 2),  # and which end within a group
    ("int8:g256:sym", 1280, 256, 3),  # more than one outlier for each block
    ("nvfp4", 1088, 64, 2),  # tiles of a row where encoding, of several where decoding
    ("int6:g64", 4200, 65, 2),  # rows that end within a block
])  # fmt: skip
def test_rows_across_tiles(base, features, count, rows):
    codec = bound_codec(base, features, spread(features, count))
    check(codec, codec, features, rows, count, 2)


@pytest.mark.parametrize("base", ["int4:g32", "int4:g128"])
def test_shards(base):
    rows, features, world = 5, 1024, 3
    codec, x = bound_codec(base, features, spread(features, 32)), samples.rows(features, 1, KINDS[:5]).bfloat16()
    bounds = [rows * rank // world for rank in range(world + 1)]
    shards = [x[a:b] for a, b in itertools.pairwise(bounds)]
    sizes = [codec.wire_nbytes(shard.shape) for shard in shards]
    wires = torch.full((sum(sizes),), 0xA5, dtype=torch.uint8)
    launch.encode(codec, x, wires, world, (min(sizes), max(sizes)))()
    assert torch.equal(wires, torch.cat([encoded(codec, shard) for shard in shards]))
    out, slots = torch.empty_like(x), torch.full((world, max(sizes)), 0xA5, dtype=torch.uint8)
    for slot, wire in zip(slots, wires.split(sizes)):
        slot[: len(wire)] = wire
    launch.reduce(codec, slots.view(1, -1), out, world, (max(sizes), max(sizes)))()
    values = [codec.decode(wire, shard.shape, x.dtype) for wire, shard in zip(wires.split(sizes), shards)]
    assert samples.same_bits(out, torch.cat(values))


def test_tables_are_made_once():
    codec, cpu = bound_codec("int4:g32", 256, (3, 77)), torch.device("cpu")
    assert codec.index(cpu, 256, 4096) is codec.index(cpu, 256, 4096) is codec.inner.index(cpu, 256, 4096)
    assert codec.index(cpu, 256, 4096) is not codec.index(cpu, 256, 256)
    assert codec.table(cpu) is codec.table(cpu) is codec.inner.table(cpu)


def test_codecs_that_split_rows_otherwise_cannot_meet():
    wires, out = torch.zeros(2, 4096, dtype=torch.uint8), torch.zeros(4096, dtype=torch.uint8)
    codec, plain = bound_codec("int4:g32", 128, (5, 6)), lowbit.codec("int4:g32")
    other = bound_codec("int4:g32", 128, (5, 7))
    for source, target in ((codec, codec), (codec.inner, plain), (plain, codec.inner), (codec.inner, other.inner)):
        with pytest.raises(lowbit.ConfigError, match="do not split rows alike.*inner codecs.*or reduce to fp32"):
            launch.reduce_encode(source, wires, target, (2, 128), out)


def test_tensors_of_other_features_are_refused():
    codec, x = bound_codec("int4:g32", 128, (5, 6)), torch.zeros(2, 64)
    wires = torch.zeros(2, 4096, dtype=torch.uint8)
    for some in (codec, codec.inner):
        with pytest.raises(lowbit.ConfigError, match="64 features at a site that was calibrated with 128"):
            launch.encode(some, x, wires[0])
        with pytest.raises(lowbit.ConfigError, match="64 features at a site that was calibrated with 128"):
            launch.reduce(some, wires, x)
    unbound = lowbit.codec("int4:g32:outliers=1/64")
    for some in (unbound, unbound.inner):
        with pytest.raises(lowbit.ConfigError, match="needs a calibration"):
            launch.encode(some, x, wires[0])


@pytest.mark.parametrize("gather, launched", [("int8:g64", ["reduce_encode"]), ("plain", ["reduce", "encode"])])
def test_legs_that_split_alike_meet_in_one_launch(monkeypatch, gather, launched):
    outliers, shape, seen = spread(160, 10), (3, 160), []
    source = bound_codec("int4:g32", 160, outliers)
    target = lowbit.codec("int8:g64") if gather == "plain" else bound_codec(gather, 160, outliers)
    wires = torch.stack([source.encode(samples.rows(160, n, KINDS[:3])) for n in range(3)])
    run, results = launch.Launch.__call__, []
    monkeypatch.setattr(launch.Launch, "__call__", lambda self: (seen.append(self.kernel.fn.__name__), run(self)))
    for backend in ("reference", "triton"):
        monkeypatch.setenv("LOWBIT_BACKEND", backend)
        wire = torch.full((target.wire_nbytes(shape),), 0xA5, dtype=torch.uint8)
        fused.reduce_encode(source, wires, target, shape, wire, lambda: torch.empty(shape))
        results.append(wire)
    assert torch.equal(*results) and seen == launched


def test_rmsnorm_after_outliers(monkeypatch):
    """No kernel has rows in their order then, so that the sum is written first."""
    codec, x = bound_codec("int4:g32", 96, spread(96, 6)), samples.rows(96, 0, ("gaussian", "offset"))
    results = []
    for backend in ("reference", "triton"):
        monkeypatch.setenv("LOWBIT_BACKEND", backend)
        normed, summed = torch.empty_like(x), torch.empty_like(x)
        wires = torch.stack([codec.encode(x), codec.encode(-2 * x)])
        fused.reduce_add_rmsnorm(codec, wires, None, x, torch.ones(96), 1e-6, 0.0, normed, summed)
        results.append(torch.cat([normed, summed]))
    assert samples.same_bits(*results)


def test_statistics_of_one_leg_may_be_an_equal_copy():
    outliers = spread(96, 6)
    low = torch.zeros(1, 96)
    legs = [lowbit.codec(f"{name}:outliers=1/16").bind(Statistics(tuple(outliers), low, low + 1), 0).inner
            for name in ("int4:g32", "int8:g32")]  # fmt: skip
    wire = torch.stack([encoded(legs[0], samples.rows(96, 0, KINDS[:2]))])
    out = torch.empty(legs[1].wire_nbytes((2, 96)), dtype=torch.uint8)
    launch.reduce_encode(legs[0], wire, legs[1], (2, 96), out)()
    total = torch.empty(2, 96)
    legs[0].define_reduce(wire, total)
    assert torch.equal(out, encoded(legs[1], total))
