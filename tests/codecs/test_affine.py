"""Affine integers: wire and values against an independent oracle, both backends bit for bit, error within the bound."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import megatron_lowbit as lowbit
from megatron_lowbit.codecs import affine
from tests.codecs import oracle

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
WIDTHS, GROUPS = range(2, 9), (32, 64, 128, 256)
SHAPES = [(1, 1), (1, 7), (3, 8), (2, 31), (5, 33), (1, 100), (4, 256), (2, 300), (3, 2, 129), (17,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def spec_of(bits: int, group: int, sym: bool) -> str:
    return f"int{bits}:g{group}" + (":sym" if sym else "")


def sample(shape, seed=0) -> torch.Tensor:
    """Groups of very different size and offset, ties, zeros and constants among them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * torch.exp2(torch.randint(-20, 12, (*shape[:-1], 1), generator=g))
    x = x + torch.randn((*shape[:-1], 1), generator=g) * torch.randint(0, 2, (*shape[:-1], 1), generator=g) * 50
    return torch.where(torch.rand(shape, generator=g) < 0.1, x.round(), x)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.fixture(params=["reference", "numba"])
def backend(request, monkeypatch):
    monkeypatch.setenv("LOWBIT_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_wire_and_values_match_the_oracle(backend, bits, sym):
    for group, shape in zip(GROUPS * 3, SHAPES, strict=False):
        codec, x = lowbit.codec(spec_of(bits, group, sym)), sample(shape, bits)
        rows = x.reshape(-1, shape[-1])
        wire = codec.encode(x)
        assert bytes(wire.tolist()) == oracle.encode(rows.numpy(), bits, group, sym)
        expected = oracle.decode(bytes(wire.tolist()), *rows.shape, bits, group, sym)
        assert same_bits(codec.decode(wire, x.shape, torch.float32), torch.from_numpy(expected).view(x.shape))


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group", GROUPS)
def test_backends_agree_bit_for_bit(monkeypatch, bits, group, sym):
    codec = lowbit.codec(spec_of(bits, group, sym))
    for shape in SHAPES + [(64, 512), (7, 1000)]:
        for dtype in DTYPES:
            x = sample(shape, bits * group).clamp(-6e4, 6e4).to(dtype)
            results = []
            for name in ("reference", "numba"):
                monkeypatch.setenv("LOWBIT_BACKEND", name)
                wire = codec.encode(x)
                wires = torch.stack([wire, codec.encode(-x), codec.encode(x.flip(-1))])
                total = torch.empty((x.numel() // shape[-1], shape[-1]), dtype=dtype)
                codec.reduce_rows(wires, total)
                results.append((wire, codec.decode(wire, shape, dtype), total))
            assert all(same_bits(a, b) for a, b in zip(*results, strict=True)), (shape, dtype)


@pytest.mark.parametrize("name", sorted(GOLDEN["wires"]))
def test_golden_wires(backend, name):
    """Bytes on the wire are a format: they may only change together with its version."""
    x = torch.tensor(GOLDEN["input"]).view(2, 43) / 16
    assert bytes(lowbit.codec(name).encode(x).tolist()).hex() == GOLDEN["wires"][name]


values = st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100)


@settings(max_examples=150, deadline=None)
@given(st.lists(values, min_size=1, max_size=70), st.integers(2, 8), st.sampled_from(GROUPS), st.booleans())
def test_error_is_within_the_bound(row, bits, group, sym):
    """max(1/2, L / 2**8) steps of the stored scale (1 + h / 2**8 if symmetric), plus fp32 rounding."""
    x = torch.tensor([row])
    codec = lowbit.codec(spec_of(bits, group, sym))
    y = codec.decode(codec.encode(x), x.shape, torch.float32).double()
    for start in range(0, x.shape[1], group):
        part = x[:, start : start + group].double()
        magnitude = float(part.abs().max())
        if sym:
            step = magnitude / 2 ** (bits - 1) * (1 + 2**-8)
            bound = step * (1 + 2 ** (bits - 1) / 2**8)
        else:
            span = float(part.max() - part.min()) + magnitude * 2**-7  # zero rounds down by up to an 8-bit ulp
            step = span / (2**bits - 1) * (1 + 2**-8)
            bound = step * max(1 / 2, (2**bits - 1) / 2**8)
        bound += magnitude * 2**-22 + 2.0**-117  # arithmetic; scales below normal range
        error = float((part - y[:, start : start + group]).abs().max())
        assert error <= bound, (error, bound)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 255), min_size=1, max_size=64),
    st.integers(2, 8),
    st.integers(-20, 20),
    st.integers(-64, 64),
)
def test_representable_grids_are_exact(steps, bits, exponent, offset):
    steps = [0, 2**bits - 1] + [s % 2**bits for s in steps]
    x = (torch.tensor([steps]).float() + offset) * 2.0**exponent
    codec = lowbit.codec(f"int{bits}:g256")
    assert torch.equal(codec.decode(codec.encode(x), x.shape, torch.float32), x)


