"""Sums of plain values by numba: those of the definition, bit for bit but for kinds of NaN."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from megatron_lowbit.codecs import plain
from megatron_lowbit.kernels import cpu_passthrough

pytest.importorskip("numba")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ODD = [float("inf"), -float("inf"), float("nan"), 1e38, -1e38, 65504.0, 1e-40, -0.0]


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES), out=st.sampled_from(DTYPES), rows=st.integers(1, 5), features=st.integers(1, 100),
    wires=st.integers(1, 5), odd=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_sums_are_those_of_the_definition(dtype, out, rows, features, wires, odd, seed):
    codec, generator = plain(dtype), torch.Generator().manual_seed(seed)
    encoded = torch.zeros(wires, codec.wire_nbytes((rows, features)), dtype=torch.uint8)
    for wire in encoded:
        x = torch.randn(rows, features, generator=generator)
        if odd:
            x.view(-1)[torch.randint(x.numel(), (1,), generator=generator)] = ODD[seed % len(ODD)]
        cpu_passthrough.encode_rows(codec, x.to(dtype), wire)
    expected, found = torch.empty(rows, features, dtype=out), torch.full((rows, features), 7.0).to(out)
    codec.define_reduce(encoded, expected)
    cpu_passthrough.reduce_rows(codec, encoded, found)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[~found.isnan()], expected[~expected.isnan()])
    assert torch.equal(found.signbit()[~found.isnan()], expected.signbit()[~expected.isnan()])


def test_codecs_take_it():
    assert plain(torch.bfloat16).numba == "cpu_passthrough"
