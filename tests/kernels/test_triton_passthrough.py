"""Passthrough in Triton: its own geometry, a run of values whatever the rows, and conversions of single values."""

from __future__ import annotations

import pytest
import torch

import megatron_lowbit as lowbit
from megatron_lowbit.codecs import fused
from megatron_lowbit.collectives import layout
from tests.codecs.samples import same
from tests.tensors import DTYPES, same_bits, sample

launch = pytest.importorskip("megatron_lowbit.kernels.triton_launch")
SPECS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HALVES = torch.arange(0, 65536, 7)[:9216].to(torch.int16)
SINGLES = (torch.arange(-(2**16), 2**16, 61) << 15).int() + torch.tensor([0, 1, -1, 0x1000, 0x2FFF])[:, None].int()
VALUES = {
    "bf16": HALVES.view(torch.bfloat16),
    "fp16": HALVES.view(torch.float16),
    "fp32": SINGLES.flatten()[:9216].view(torch.float32),
}


@pytest.fixture(autouse=True)
def parts_of_codecs_run_as_defined(monkeypatch):
    monkeypatch.setenv("LOWBIT_BACKEND", "reference")


def run(make, *arguments) -> int:
    """-> RAGGED, how the message was cut."""
    launched = make(*arguments)
    launched()
    return launched.constants["RAGGED"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("source", VALUES)
def test_values_are_converted_as_pytorch_does(spec, source):
    """Ties, subnormal numbers and overflow to infinity included; of NaNs only that they are some."""
    x, codec, dtype = VALUES[source].view(-1, 256), lowbit.codec(spec), SPECS[spec]
    wire = torch.empty(codec.wire_nbytes(x.shape), dtype=torch.uint8)
    run(launch.encode, codec, x, wire)
    values = wire.view(dtype).view(x.shape)
    assert same(values, x.to(dtype))
    for out in DTYPES:
        decoded = torch.empty(x.shape, dtype=out)
        run(launch.reduce, codec, wire[None], decoded)
        assert same(decoded, values.float().to(out))


@pytest.mark.parametrize("rows, features, run_of", [
    (3, 8, 8), (513, 8, 8), (1, 4104, 8), (5, 4, 4), (7, 6, 2), (1, 4100, 4), (2, 33, 1), (125, 33, 1), (2, 4096, 8),
])  # fmt: skip
def test_a_message_is_one_run_of_values(rows, features, run_of):
    """Its blocks need not be those of its rows; only rows of an odd number of values are taken one by one."""
    codec, x = lowbit.codec("bf16"), sample(0, (rows, features), torch.bfloat16)
    wire = torch.full((codec.wire_nbytes(x.shape) + 32,), 0xA5, dtype=torch.uint8)
    assert run(launch.encode, codec, x, wire[16:-16]) == run_of
    assert same_bits(wire[16:-16], codec.encode(x))
    assert (wire[:16] == 0xA5).all() and (wire[-16:] == 0xA5).all()
    out = torch.full((rows + 2, features), 7.0)
    run(launch.reduce, codec, wire[16:-16].view(1, -1), out[1:-1])
    assert same_bits(out[1:-1], x.float()) and (out[0] == 7).all() and (out[-1] == 7).all()


def test_programs_are_full_whatever_the_rows():
    """A message cut for two-step has rows of 16 bytes."""
    codec, x = lowbit.codec("bf16"), torch.zeros(2048, 8, dtype=torch.bfloat16)
    wire = torch.empty(codec.wire_nbytes(x.shape), dtype=torch.uint8)
    assert launch.encode(codec, x, wire).grid == (8, 1)
    assert launch.encode(codec, x, wire, 4, (wire.numel() // 4,) * 2).grid == (2, 4)


@pytest.mark.parametrize("source, target, features", [
    ("bf16", "fp32", 40), ("fp32", "fp16", 12), ("bf16", "int4:g32", 40), ("fp8:g128", "bf16", 136),
    ("fp16", "bf16", 3),
])  # fmt: skip
def test_sums(source, target, features):
    source, target, shape = lowbit.codec(source), lowbit.codec(target), (5, features)
    wires = torch.stack([source.encode(sample(seed, shape, torch.float32)) for seed in range(3)])
    total, wire, defined = torch.empty(shape), *torch.full((2, target.wire_nbytes(shape)), 0xA5, dtype=torch.uint8)
    run(launch.reduce_encode, source, wires, target, shape, wire)
    source.define_reduce(wires, total)
    target.define_encode(total, defined)
    assert torch.equal(wire, defined)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape, world", [((5, 64), 3), ((2, 24), 5), ((1, 200), 4), ((3, 33), 2), ((2, 20), 1)])
def test_rmsnorm_of_rows_that_shards_cut_anywhere(monkeypatch, spec, shape, world):
    codec, x, residual = lowbit.codec(spec), sample(0, shape, torch.bfloat16), sample(1, shape, torch.bfloat16)
    weight = sample(2, shape[-1:], torch.float32)
    shards = layout.shard(x.shape, (codec,), world)
    slots = torch.full((world, max(shards.wire_nbytes(codec)) + 16), 0xFF, dtype=torch.uint8)  # NaNs, if read
    for rank, slot in enumerate(slots):
        wire = codec.encode(shards.of(x, rank))
        slot[: len(wire)] = wire
    results = []
    for backend in ("reference", "triton"):
        monkeypatch.setenv("LOWBIT_BACKEND", backend)
        normed, summed = torch.empty_like(x), torch.empty_like(x)
        fused.reduce_add_rmsnorm(codec, slots, shards.bounds, residual, weight, 1e-5, 1.0, normed, summed)
        results.append((normed, summed))
    assert all(same_bits(a, b) for a, b in zip(*results))
