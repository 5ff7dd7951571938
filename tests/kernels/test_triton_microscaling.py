"""Float formats in Triton, what test_triton.py does not reach: ends of ranges, all scales, long rows of nvfp4."""

from __future__ import annotations

import pytest
import torch

import megatron_lowbit as lowbit
from tests.codecs.test_every_codec import bound
from tests.codecs.test_microscaling import BLOCKS, extremes
from tests.tensors import same_bits, sample

launch = pytest.importorskip("megatron_lowbit.kernels.triton_launch")
SPECS = sorted(BLOCKS)


@pytest.fixture(autouse=True)
def parts_of_codecs_run_as_defined(monkeypatch):
    monkeypatch.setenv("LOWBIT_BACKEND", "reference")


def encodes_as_defined(codec, x):
    defined = torch.empty(codec.wire_nbytes(x.shape), dtype=torch.uint8)
    codec.define_encode(x, defined)
    wire = torch.full((len(defined) + 32,), 0xA5, dtype=torch.uint8)
    launch.encode(codec, x, wire[16:-16])()
    assert (wire[:16] == 0xA5).all() and (wire[-16:] == 0xA5).all()
    assert torch.equal(wire[16:-16], defined)
    return defined


def decodes_as_defined(codec, wires, shape):
    values, defined = torch.full(shape, 7.0), torch.empty(shape)
    launch.reduce(codec, wires, values)()
    codec.define_reduce(wires, defined)
    assert same_bits(values, defined)


def sums_as_defined(source, target, shape):
    wires = torch.stack([source.encode(sample(seed, shape, torch.float32)) for seed in range(2)])
    total, wire, defined = torch.empty(shape), *torch.full((2, target.wire_nbytes(shape)), 0xA5, dtype=torch.uint8)
    launch.reduce_encode(source, wires, target, shape, wire)()
    source.define_reduce(wires, total)
    target.define_encode(total, defined)
    assert torch.equal(wire, defined)


@pytest.mark.parametrize("spec", SPECS)
def test_around_every_threshold_and_at_the_ends_of_fp32(spec):
    codec, x = lowbit.codec(spec), extremes()[:: 2 if spec == "nvfp4" else 1].contiguous()  # a program for each row
    decodes_as_defined(codec, encodes_as_defined(codec, x)[None], x.shape)


@pytest.mark.parametrize("spec", SPECS)
def test_every_code_under_every_kind_of_scale(spec):
    """NaNs, infinities, negative and subnormal scales among them; overflowing products, and sums of them."""
    codec, shape = lowbit.codec(spec), (4, 2048)
    g = torch.Generator().manual_seed(1)
    wires = torch.randint(0, 256, (2, codec.wire_nbytes(shape)), dtype=torch.uint8, generator=g)
    decodes_as_defined(codec, wires[:1], shape)
    decodes_as_defined(codec, wires, shape)


@pytest.mark.parametrize("spec", ["mxfp8", "mxfp6", "mxfp4"])
def test_every_scale_byte(spec):
    codec, shape = lowbit.codec(spec), (256, 32)
    wire = torch.randint(0, 256, (codec.wire_nbytes(shape),), generator=torch.Generator().manual_seed(0)).byte()
    codec.split(wire, *shape)["scales"].copy_(torch.arange(256))
    decodes_as_defined(codec, wire[None], shape)


@pytest.mark.parametrize("features", [16, 48, 80, 208, 224])
def test_rows_of_several_tiles(monkeypatch, features):
    """Also where a row ends in half a block of 32, and where the largest value is in any of the tiles, or none is."""
    monkeypatch.setattr(launch, "LONGEST_ROW", 128)
    codec, x = lowbit.codec("nvfp4"), sample(features, (4, features), torch.float32)
    x[0, 3], x[1, -1] = 100.0, -3e4
    x[1, 2] = torch.nan
    x[2] = torch.inf
    rowwise = launch.encode(codec, x, torch.empty(codec.wire_nbytes(x.shape), dtype=torch.uint8)).constants["ROWWISE"]
    assert rowwise == (2 if features > 64 else 1)
    wire = encodes_as_defined(codec, x)
    decodes_as_defined(codec, wire[None], x.shape)


def test_a_row_longer_than_any_tile():
    codec, x = lowbit.codec("nvfp4"), sample(0, (2, 16384 + 16), torch.bfloat16)
    x[:, -1] = 9.0
    decodes_as_defined(codec, encodes_as_defined(codec, x)[None], x.shape)


@pytest.mark.parametrize("longest", [256, 16384])
@pytest.mark.parametrize("source, target, features", [
    ("int4:g32", "nvfp4", 288), ("fp8:g128", "nvfp4", 160), ("bf16", "nvfp4", 144), ("nvfp4", "nvfp4", 144),
])  # fmt: skip
def test_sums_are_encoded_by_rows(monkeypatch, longest, source, target, features):
    monkeypatch.setattr(launch, "LONGEST_ROW", longest)
    sums_as_defined(lowbit.codec(source), lowbit.codec(target), (2, features))


@pytest.mark.parametrize("target, features", [("int8:g256", 288), ("bf16", 48), ("mxfp6", 64)])
def test_sums_of_nvfp4_in_other_codecs(target, features):
    sums_as_defined(lowbit.codec("nvfp4"), lowbit.codec(target), (3, features))


def test_outliers_find_their_places_in_tiles_of_any_size():
    """nvfp4 is encoded row by row and decoded in tiles of many rows: each has its own table of places."""
    codec, x = bound("nvfp4:outliers=1/8", 256), sample(0, (5, 256), torch.float32)
    for _ in range(2):
        wire = encodes_as_defined(codec, x)
        values = torch.full((7, 256), 7.0)
        launch.reduce(codec, wire[None], values[1:-1])()
        assert same_bits(values[1:-1], codec.decode(wire, x.shape, x.dtype))
        assert (values[0] == 7).all() and (values[-1] == 7).all()


def test_fewer_rows_than_ranks():
    """Programs without a row of their own write nothing."""
    codec, x, world = lowbit.codec("nvfp4"), sample(0, (2, 48), torch.float32), 5
    size = codec.wire_nbytes((1, 48))
    wires = torch.full((2 * size + 32,), 0xA5, dtype=torch.uint8)
    launch.encode(codec, x, wires[16:-16], world, (0, size))()
    assert torch.equal(wires[16:-16], torch.cat([codec.encode(row) for row in x]))
    assert (wires[:16] == 0xA5).all() and (wires[-16:] == 0xA5).all()
