"""Gaussian codes in Triton's interpreter: rotations of every length, tables at every boundary, ties, long rows."""

from __future__ import annotations

import pytest
import torch

import megatron_lowbit as lowbit
from megatron_lowbit.codecs import hadamard
from tests.codecs import samples

launch = pytest.importorskip("megatron_lowbit.kernels.triton_launch")
triton = pytest.importorskip("triton")
tl = triton.language
gauss = pytest.importorskip("megatron_lowbit.kernels.triton_gauss")
rotation = pytest.importorskip("megatron_lowbit.kernels.triton_rotation")

SOME = [1, 7, 31, 32, 33, 63, 64, 65, 96, 100, 127, 128, 129, 190, 192, 255, 256]
lengths = [n if n in SOME else pytest.param(n, marks=pytest.mark.slow) for n in range(1, 257)]


@pytest.fixture(autouse=True)
def parts_of_codecs_run_as_defined(monkeypatch):
    monkeypatch.setenv("LOWBIT_BACKEND", "reference")


@triton.jit
def _turn(
    x, y, rows, features, blocks_per_row,
    BACK: tl.constexpr, GROUP: tl.constexpr, RAGGED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    block = tl.arange(0, NB)[None, :]
    row, column = block // blocks_per_row, block % blocks_per_row * 32 + tl.arange(0, 32)[:, None]
    mask = (row < rows) & (column < features)
    z = tl.load(x + (row * features + column), mask=mask, other=float("nan"))
    n = rotation.group_sizes(0, features, blocks_per_row, GROUP, RAGGED, NB)
    if BACK:
        z = rotation.unrotate(z, n, GROUP, RAGGED, NB)
    else:
        z = rotation.rotate(z, n, GROUP, RAGGED, NB)
    tl.store(y + (row * features + column), z, mask=mask)


@pytest.mark.parametrize("last", lengths)
def test_rotation_of_any_length(last):
    """A group of that many values by itself, and behind one of full length."""
    group = max(32, triton.next_power_of_2(last))
    for features in (last, group + last):
        full = features // group * group
        x = torch.randn(3, features, generator=torch.Generator().manual_seed(last))
        blocks = -(-features // group) * group // 32
        for back, turn in ((0, hadamard.rotate), (1, hadamard.unrotate)):
            y = torch.full_like(x, 7.0)
            _turn[(1,)](
                x, y, 3, features, blocks, back, group, int(full != features), triton.next_power_of_2(3 * blocks)
            )
            expected = [turn(x[:, :full].unflatten(1, (-1, group))).flatten(1)] if full else []
            expected += [turn(x[:, full:])] if full < features else []
            assert samples.same_bits(y, torch.cat(expected, 1)), (features, back)


@triton.jit
def _count(
    u, table, counts, BITS: tl.constexpr, FINE: tl.constexpr, GROUP: tl.constexpr, NB: tl.constexpr
):  # fmt: skip
    i = tl.reshape(tl.arange(0, 32 * NB), (32, NB * 32 // GROUP, GROUP // 32))
    tl.store(counts + i, gauss._below(tl.load(u + i), table, FINE, BITS, GROUP, NB))


@pytest.mark.parametrize("group", [32, 256])
@pytest.mark.parametrize("bits", range(2, 8))
def test_tables_at_every_boundary(bits, group):
    """Levels, thresholds and where rounding changes its mind, with the numbers next to these; the largest there are."""
    codec = lowbit.codec(f"gauss{bits}:g{group}").inner
    boundaries = codec.thresholds
    if codec.hides:
        boundaries = torch.cat([boundaries, codec.levels[:-1]]).sort().values
    edges = (torch.arange(1, 2 ** (bits + 1)) - 0.5) * 2.0 ** (1 - bits)
    points = torch.cat([boundaries, codec.levels, edges, torch.tensor([0.0, 1e-45, 11.3, 16.0, 16.1, 16.9])])
    points = torch.cat([points, points.nextafter(torch.tensor(20.0)), points.nextafter(torch.tensor(0.0))])
    blocks = max(group // 32, triton.next_power_of_2(-(-len(points) // 32)))
    u = torch.nn.functional.pad(points, (0, 32 * blocks - len(points)))
    counts = torch.empty(len(u), dtype=torch.int32)
    _count[(1,)](u, codec.define_table(), counts, bits, bits + codec.hides, group, blocks)
    assert torch.equal(counts, torch.bucketize(u, boundaries, out_int32=True))


@pytest.mark.parametrize("bits", range(2, 8))
def test_ties_and_parities(bits):
    """Values of few sizes, so that many codes cost the same to move; groups that are zero, tiny or not finite."""
    codec, g = lowbit.codec(f"gauss{bits}:g256").inner, torch.Generator().manual_seed(bits)
    z = torch.randint(-3, 4, (12, 512), generator=g).float()
    z[1] = z[1].abs() * 2.0**-130
    z[2, :256], z[2, 256:] = 0.0, -0.0
    z[3, 300], z[4, 0], z[5, 511] = torch.nan, torch.inf, -torch.inf
    z[6] = z[6].sign() * 2.0**126
    z[7], z[8, ::2] = 3.0, -0.0
    z[9, :256] = torch.finfo(torch.float32).max
    wire = torch.full((codec.wire_nbytes(z.shape),), 0xA5, dtype=torch.uint8)
    launch.encode(codec, z, wire)()
    expected = torch.empty_like(wire)
    codec.define_encode(z, expected)
    assert torch.equal(wire, expected)
    values, decoded = torch.empty_like(z), torch.empty_like(z)
    launch.reduce(codec, wire.view(1, -1), values)()
    codec.define_reduce(wire.view(1, -1), decoded)
    assert samples.same_bits(values, decoded)


@pytest.mark.parametrize("spec", ["gauss3:g256", "gauss4:g128"])
@pytest.mark.parametrize("features", [4096 + 100, 4096 + 33, 4096 + 31])
def test_rows_longer_than_a_tile(spec, features):
    """Short groups are not in every tile, and not in the one that clears the gaps."""
    codec, x = lowbit.codec(spec), torch.randn(2, features, generator=torch.Generator().manual_seed(features))
    wire = torch.full((codec.wire_nbytes(x.shape),), 0xA5, dtype=torch.uint8)
    launch.encode(codec, x, wire)()
    expected = torch.empty_like(wire)
    codec.define_encode(x, expected)
    assert torch.equal(wire, expected)
    values, decoded = torch.empty_like(x), torch.empty_like(x)
    launch.reduce(codec, wire.view(1, -1), values)()
    codec.define_reduce(wire.view(1, -1), decoded)
    assert samples.same_bits(values, decoded)
