"""Every Triton kernel with every codec that has one, in the interpreter, against the definition: bit for bit."""

from __future__ import annotations

import pytest
import torch

import megatron_lowbit as lowbit
from megatron_lowbit.collectives import layout
from tests.codecs import samples
from tests.codecs.test_every_codec import SPECS, bound, fits

launch = pytest.importorskip("megatron_lowbit.kernels.triton_launch")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FEATURES = (256, 100, 33, 7, 512, 292)
ALL = [spec for name in SPECS for spec in SPECS[name] if lowbit.codec(spec).kernel]
# One of each name, with other options each; trellis, whose search takes the interpreter seconds, has tests of its own.
FEW = [
    own[7 * n % len(own)] for n, own in enumerate([s for s in some if "trellis" not in s] for some in SPECS.values())
]
fast_and_slow = [spec if spec in FEW else pytest.param(spec, marks=pytest.mark.slow) for spec in ALL]


def test_every_codec_has_a_kernel():
    assert ALL == [spec for specs in SPECS.values() for spec in specs]


def cases(spec: str):
    """(number, codec, features) for a few numbers of features, others for each spec."""
    codec, first = lowbit.codec(spec), ALL.index(spec)
    chosen = [FEATURES[(first + n) % len(FEATURES)] for n in range(3)]
    return [(n, bound(spec, f), f) for n, f in enumerate(chosen) if fits(codec, f)] or [(0, bound(spec, 256), 256)]


def encoded(codec, x):
    wire = torch.full((codec.wire_nbytes(x.shape),), 0xA5, dtype=torch.uint8)
    codec.define_encode(x, wire)
    return wire


def rows(codec, features: int, seed: int):
    """A row of each kind; a third of them where decoding too has a program for each, as the interpreter is slow."""
    every = samples.rows(features, seed)
    return every[seed % 3 :: 3].clone() if codec.kernel.spoils else every


def same_wires(codec, wires, expected):
    """To the bit, but for the NaNs of passthrough: how a processor converts these is its own affair."""
    dtype = getattr(codec, "dtype", torch.uint8)
    return samples.same(wires.view(dtype), expected.view(dtype))


def same_values(codec, values, expected):
    return (samples.same if hasattr(codec, "dtype") else samples.same_bits)(values, expected)


@pytest.fixture(autouse=True)
def parts_of_codecs_run_as_defined(monkeypatch):
    monkeypatch.setenv("LOWBIT_BACKEND", "reference")


@pytest.mark.parametrize("spec", fast_and_slow)
def test_encode(spec):
    for n, codec, features in cases(spec):
        x = rows(codec, features, n).to(DTYPES[n])
        for own in {codec, codec.inner}:
            wire = torch.full((own.wire_nbytes(x.shape) + 32,), 0xA5, dtype=torch.uint8)
            launch.encode(own, x, wire[16:-16])()
            assert same_wires(own, wire[16:-16], encoded(own, x)), (own, features)
            assert (wire[:16] == 0xA5).all() and (wire[-16:] == 0xA5).all()


@pytest.mark.parametrize("spec", fast_and_slow)
def test_reduce(spec):
    for n, codec, features in cases(spec):
        parts = [rows(codec, features, n + seed) for seed in range(1 + n)]
        for own in {codec, codec.inner}:
            wires = torch.stack([encoded(own.sent_by(rank), x) for rank, x in enumerate(parts)])
            values = torch.full((len(parts[0]) + 2, features), 7.0, dtype=DTYPES[n])
            launch.reduce(own, wires, values[1:-1])()
            expected = torch.empty_like(values[1:-1])
            own.define_reduce(wires, expected)
            assert same_values(own, values[1:-1], expected), (own, features)
            assert (values[0] == 7).all() and (values[-1] == 7).all()


@pytest.mark.parametrize("spec", fast_and_slow)
def test_reduce_encode(spec):
    """With the same codec, and with another one that has room for the same rows."""
    others = [other for other in ALL if not lowbit.codec(other).granularity(7) == 7]
    other = others[ALL.index(spec) % len(others)]
    for n, codec, features in cases(spec):
        pairs = [(codec, codec)]
        if fits(lowbit.codec(other), features) and codec.granularity(features) != features:
            pairs += [(codec, bound(other, features)), (bound(other, features), codec)]
        for source, target in pairs:
            if source.transform == target.transform:
                source, target = source.inner, target.inner
            parts = [rows(codec, features, n + seed).to(DTYPES[n]) for seed in range(3)]
            wires = torch.stack([encoded(source.sent_by(rank), x) for rank, x in enumerate(parts)])
            wire = torch.full((target.wire_nbytes(parts[0].shape) + 32,), 0xA5, dtype=torch.uint8)
            launch.reduce_encode(source, wires, target, tuple(parts[0].shape), wire[16:-16])()
            total = torch.empty(parts[0].shape)
            source.define_reduce(wires, total)
            assert same_wires(target, wire[16:-16], encoded(target, total)), (source, target, features)
            assert (wire[:16] == 0xA5).all() and (wire[-16:] == 0xA5).all()


@pytest.mark.parametrize("spec", fast_and_slow)
@pytest.mark.parametrize("world", [3])
def test_shards_in_one_launch(spec, world):
    """One wire for each destination, and the tensor from one wire for each shard."""
    for n, codec, features in cases(spec):
        x = samples.rows(features, n)[3:14].to(DTYPES[n])
        shards = layout.shard(x.shape, (codec,), world)
        view = x.view(shards.rows, shards.features)
        lengths = shards.wire_nbytes(codec)
        sizes = min(lengths), max(lengths)
        wires = torch.full((sum(lengths),), 0xA5, dtype=torch.uint8)
        launch.encode(codec, view, wires, world, sizes)()
        expected = [encoded(codec, shards.of(x, rank)) for rank in range(world)]
        assert same_wires(codec, wires, torch.cat(expected)), (codec, features)

        out = torch.full_like(view, 7)
        launch.reduce(codec, wires.view(1, -1), out, world, sizes)()
        values = [codec.sent_by(0).decode(wire, shards.shape(rank), x.dtype) for rank, wire in enumerate(expected)]
        assert same_values(codec, out, torch.cat(values)), (codec, features)
