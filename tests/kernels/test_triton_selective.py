"""selective4 in Triton kernels: ranges of every sender's own, and rows that one value spoils."""

from __future__ import annotations

import pytest
import torch

import megatron_lowbit as lowbit
from tests.codecs import samples
from tests.codecs.test_selective import bound, within

launch = pytest.importorskip("megatron_lowbit.kernels.triton_launch")


@pytest.fixture(autouse=True)
def everything_else_as_defined(monkeypatch):
    monkeypatch.setenv("LOWBIT_BACKEND", "reference")


def encoded(codec, x: torch.Tensor) -> torch.Tensor:
    wire = torch.full((codec.wire_nbytes(x.shape),), 0xA5, dtype=torch.uint8)
    codec.define_encode(x, wire)
    return wire


def kernel_encoded(codec, x: torch.Tensor) -> torch.Tensor:
    wire = torch.full((codec.wire_nbytes(x.shape) + 32,), 0xA5, dtype=torch.uint8)
    launch.encode(codec, x, wire[16:-16])()
    assert (wire[:16] == 0xA5).all() and (wire[-16:] == 0xA5).all()
    return wire[16:-16]


def same_reduce(codec, wires: torch.Tensor, shape: tuple[int, int], dtype=torch.float32) -> torch.Tensor:
    """What both make of wires, which must be the same."""
    out, expected = torch.full((shape[0] + 2, shape[1]), 7.0, dtype=dtype), torch.empty(shape, dtype=dtype)
    launch.reduce(codec, wires, out[1:-1])()
    codec.define_reduce(wires, expected)
    assert samples.same_bits(out[1:-1], expected) and (out[0] == 7).all() and (out[-1] == 7).all()
    return expected


@pytest.mark.parametrize("senders", [1, 3])
@pytest.mark.parametrize("features, fraction", [(1, "1/64"), (33, "1/3"), (100, "1/64"), (131, "1"), (320, "1/5")])
def test_every_sender_has_ranges_of_its_own(senders, features, fraction):
    codec, facts = bound(features, senders, 0, fraction)
    for own in (codec, codec.inner):
        wires = []
        for rank in range(3):
            theirs = own.sent_by(rank)
            x = within(facts, rank % senders, 1, rank).to((torch.bfloat16, torch.float16, torch.float32)[rank])
            wires.append(kernel_encoded(theirs, x))
            assert torch.equal(wires[-1], encoded(theirs, x)), rank
            same_reduce(theirs, wires[-1][None], tuple(x.shape))  # a single wire is that of the codec's own rank
        same_reduce(own, torch.stack(wires), tuple(x.shape), torch.bfloat16)


def test_a_sender_that_calibration_has_not_seen_is_refused():
    codec = bound(64, 2)[0]
    wires, x = torch.zeros(3, codec.wire_nbytes((2, 64)), dtype=torch.uint8), torch.zeros(2, 64)
    with pytest.raises(lowbit.ConfigError, match="3 ranks or more at a site that was calibrated with 2"):
        launch.reduce(codec, wires, x)
    with pytest.raises(lowbit.ConfigError, match="3 ranks or more at a site that was calibrated with 2"):
        launch.reduce_encode(codec.inner, wires, codec.inner, (2, 64), wires[0])


def test_senders_share_the_tables():
    codec, cpu = bound(64, 3)[0], torch.device("cpu")
    other = codec.sent_by(2)
    assert other is not codec and other.sender == 2 and codec.sender == 0
    assert other.table(cpu) is codec.table(cpu) is other.inner.table(cpu)
    assert other.index(cpu, 64, 64) is codec.index(cpu, 64, 64)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_value_spoils_its_row(value):
    codec, facts = bound(100, 1, 0, "1/10")
    ordinary = next(f for f in range(100) if f not in facts.outliers)
    for own in (codec, codec.inner):
        x = within(facts, 0, 4)
        for row, place in ((0, ordinary), (1, facts.outliers[0]), (2, facts.outliers[-1])):
            x[row, place] = value
        wire = kernel_encoded(own, x)
        assert torch.equal(wire, encoded(own, x))
        y = same_reduce(own, torch.stack([wire, encoded(own, x.nan_to_num(0, 0, 0))]), (4, 100))
        assert y[:3].isnan().all() and y[3].isfinite().all()


def test_only_the_first_outlier_tells():
    """And of the sum, where infinities of both signs meet."""
    codec, facts = bound(100, 1, 0, "1/10")
    wire = encoded(codec, within(facts, 0, 3))
    first, others = torch.stack([wire, wire]), torch.stack([wire, wire])
    places = [facts.outliers[0], facts.outliers[3]]
    for wires, place in ((first, 0), (others, 3)):
        for n, value in enumerate((torch.inf, -torch.inf)):
            codec.split(wires[n], 3, 100)["outliers"].view(torch.bfloat16).view(3, -1)[1, place] = value
    for own in (codec, codec.inner):
        y = same_reduce(own, first, (3, 100))
        assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
        y = same_reduce(own, others, (3, 100))
        assert y.isnan().sum() == 1
    assert same_reduce(codec, others, (3, 100))[1, places[1]].isnan()


@pytest.mark.parametrize("legs", [("selective4", "int8:g32"), ("int5:g32", "selective4"), ("selective4", "selective4")])
def test_legs_that_meet(legs):
    """The source's rule for the sum of its wires, then the target's for what it encodes."""
    facts = bound(100, 1, 0, "1/10")[1]
    source, target = (lowbit.codec(f"{leg}:outliers=1/10").bind(facts, 0).inner for leg in legs)
    x = torch.cat([within(facts, 0, 2), samples.rows(100, 3, ("nan", "gaussian", "both infs", "span"))])
    wires, total = torch.stack([encoded(source, x), encoded(source, -x)]), torch.empty_like(x)
    wire = torch.full((target.wire_nbytes(x.shape) + 32,), 0xA5, dtype=torch.uint8)
    launch.reduce_encode(source, wires, target, tuple(x.shape), wire[16:-16])()
    source.define_reduce(wires, total)
    assert torch.equal(wire[16:-16], encoded(target, total))
    assert (wire[:16] == 0xA5).all() and (wire[-16:] == 0xA5).all()


def test_a_row_of_many_blocks():
    """In which outliers are few, and others are left over at the end of the tile."""
    codec, facts = bound(4096, 2)
    x = torch.cat([within(facts, 1, 1), samples.some_rows(4096, 2, 5)]).bfloat16()
    wires = [kernel_encoded(codec.sent_by(rank), x) for rank in range(2)]
    assert all(torch.equal(wire, encoded(codec.sent_by(rank), x)) for rank, wire in enumerate(wires))
    same_reduce(codec, torch.stack(wires), (3, 4096), torch.bfloat16)