@pytest.mark.parametrize("bits", WIDTHS)
def test_symmetric_is_equivariant_under_sign_and_powers_of_two(backend, bits):
    codec, x = lowbit.codec(f"int{bits}:g32:sym"), sample((8, 96), 3)
    y = codec.decode(codec.encode(x), x.shape, torch.float32)
    for factor in (-1.0, 4.0, -0.125):
        assert torch.equal(codec.decode(codec.encode(factor * x), x.shape, torch.float32), factor * y)


def test_more_bits_lose_less(backend):
    x, errors = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)), []
    for bits in WIDTHS:
        codec = lowbit.codec(f"int{bits}:g64")
        errors.append(float((codec.decode(codec.encode(x), x.shape, x.dtype) - x).square().mean()))
    assert all(a > 3 * b for a, b in itertools.pairwise(errors)), errors


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("spec", ["int2:g32", "int4:g32", "int7:g64", "int8:g128", "int4:g32:sym"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_stays_non_finite_and_in_its_group(backend, spec, value, dtype):
    codec, x = lowbit.codec(spec), sample((3, 290), 5).clamp(-6e4, 6e4).to(dtype)
    x[1, 37] = value
    x[2, 289] = -value
    y, group = codec.decode(codec.encode(x), x.shape, dtype), codec.group
    assert y[1, 37 // group * group : (37 // group + 1) * group].isnan().all()
    assert y[2, 289 // group * group :].isnan().all()
    y[1, 37 // group * group : (37 // group + 1) * group] = 0
    y[2, 289 // group * group :] = 0
    assert y.isfinite().all()


def test_a_range_beyond_fp32_is_non_finite_not_wrong(backend):
    x = torch.tensor([[3e38, -3e38] + [0.0] * 30])
    codec = lowbit.codec("int8:g32")
    assert codec.decode(codec.encode(x), x.shape, torch.float32).isnan().all()


@pytest.mark.parametrize("sym", [False, True])
def test_zeros_constants_and_subnormals(backend, sym):
    codec = lowbit.codec(spec_of(4, 32, sym))
    x = torch.stack(
        [torch.zeros(32), -torch.zeros(32), torch.full((32,), 3.0), torch.full((32,), -7.0), torch.full((32,), 1e-44)]
    )
    y = codec.decode(codec.encode(x), x.shape, torch.float32)
    assert torch.equal(y[:2], torch.zeros(2, 32))
    assert (y - x).abs().max() <= 1e-38
    if not sym:
        assert torch.equal(y[2:4], x[2:4])


def test_a_token_does_not_see_its_neighbours(backend):
    codec, x = lowbit.codec("int3:g64"), sample((9, 100), 7)
    together = codec.decode(codec.encode(x), x.shape, x.dtype)
    for token in range(9):
        alone = codec.decode(codec.encode(x[token : token + 1]), (1, 100), x.dtype)
        assert torch.equal(alone[0], together[token])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(0, 300), st.integers(2, 8), st.sampled_from(GROUPS), st.booleans(), st.randoms())
def test_any_bytes_decode_and_lengths_are_exact(rows, features, bits, group, sym, random):
    codec = lowbit.codec(spec_of(bits, group, sym))
    size = codec.wire_nbytes((rows, features))
    wire = torch.tensor(list(random.randbytes(size)), dtype=torch.uint8)
    assert codec.decode(wire, (rows, features), torch.bfloat16).shape == (rows, features)
    assert codec.encode(torch.zeros(rows, features)).numel() == size
    with pytest.raises(lowbit.LowBitError, match=f"needs {size} bytes"):
        codec.decode(torch.zeros(size + 16, dtype=torch.uint8), (rows, features), torch.bfloat16)


@pytest.mark.parametrize(
    "spec, bits",
    [
        ("int4:g32", 5.0),
        ("int4:g32:sym", 4.5),
        ("int8:g128", 8.25),
        ("int2:g256", 2.125),
        ("int5:g64", 5.5),
        ("bf16", 16.0),
    ],
)
def test_bits_per_value_counts_everything(spec, bits):
    codec = lowbit.codec(spec)
    assert codec.bits_per_value((512, 4096)) == bits
    assert codec.bits_per_value((512, 4096)) == 8 * codec.encode(torch.zeros(512, 4096)).numel() / (512 * 4096)


def test_non_contiguous_and_unaligned(backend):
    codec, x = lowbit.codec("int4:g32"), sample((64, 96), 9)
    assert torch.equal(codec.encode(x.t()), codec.encode(x.t().contiguous()))
    wire = codec.encode(x)
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), wire])[3:]
    assert torch.equal(codec.decode(shifted, x.shape, x.dtype), codec.decode(wire, x.shape, x.dtype))


def test_bf16_round_down_against_every_neighbour():
    x = sample((4, 1000), 11).flatten()
    down = affine._bf16_down(x).float()
    assert (down <= x).all()
    expected = np.array([oracle.to_bf16(float(v), down=True) for v in x])
    assert np.array_equal(down.numpy(), expected)
