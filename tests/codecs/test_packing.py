"""Bit planes: every width and row length survives; bytes lie where the layout says."""

import pytest
import torch

from megatron_lowbit.codecs import packing


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("features", [1, 7, 8, 9, 31, 32, 33, 63, 64, 100, 257])
def test_round_trip_and_size(width, features):
    codes = torch.randint(2**width, (3, features), dtype=torch.uint8, generator=torch.Generator().manual_seed(features))
    plane = packing.pack(codes, width)
    assert plane.numel() == packing.plane_nbytes(3, features, width)
    assert torch.equal(packing.unpack(plane, features, width), codes)


def test_a_byte_holds_values_a_quarter_block_apart():
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, [3, 11, 19, 27]] = torch.tensor([1, 2, 3, 1], dtype=torch.uint8)
    plane = packing.pack(codes, 2)[0]
    assert plane.nonzero().flatten().tolist() == [3]
    assert plane[3] == 1 | 2 << 2 | 3 << 4 | 1 << 6


@pytest.mark.parametrize("bits", range(2, 9))
def test_planes_add_up(bits):
    assert sum(packing.planes(bits)) == bits
