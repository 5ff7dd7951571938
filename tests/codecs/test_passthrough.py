"""Passthrough: the values themselves, converted as PyTorch converts."""

import pytest
import torch

import megatron_lowbit as lowbit
from megatron_lowbit.codecs import plain


@pytest.mark.parametrize("spec, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_values_are_pytorchs_conversion(spec, dtype):
    x = torch.randn(5, 37, generator=torch.Generator().manual_seed(0))
    codec = lowbit.codec(spec)
    wire = codec.encode(x)
    assert wire.numel() == codec.wire_nbytes(x.shape) == -(-x.numel() * dtype.itemsize // 16) * 16
    assert torch.equal(codec.decode(wire, x.shape, torch.float32), x.to(dtype).float())
    for source in (torch.bfloat16, torch.float16):
        assert torch.equal(codec.decode(codec.encode(x.to(source)), x.shape, source), x.to(source).to(dtype).to(source))


def test_sums_are_fp32_in_rank_order():
    codec, parts = lowbit.codec("bf16"), torch.tensor([[256.0], [1.0], [1.0], [-256.0]])
    out = torch.empty(1, 1)
    codec.reduce_rows(torch.stack([codec.encode(p.view(1, 1)) for p in parts]), out)
    assert out.item() == 2.0  # a bf16 accumulator would lose both ones


def test_reducing_leaves_the_wires_alone():
    codec, out = lowbit.codec("fp32"), torch.empty(1, 4)
    wires = torch.stack([codec.encode(torch.ones(1, 4))] * 2)
    for _ in range(2):
        codec.reduce_rows(wires, out)
        assert torch.equal(out, torch.full((1, 4), 2.0))


def test_non_finite_passes():
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1e30]])
    y = lowbit.codec("fp16").decode(lowbit.codec("fp16").encode(x), x.shape, x.dtype)
    assert y[0, 0].isnan() and y[0, 1] == torch.inf and y[0, 2] == -torch.inf and y[0, 3] == torch.inf


@pytest.mark.parametrize("spec, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_the_plain_codec_of_a_dtype_changes_nothing(spec, dtype):
    x = torch.randn(5, 37, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert plain(dtype) == lowbit.codec(spec)
    assert torch.equal(plain(dtype).decode(plain(dtype).encode(x), x.shape, dtype), x)


@pytest.mark.parametrize("spec", ["bf16", "fp16", "fp32"])
def test_the_gap_behind_the_values_is_zero(spec):
    codec, wire = lowbit.codec(spec), torch.full((16,), 0xA5, dtype=torch.uint8)
    codec.encode_rows(torch.ones(1, 3), wire)
    assert not wire[3 * codec.dtype.itemsize :].any()
