"""Gaussian codecs: wire and values against an independent oracle, backends bit for bit, accuracy, symmetries, bound."""

import itertools
import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import megatron_lowbit as lowbit
from tests.codecs import make_golden, oracle_gauss, samples
from tests.codecs.samples import DTYPES, FEATURES, SIGN_PATTERN, same, same_bits
from tests.codecs.test_lloyd_max import DECIBELS

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
WIDTHS, GROUPS = range(2, 8), (32, 64, 128, 256)
NAN_SCALE_FROM = 2.0**115  # below, neither rotating nor rotating back overflows


def codec_of(bits: int, group: int, rotates: bool = True) -> lowbit.codecs.Codec:
    codec = lowbit.codec(f"gauss{bits}:g{group}")
    return codec if rotates else codec.inner


def through(codec, x: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(x), x.shape, torch.float32)


def sqnr(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x.double(), y.double()
    return 10 * math.log10(float(x.square().mean() / (x - y).square().mean()))


@pytest.fixture(params=["reference", "numba"])
def backend(request, monkeypatch):
    monkeypatch.setenv("LOWBIT_BACKEND", request.param)
    return request.param


@cache
def expected(bits: int, group: int, features: int, rotates: bool):
    """-> x, the oracle's wire, the values of that wire, and of it, one of x.flip(0) and it again together."""
    x = samples.some_rows(features, 3, first=features + 5 * bits)
    wires = [oracle_gauss.encode(part.numpy(), bits, group, rotates) for part in (x, x.flip(0))]
    values = [oracle_gauss.decode(some, *x.shape, bits, group, rotates) for some in (wires[:1], wires + wires[:1])]
    return x, wires[0], *(torch.from_numpy(y) for y in values)


@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_wire_and_values_match_the_oracle(backend, bits, rotates):
    cases = {(GROUPS[(bits + n) % 4], features) for n, features in enumerate(FEATURES)} | {(256, 256), (256, 300)}
    for group, features in sorted(cases):
        codec = codec_of(bits, group, rotates)
        x, encoded, one, three = expected(bits, group, features, rotates)
        wire = codec.encode(x)
        assert bytes(wire.tolist()) == encoded, (group, features)
        assert same(codec.decode(wire, x.shape, torch.float32), one)
        total = torch.empty_like(x)
        codec.reduce_rows(torch.stack([wire, codec.encode(x.flip(0)), wire]), total)
        assert same(total, three), (group, features)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_backends_agree_bit_for_bit(monkeypatch, bits, group):
    for n, features in enumerate([*FEATURES[bits % 3 :: 3], 4032], group // 32 + 5 * bits):
        codec, dtype = codec_of(bits, group, rotates=bool(n % 4)), DTYPES[n % 3]
        x, results = samples.rows(features, n).to(dtype) if features < 4032 else samples.some_rows(features, 1, n), []
        for name in ("reference", "numba"):
            monkeypatch.setenv("LOWBIT_BACKEND", name)
            wires = torch.stack([codec.encode(part) for part in (x, -x, x.flip(-1))])
            total = torch.empty_like(x)
            codec.reduce_rows(wires[: 2 + n % 2], total)
            results.append((wires, codec.decode(wires[0], x.shape, x.dtype), total))
        assert all(same_bits(a, b) for a, b in zip(*results, strict=True)), (x.shape, dtype)


@pytest.mark.parametrize("name", sorted(GOLDEN["gauss_wires"]))
def test_golden_wires(backend, name):
    """Bytes on the wire are a format: they may only change together with its version."""
    x = torch.tensor(make_golden.LONG_INPUT).view(2, 300) / 16
    assert bytes(lowbit.codec(name).encode(x).tolist()).hex() == GOLDEN["gauss_wires"][name]


def bound(bits: int, n: int) -> float:
    """docs/wire-format.md: the largest error of a group, as a part of its length, before roundings."""
    levels = [float(level) for level in oracle_gauss.levels(bits)]
    top, gap = levels[-1], max(2 * levels[0], *(b - a for a, b in itertools.pairwise(levels)))
    hidden = gap**2 / 16 + gap / (32 * top) if n == 256 else 0.0
    return math.sqrt(gap**2 / 4 + max(0.0, 1 - top / math.sqrt(n)) ** 2 + hidden)


def check_bound(x: torch.Tensor, bits: int, group: int, rotates: bool) -> None:
    y = through(codec_of(bits, group, rotates), x)
    for part, decoded in zip(x.double().split(group, -1), y.double().split(group, -1), strict=True):
        length, n = part.norm(dim=-1), part.shape[-1]
        limit = (bound(bits, n) + 2**-7 + 2**-20) * length + math.sqrt(n) * 2.0**-125
        assert ((part - decoded).norm(dim=-1) <= limit).all(), (n, (part - decoded).norm(dim=-1) / length)


values = st.one_of(
    st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100),
    st.sampled_from([0.0, 1.0, -1.0, 1e-45, 2.0**-126, -(2.0**-127), 2.0**100]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(values, min_size=1, max_size=70), st.integers(1, 260), st.integers(2, 7), st.sampled_from(GROUPS))
@example([2.0**-126], 1, 2, 32)
@example([0.0] * 31 + [1.0], 256, 2, 256)
def test_error_is_within_the_bound(row, features, bits, group):
    """With the row repeated to as many features, so that groups have structure."""
    x = torch.tensor([(row * (features // len(row) + 1))[:features]])
    for rotates in (True, False):
        check_bound(x, bits, group, rotates)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 256), st.floats(0, 4), st.integers(2, 7), st.integers(0, 2**31), st.booleans())
def test_error_is_within_the_bound_of_few_large_values(large, size, bits, seed, same_parity):
    """What the bound is made of: values far beyond the top level; and all of those whose parity hides one bit."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.arange(256).view(16, 16).t().flatten() if same_parity else torch.randperm(256, generator=generator)
    x = torch.randn(1, 256, generator=generator) * size
    x[0, places[:large]] += 10.0
    for group, rotates in ((32, False), (256, False), (256, True)):
        check_bound(x, bits, group, rotates)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group", GROUPS)
def test_is_equivariant_under_sign_and_powers_of_two(backend, bits, group):
    """Exactly so, as no rotated value here is 0, which would be encoded as a positive one. But another power of two is
    another scale, and hidden in a group of 256 it moves other codes."""
    codec, x = codec_of(bits, group), torch.randn(8, 300, generator=torch.Generator().manual_seed(bits))
    y = through(codec, x)
    for factor in (-1.0, 4.0, -0.125, 2.0**100, -(2.0**-100)):
        start = 256 if group == 256 and factor != -1 else 0
        assert torch.equal(through(codec, factor * x)[:, start:], factor * y[:, start:])


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group", GROUPS)
def test_zeros_are_exact_and_patterns_survive(backend, bits, group):
    codec = codec_of(bits, group)
    for zeros in (torch.zeros(3, 300), -torch.zeros(3, 300), torch.full((3, 300), 1e-45)):
        assert torch.equal(through(codec, zeros), torch.zeros(3, 300))
    pattern = 3 * SIGN_PATTERN.repeat(4)[None]  # all of a group in one rotated value: the worst input there is
    check_bound(pattern, bits, group, rotates=True)
    assert through(codec, pattern).isfinite().all()


def test_constants_of_either_sign_and_single_values_keep_their_size(backend):
    for bits, group in itertools.product(WIDTHS, GROUPS):
        for features in (1, 32, 100, 256):
            x = torch.stack([torch.full((features,), value) for value in (3.0, -7e-30, 1e30)])
            y = through(codec_of(bits, group), x)
            assert sqnr(x[:1], y[:1]) > {2: 4.5, 3: 8.5}.get(bits, 12)
            assert y.sign().sum(1).sign().tolist() == [1, -1, 1]


def test_more_bits_lose_less(backend):
    for group in GROUPS:
        x = torch.randn(16, 512, generator=torch.Generator().manual_seed(group))
        figures = [sqnr(x, through(codec_of(bits, group), x)) for bits in WIDTHS]
        assert all(b > a + 5 for a, b in itertools.pairwise(figures)), figures


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_gaussian_values_lose_what_theory_says(bits, group):
    """The Lloyd-Max quantizer's distortion; less by what a scale fitted to few values gains, 1 / n of them at most."""
    x = torch.randn(256, 4096, generator=torch.Generator().manual_seed(5))
    figure = sqnr(x, through(codec_of(bits, group), x))
    assert DECIBELS[bits] - 0.1 < figure < DECIBELS[bits] + {32: 0.65, 64: 0.4, 128: 0.25, 256: 0.0}[group]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("features", [33, 72, 100, 160, 192, 252])
def test_short_groups_spread_their_outliers_as_well(bits, features):
    x = torch.randn(500, features, generator=torch.Generator().manual_seed(features))
    x[:, features // 2] *= 30
    assert sqnr(x, through(codec_of(bits, 256), x)) > DECIBELS[bits] - 1


@pytest.mark.parametrize(
    "spec, bits",
    [
        ("gauss4:g128", 4.125),
        ("gauss4", 4.125),
        ("gauss4:g256", 4.0),
        ("gauss2:g128", 2.125),
        ("gauss7:g32", 7.5),
        ("gauss3:g64", 3.25),
    ],
)
def test_bits_per_value_counts_everything(spec, bits):
    codec = lowbit.codec(spec)
    assert codec.bits_per_value((512, 4096)) == bits
    assert codec.bits_per_value((512, 4096)) == 8 * codec.encode(torch.zeros(512, 4096)).numel() / (512 * 4096)


def test_two_bits_beat_any_two_bit_integer():
    x = torch.randn(512, 4096, generator=torch.Generator().manual_seed(1))
    codec = lowbit.codec("gauss2:g128")
    assert codec.bits_per_value(x.shape) == 2.125 and sqnr(x, through(codec, x)) >= 9.2


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("spec", [f"gauss{bits}:g{group}" for bits, group in zip((2, 3, 4, 7), (32, 64, 128, 256))])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_stays_non_finite_and_in_its_group(backend, spec, value, dtype):
    codec, x = lowbit.codec(spec), torch.randn(3, 290, generator=torch.Generator().manual_seed(5)).to(dtype)
    x[1, 37], x[2, 289] = value, -value
    y, group = codec.decode(codec.encode(x), x.shape, dtype), codec.group
    hit = torch.zeros(3, 290, dtype=torch.bool)
    hit[1, 37 // group * group : (37 // group + 1) * group] = True
    hit[2, 289 // group * group :] = True
    assert torch.equal(y.isnan(), hit) and y[~hit].isfinite().all()


def test_a_rotation_beyond_fp32_is_nan_not_wrong(backend):
    for bits, group in itertools.product(WIDTHS, GROUPS):
        codec, x = codec_of(bits, group), torch.full((2, 300), 3e38)
        x[1] = SIGN_PATTERN.repeat(2)[:300] * NAN_SCALE_FROM
        y = through(codec, x)
        assert y[0, :256].isnan().all() and y[1].isfinite().all()


def test_a_token_does_not_see_its_neighbours(backend):
    for group in GROUPS:
        codec, x = codec_of(3, group), samples.rows(300, 7)[::2]
        together = through(codec, x)
        for token in range(len(x)):
            assert same_bits(through(codec, x[token : token + 1])[0], together[token])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4), st.integers(0, 300), st.sampled_from(WIDTHS), st.sampled_from(GROUPS), st.randoms())
def test_any_bytes_decode_alike_and_lengths_are_exact(rows, features, bits, group, random):
    for codec, dtype in ((codec_of(bits, group), torch.float32), (codec_of(bits, group, False), torch.bfloat16)):
        size = codec.wire_nbytes((rows, features))
        wires = torch.tensor([list(random.randbytes(size)) for _ in range(2)], dtype=torch.uint8)
        results = []
        for name in ("reference", "numba"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("LOWBIT_BACKEND", name)
                out = torch.empty(rows, features, dtype=dtype)
                if out.numel():
                    codec.reduce_rows(wires, out)
                results.append((codec.decode(wires[0], (rows, features), dtype), out))
                assert codec.encode(torch.ones(rows, features)).numel() == size
        assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
        with pytest.raises(lowbit.LowBitError, match=f"needs {size} bytes"):
            codec.decode(torch.zeros(size + 16, dtype=torch.uint8), (rows, features), dtype)
