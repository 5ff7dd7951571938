"""Integers with spikes: wire and values against an independent oracle, both backends bit for bit, error in bounds."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import megatron_lowbit as lowbit
from megatron_lowbit.kernels import cpu_spike
from tests.codecs import oracle_spike as oracle
from tests.codecs.test_affine import DTYPES, GROUPS, SHAPES, WIDTHS, same_bits, sample

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
SPIKES = sorted(name for name in GOLDEN["wires"] if name.endswith(":spike"))


def spec_of(bits: int, group: int, sym: bool) -> str:
    return f"int{bits}:g{group}" + (":sym" if sym else "") + ":spike"


def round_trip(codec, x: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(x), x.shape, torch.float32)


def random_wire(codec, shape, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (codec.wire_nbytes(shape),), dtype=torch.uint8, generator=generator)


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """NaN where NaN is, else the same bits; the bits of a NaN are not specified."""
    return torch.equal(a.isnan(), b.isnan()) and same_bits(a.nan_to_num(), b.nan_to_num())


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
        for bytes_ in (wire, random_wire(codec, shape)):
            expected = oracle.decode(bytes(bytes_.tolist()), *rows.shape, bits, group, sym)
            assert same_values(codec.decode(bytes_, shape, torch.float32), torch.from_numpy(expected).view(shape))


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("exponent", [-149, -140, -127, -126, -120, -112, -100, 100, 120, 126])
def test_the_ends_of_the_exponents_match_the_oracle(backend, sym, exponent):
    """Where short floats run out of normal numbers, and where they reach beyond the largest."""
    x = torch.randint(-300, 300, (4, 70), generator=torch.Generator().manual_seed(exponent + 200)) / 256 * 2.0**exponent
    for bits in (2, 5, 8):
        codec = lowbit.codec(spec_of(bits, 32, sym))
        wire = codec.encode(x)
        assert bytes(wire.tolist()) == oracle.encode(x.numpy(), bits, 32, sym)
        expected = oracle.decode(bytes(wire.tolist()), 4, 70, bits, 32, sym)
        assert same_bits(codec.decode(wire, x.shape, torch.float32), torch.from_numpy(expected))


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group", GROUPS)
def test_backends_agree_bit_for_bit(monkeypatch, bits, group, sym):
    codec = lowbit.codec(spec_of(bits, group, sym))
    for shape in [(1, 1), (5, 33), (2, 300), (3, 2, 129), (40, 256)]:
        for dtype in DTYPES:
            x, results = sample(shape, bits * group).clamp(-6e4, 6e4).to(dtype), []
            x.view(-1)[200::301] = torch.nan
            for name in ("reference", "numba"):
                monkeypatch.setenv("LOWBIT_BACKEND", name)
                wire = codec.encode(x)
                wires = torch.stack([wire, codec.encode(-x), codec.encode(x.flip(-1)), random_wire(codec, shape)])
                totals = [torch.empty((x.numel() // shape[-1], shape[-1]), dtype=dtype) for _ in range(2)]
                codec.reduce_rows(wires[:3], totals[0])
                codec.reduce_rows(wires, totals[1])
                results.append((wire, codec.decode(wire, shape, dtype), *totals))
            assert all(same_bits(a, b) for a, b in zip(*results, strict=True)), (shape, dtype)


@pytest.mark.parametrize("name", SPIKES)
def test_golden_wires(backend, name):
    x = torch.tensor(GOLDEN["input"]).view(2, 43) / 16
    assert bytes(lowbit.codec(name).encode(x).tolist()).hex() == GOLDEN["wires"][name]


def test_every_spec_has_a_golden_wire():
    assert len(SPIKES) == 14


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_spikes_are_exact_in_value_and_place(backend, dtype, sym):
    x = sample((40, 96), 3).clamp(-6e4, 6e4).to(dtype)
    y, exact = round_trip(lowbit.codec(spec_of(2, 32, sym)), x).view(-1, 32), x.bfloat16().float().view(-1, 32)
    for group in range(len(exact)):
        for value in (exact[group].min(), exact[group].max()):
            first = (exact[group] == value).nonzero()[0]
            assert y[group, first] == value


groups_of_values = st.lists(st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100), min_size=1, max_size=70)


@settings(max_examples=200, deadline=None)
@given(groups_of_values, st.integers(2, 8), st.sampled_from(GROUPS), st.booleans(), st.booleans())
def test_error_is_within_the_bound(row, bits, group, sym, bf16):
    """Half a step (3/2 on the far side of a symmetric range), a step being what docs/wire-format.md says at most."""
    x = torch.tensor([row])
    x = x.bfloat16().float() if bf16 else x
    y = round_trip(lowbit.codec(spec_of(bits, group, sym)), x).double()
    for start in range(0, x.shape[1], group):
        part, got = x[0, start : start + group].double(), y[0, start : start + group]
        rounded = part.float().bfloat16().double()
        low, high, magnitude = rounded.min(), rounded.max(), float(rounded.abs().max())
        assert (got >= low).all() and (got <= high).all(), "outside of the group's range"
        places = {int((rounded == low).nonzero()[0]), int((rounded == high).nonzero()[0])}
        rest = torch.tensor([i for i in range(len(part)) if i not in places], dtype=torch.long)
        if not len(rest):
            continue
        lo, hi = rounded[rest].min(), rounded[rest].max()
        floor = magnitude * 2.0 ** -(12 + bits)  # the smallest scale
        if sym:
            step = 9 / 8 * max(-lo, hi) / (2 ** (bits - 1) + 1 / 2) + floor
            bound = 3 / 2 * step
        else:
            begin = lo if lo == low else lo + (hi - lo) / 2 ** (bits + 1)
            anchor = low if low > 0 else high if high < 0 else 0
            span = min(hi - low, hi - begin + abs(begin - anchor) / 8 + magnitude * 2.0**-12)
            step = 17 / 16 * span / (2**bits - (1 if hi == high else 1 / 2)) + floor
            assert step <= 17 / 16 * (high - low) / (2**bits - 1) + floor
            bound = step / 2
        bound += (0 if bf16 else magnitude * 2**-8) + magnitude * 2**-21 + 2.0**-117
        assert float((part - got)[rest].abs().max()) <= float(bound)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=60), st.integers(2, 8), st.integers(-20, 20), st.integers(-100, 0))
def test_grids_that_touch_the_spikes_are_exact(steps, bits, exponent, offset):
    steps = [0, 2**bits - 1] * 2 + [s % 2**bits for s in steps]
    x = (torch.tensor([steps]).float() + offset) * 2.0**exponent
    assert torch.equal(round_trip(lowbit.codec(spec_of(bits, 256, False)), x), x)


@pytest.mark.parametrize("sym", [False, True])
def test_zeros_constants_and_tiny_values(backend, sym):
    codec = lowbit.codec(spec_of(4, 32, sym))
    one_spike = torch.zeros(32).index_fill(0, torch.tensor(7), 2.0**100)
    exact = torch.stack(
        [*(torch.full((32,), v) for v in (0.0, -0.0, 3.0, -7.0, 2.0**-133, -(2.0**120))), one_spike, -one_spike]
    )
    assert torch.equal(round_trip(codec, exact), exact)
    for n in range(1, 4):  # groups that are hardly more than spikes
        x = torch.tensor([[1.5, -2.0, -2.0][:n]])
        assert torch.equal(round_trip(codec, x)[0, :2], x[0, :2])
    tiny = torch.linspace(-1, 1, 32)[None] * 1e-38
    assert (round_trip(codec, tiny) - tiny).abs().max() <= 1e-38


@pytest.mark.parametrize("sym", [False, True])
def test_a_huge_spike_leaves_the_rest_alone(backend, sym):
    """Up to 2**13 times larger than the rest: as good as without it, and far better than without `spike`."""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    errors, rest = [], torch.arange(64) != 5
    for factor in (4.0, 1000.0, 8000.0):
        x[:, 5] = factor
        errors.append(float((round_trip(lowbit.codec(spec_of(4, 64, sym)), x) - x)[:, rest].square().mean()))
    assert max(errors) < 1.05 * min(errors)
    plain = lowbit.codec("int4:g64:sym" if sym else "int4:g64")
    assert float((round_trip(plain, x) - x)[:, rest].square().mean()) > 50 * errors[2]


@pytest.mark.parametrize("sym", [False, True])
def test_more_bits_lose_less(backend, sym):
    x, errors = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)), []
    for bits in WIDTHS:
        errors.append(float((round_trip(lowbit.codec(spec_of(bits, 64, sym)), x) - x).square().mean()))
    assert all(a > 3 * b for a, b in itertools.pairwise(errors)), errors


def test_better_than_more_bits_where_there_are_outliers(backend):
    """1/64 of the features 10 to 40 times larger, the case that `spike` is for."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 4096, generator=generator)
    x[:, ::64] *= 10 + 30 * torch.rand(64, generator=generator)
    for plain, spike in (("int3:g32", "int2:g32:spike"), ("int5:g32", "int4:g32:spike")):
        plain, spike = lowbit.codec(plain), lowbit.codec(spike)
        assert spike.bits_per_value(x.shape) < plain.bits_per_value(x.shape)
        error = (round_trip(spike, x) - x).square().mean()
        assert 3 * error < (round_trip(plain, x) - x).square().mean()


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_equivariant_under_powers_of_two_and_sign(backend, bits, sym):
    """Sign: only symmetric, and where the two ends of the rest are not of the same magnitude, as here."""
    codec, x = lowbit.codec(spec_of(bits, 32, sym)), torch.randn(8, 96, generator=torch.Generator().manual_seed(bits))
    y = round_trip(codec, x)
    for factor in (4.0, 0.125, 2.0**-70, *((-1.0, -0.5) if sym else ())):
        assert torch.equal(round_trip(codec, factor * x), factor * y)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("spec", ["int2:g32:spike", "int4:g64:sym:spike", "int7:g64:spike", "int8:g128:spike"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_stays_non_finite_and_in_its_group(backend, spec, value, dtype):
    codec, x = lowbit.codec(spec), sample((3, 290), 5).clamp(-6e4, 6e4).to(dtype)
    x[1, 37] = value
    x[2, 289] = -value
    y, group = codec.decode(codec.encode(x), x.shape, dtype), codec.group
    for row, at in ((1, 37), (2, 289)):
        part = y[row, at // group * group : (at // group + 1) * group]
        assert part.isnan().all()
        part.zero_()
    assert y.isfinite().all()


def test_ranges_beyond_fp32(backend):
    codec, x = lowbit.codec("int8:g32:spike"), torch.zeros(4, 32)
    x[0, :2] = torch.tensor([3e38, -3e38])  # the spikes' own
    x[1, :4] = torch.tensor([3e38, 3e38, -3e38, -3e38])  # the rest's
    x[2, 0] = 3.4e38  # infinite in bf16
    y = round_trip(codec, x)
    assert torch.equal(y[0], x[0].bfloat16().float())
    assert y[1:3].isnan().all()
    assert torch.equal(y[3], x[3])


def test_a_token_does_not_see_its_neighbours(backend):
    codec, x = lowbit.codec("int3:g64:spike"), sample((9, 100), 7)
    together = round_trip(codec, x)
    for token in range(9):
        assert torch.equal(round_trip(codec, x[token : token + 1])[0], together[token])


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


@pytest.mark.parametrize("features", [7, 40, 250])
def test_a_position_beyond_a_short_group_is_ignored(backend, features):
    codec, x = lowbit.codec("int4:g256:spike"), sample((3, features), 2)
    wire = codec.encode(x)
    codec.split(wire, 3, features)["position8"].fill_(255)
    memory = torch.full((3 * features + 600,), 7.0)
    out = memory[300:-300].view(3, features)
    codec.reduce_rows(wire.view(1, -1), out)
    assert (memory[:300] == 7).all() and (memory[-300:] == 7).all()
    assert out.isfinite().all() and out.shape == x.shape


def test_the_default_dtype_is_not_seen(backend):
    codec, x = lowbit.codec("int8:g32:spike"), sample((4, 64), 6)
    wire = codec.encode(x)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(codec.encode(x), wire)
            y = codec.decode(wire, x.shape, torch.float32)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(y, codec.decode(wire, x.shape, torch.float32))


@pytest.mark.parametrize(
    "spec, bits",
    [
        ("int2:g32:spike", 2 + 58 / 32),
        ("int2:g32:sym:spike", 2 + 50 / 32),
        ("int4:g32:spike", 4 + 58 / 32),
        ("int4:g64:spike", 4 + 60 / 64),
        ("int4:g128:spike", 4 + 62 / 128),
        ("int8:g256:spike", 8 + 64 / 256),
    ],
)
def test_bits_per_value_counts_everything(spec, bits):
    codec = lowbit.codec(spec)
    assert codec.bits_per_value((512, 4096)) == bits
    assert codec.bits_per_value((512, 4096)) == 8 * codec.encode(torch.zeros(512, 4096)).numel() / (512 * 4096)


def test_a_simulated_all_reduce_is_close():
    partials = [torch.randn(3, 256, generator=torch.Generator().manual_seed(r)) for r in range(4)]
    for algorithm in ("one-shot", "two-step"):
        y = lowbit.simulate.all_reduce(partials, "int8:g64:spike", algorithm)
        assert torch.allclose(y, sum(partials), atol=0.1)


def test_all_specs_share_one_compiled_kernel(monkeypatch):
    monkeypatch.setenv("LOWBIT_BACKEND", "numba")
    for spec, dtype in (("int4:g32:spike", torch.bfloat16), ("int8:g256:sym:spike", torch.float32)):
        codec, x = lowbit.codec(spec), sample((4, 50), 0).to(dtype)
        codec.decode(codec.encode(x), x.shape, dtype)
    for kernel in (cpu_spike._encode, cpu_spike._reduce):
        assert len(kernel.signatures) == 1
