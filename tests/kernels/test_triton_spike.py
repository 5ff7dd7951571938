"""Integers with spikes in Triton: what many rows and tiles share, and what is rare. The rest is in test_triton.py."""

from __future__ import annotations

import pytest
import torch

import megatron_lowbit as lowbit
from tests.codecs import samples
from tests.codecs.test_every_codec import bound

launch = pytest.importorskip("megatron_lowbit.kernels.triton_launch")


@pytest.fixture(autouse=True)
def parts_of_codecs_run_as_defined(monkeypatch):
    monkeypatch.setenv("LOWBIT_BACKEND", "reference")


def values(rows: int, features: int) -> torch.Tensor:
    """Few values, so that extremes are met more than once."""
    generator = torch.Generator().manual_seed(rows * features)
    return torch.randint(-40, 40, (rows, features), generator=generator) / 16.0


def defined(codec, x: torch.Tensor) -> torch.Tensor:
    wire = torch.empty(codec.wire_nbytes(x.shape), dtype=torch.uint8)
    codec.define_encode(x, wire)
    return wire


def check(codec, x: torch.Tensor) -> None:
    """The wire of x, and values from it and from foreign bytes. Memory around them stays as it was."""
    expected = defined(codec, x)
    memory = torch.full((len(expected) + 32,), 0xA5, dtype=torch.uint8)
    launch.encode(codec, x, memory[16:-16])()
    assert torch.equal(memory[16:-16], expected)
    assert (memory[:16] == 0xA5).all() and (memory[-16:] == 0xA5).all()

    foreign = torch.randint(256, expected.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(len(x)))
    for wires in (expected[None], torch.stack([foreign, expected, foreign.flip(0)])):
        out, reference = torch.empty(x.shape), torch.empty(x.shape)
        launch.reduce(codec, wires, out)()
        codec.define_reduce(wires, reference)
        assert samples.same_bits(out, reference)


@pytest.mark.parametrize("group, groups", [(32, 1), (32, 150), (64, 69), (128, 8), (128, 45), (256, 20)])
def test_positions_share_bytes_across_rows_and_tiles(group, groups):
    """A tile has 128 blocks, so 16 to 128 groups; blocks of positions have 32, the last one 8, 16 or 24."""
    rows = 3 if groups % 3 == 0 else 1
    check(lowbit.codec(f"int3:g{group}:spike"), values(rows, groups // rows * group))


@pytest.mark.parametrize("group", [32, 128, 256])
def test_short_groups_count_as_well(group):
    """Every row ends within a group, and the groups of all rows follow each other."""
    check(lowbit.codec(f"int5:g{group}:sym:spike"), values(11, 2 * group + 9))


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize(
    "rows, features, source, others",
    [
        (9, 292, "int4:g256", ""),
        (18, 40, "int8:g256", ""),
        (40, 100, "int3:g128", ""),
        (18, 160, "int8:g256", ""),
        (4, 332, "selective4", ":outliers=1/64"),
    ],
)
def test_groups_that_are_cut_otherwise_than_tiles(group, rows, features, source, others):
    """Rows are filled up to the groups of the other codec, or have a tile each: then tiles share bytes of positions."""
    source, target = bound(source, features).inner, bound(f"int4:g{group}:spike{others}", features).inner
    wires = torch.stack([defined(source.sent_by(n), values(rows, features) * k) for n, k in enumerate((1, -2))])
    total = torch.empty(rows, features)
    source.define_reduce(wires, total)
    expected = defined(target, total)
    memory = torch.full((len(expected) + 32,), 0xA5, dtype=torch.uint8)
    for _ in range(2):  # whatever the buffer held, and whichever tile is first
        run = launch.reduce_encode(source, wires, target, (rows, features), memory[16:-16])
        assert run.grid[0] > 1
        run()
        assert torch.equal(memory[16:-16], expected)
        assert (memory[:16] == 0xA5).all() and (memory[-16:] == 0xA5).all()


@pytest.mark.parametrize("sym", ["", ":sym"])
def test_every_nan_and_the_ends_of_the_exponents(sym):
    codec = lowbit.codec(f"int4:g32{sym}:spike")
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF, 0x7F800000, -0x800000, 0x7F7FFFFF, -0x800001])
    x = values(len(bits), 64)
    x[:, 5] = bits.to(torch.int32).view(torch.float32)
    check(codec, x)
    exponents = torch.tensor([-149, -140, -130, -126, -120, -112, -100, 100, 120, 125])
    check(codec, values(len(exponents), 96) * torch.exp2(exponents.double())[:, None].float())
    check(codec, values(2, 64) * 0.0)  # zeros of either sign


def test_shards_count_their_own_groups():
    codec, world, x = lowbit.codec("int2:g32:spike"), 3, values(20, 224)
    parts = [defined(codec, x[20 * rank // world : 20 * (rank + 1) // world]) for rank in range(world)]
    sizes = len(parts[0]), len(parts[1])
    wires = torch.full((sum(map(len, parts)),), 0xA5, dtype=torch.uint8)
    launch.encode(codec, x, wires, world, sizes)()
    assert torch.equal(wires, torch.cat(parts))


def test_a_tile_holds_whole_blocks_of_groups(monkeypatch):
    """However small tiles may be elsewhere."""
    monkeypatch.setattr(launch, "TILE", 16)
    for group in (32, 128):
        check(lowbit.codec(f"int4:g{group}:spike"), values(1, 40 * group))
