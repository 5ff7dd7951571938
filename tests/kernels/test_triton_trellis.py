"""The search and the levels of trellis codes on tiles, bit for bit."""

from __future__ import annotations

import pytest
import torch

import megatron_lowbit as lowbit
from tests.codecs import samples

launch = pytest.importorskip("megatron_lowbit.kernels.triton_launch")
KINDS = ("gaussian", "heavy", "zero", "constant", "nan", "integers", "span")


@pytest.mark.parametrize("spec, features", [("gauss2:g32:trellis", 45), ("gauss5:g32:trellis", 32)])
@pytest.mark.parametrize("inner", [False, True])
def test_codes_and_scales(spec, features, inner):
    codec = lowbit.codec(spec).inner if inner else lowbit.codec(spec)
    x = samples.rows(features, 1, KINDS).bfloat16()
    wire = torch.full((codec.wire_nbytes(x.shape),), 0xA5, dtype=torch.uint8)
    expected = wire.clone()
    launch.encode(codec, x, wire)()
    codec.define_encode(x, expected)
    assert torch.equal(wire, expected)


@pytest.mark.parametrize(
    "bits, group, features", [(2, 32, 45), (3, 64, 64), (4, 128, 300), (5, 256, 300), (4, 256, 512)]
)
def test_levels_of_any_wire(bits, group, features):
    """Codes depend on the two before them, across the blocks of a group but not on another group's."""
    codec, rows = lowbit.codec(f"gauss{bits}:g{group}:trellis"), 3
    codes = torch.randint(256, (2, codec.wire_nbytes((rows, features))), generator=torch.Generator().manual_seed(bits))
    wires = codes.to(torch.uint8)
    for own in (codec, codec.inner):
        expected, values = torch.empty(rows, features), torch.empty(rows, features)
        own.define_reduce(wires, expected)
        launch.reduce(own, wires, values)()
        assert samples.same_bits(values, expected)


def test_sum_of_wires_to_a_wire():
    source, target = lowbit.codec("int4:g32"), lowbit.codec("gauss3:g32:trellis").inner
    parts = [samples.rows(64, seed, ("gaussian", "offset", "ramp")) for seed in range(2)]
    wires = torch.stack([torch.empty(source.wire_nbytes(x.shape), dtype=torch.uint8) for x in parts])
    for wire, x in zip(wires, parts):
        source.define_encode(x, wire)
    total, wire = torch.empty(3, 64), torch.empty(target.wire_nbytes((3, 64)), dtype=torch.uint8)
    source.define_reduce(wires, total)
    launch.reduce_encode(source, wires, target, (3, 64), wire)()
    expected = torch.empty_like(wire)
    target.define_encode(total, expected)
    assert torch.equal(wire, expected)
