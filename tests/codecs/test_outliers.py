"""Static outlier features: what they do to every codec, against the oracles; and what they are for, the accuracy."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import megatron_lowbit as lowbit
from megatron_lowbit import spec
from megatron_lowbit.codecs.statistics import Statistics
from tests.codecs import make_golden, oracle, oracle_gauss, oracle_selective, samples
from tests.codecs.samples import DTYPES, same, same_bits
from tests.codecs.test_gauss import sqnr

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
BASES = ["int4:g32", "int3:g64:sym", "gauss4:g128", "gauss2:g256"]
FINITE = tuple(kind for kind in samples.KINDS if kind not in ("nan", "inf", "both infs", "overflow", "top"))


def bound_codec(base: str, features: int, outliers: tuple[int, ...]) -> lowbit.codecs.Codec:
    """The base codec with just these outliers."""
    facts = Statistics(outliers, torch.zeros(1, features), torch.ones(1, features))
    return lowbit.codec(f"{base}:outliers={len(outliers)}/{features}").bind(facts, 0)


def outliers_of(features: int, seed: int) -> tuple[int, ...]:
    """Single ones, neighbours, both ends, nearly all and all of them."""
    scattered = samples.statistics(features, max(1, features // 20), seed=seed).outliers
    every = tuple(range(features))
    return (scattered, every[:1], every[-1:], every[features // 3 : features // 2 + 1], every[1::2] or (0,), every)[
        seed % 6
    ]


@pytest.fixture(params=["reference", "numba"])
def backend(request, monkeypatch):
    monkeypatch.setenv("LOWBIT_BACKEND", request.param)
    return request.param


def base_oracle(base: str, x: np.ndarray, wires: int) -> tuple[bytes, np.ndarray]:
    """-> the wire of ordinary features; the sum of so many of it."""
    if not x.shape[1]:
        return b"", x
    leg = spec.parse_leg(base)
    bits, group = leg.bits, leg.group
    if base.startswith("gauss"):
        wire = oracle_gauss.encode(x, bits, group)
        return wire, oracle_gauss.decode(wires * [wire], *x.shape, bits, group)
    wire = oracle.encode(x, bits, group, leg.sym)
    one = oracle.decode(wire, *x.shape, bits, group, leg.sym)
    with np.errstate(all="ignore"):
        return wire, sum(wires * [one], start=np.float32(-0.0))


@pytest.mark.parametrize("base", BASES)
def test_wire_and_values_match_the_oracles(backend, base):
    for seed, features in enumerate([1, 2, 33, 64, 100, 300, 277, 260]):
        outliers = outliers_of(features, seed)
        codec, x = bound_codec(base, features, outliers), samples.rows(features, seed, FINITE[seed % 5 :: 5])
        ordinary, picked = oracle_selective.split(x.numpy(), outliers)
        part, values = base_oracle(base, ordinary, 3)
        section = oracle_selective.outlier_section(picked)
        wire, total = codec.encode(x), torch.empty_like(x)
        assert bytes(wire.tolist()) == part + section, (features, outliers)
        codec.reduce_rows(torch.stack(3 * [wire]), total)
        kept = oracle_selective.outliers_of(section, *picked.shape)
        assert same(total, torch.from_numpy(oracle_selective.join(values, kept + kept + kept, outliers)))


@pytest.mark.parametrize("base", BASES)
def test_backends_agree_bit_for_bit(monkeypatch, base):
    for seed, features in enumerate([*samples.FEATURES, 4032]):
        for dtype in DTYPES:
            codec = bound_codec(base, features, outliers_of(features, seed + DTYPES.index(dtype)))
            codec = codec.inner if seed % 3 == 2 else codec
            x = samples.some_rows(features, 4 if features < 4032 else 1, seed).to(dtype)
            results = []
            for name in ("reference", "numba"):
                monkeypatch.setenv("LOWBIT_BACKEND", name)
                wires, total = torch.stack([codec.encode(part) for part in (x, -x, x.flip(0))]), torch.empty_like(x)
                codec.reduce_rows(wires, total)
                results.append((wires, codec.decode(wires[0], x.shape, dtype), total))
            assert all(same_bits(a, b) for a, b in zip(*results, strict=True)), (features, dtype)


@pytest.mark.parametrize("name", sorted(GOLDEN["calibrated_wires"]))
def test_golden_wires(backend, name):
    """Bytes on the wire are a format: they may only change together with its version."""
    low, high = (torch.from_numpy(bound)[None] for bound in (make_golden.LOW, make_golden.HIGH))
    x = torch.tensor(make_golden.LONG_INPUT).view(2, 300) / 16
    codec = lowbit.codec(name).bind(Statistics(make_golden.OUTLIERS, low, high), 0)
    assert bytes(codec.encode(x).tolist()).hex() == GOLDEN["calibrated_wires"][name]


@pytest.mark.parametrize("base", BASES)
def test_the_inner_codec_has_the_same_wire(backend, base):
    """It takes rows that are split and rotated, and leaves them so: apart from rounding, the same message."""
    outliers = outliers_of(100, 0)
    codec, x = bound_codec(base, 100, outliers), samples.rows(100, 1, ("gaussian", "heavy", "offset"))
    y, total = codec.decode(codec.encode(x), x.shape, x.dtype), torch.empty_like(x)
    codec.inner.reduce_rows(codec.encode(x)[None], total)
    assert codec.inner.wire_nbytes(x.shape) == codec.wire_nbytes(x.shape)
    assert same_bits(total[:, 100 - len(outliers) :], y[:, outliers])
    again = codec.inner.decode(codec.inner.encode(total), x.shape, x.dtype)
    assert same_bits(again[:, 100 - len(outliers) :], y[:, outliers]) and sqnr(total, again) > 10


def test_all_features_may_be_outliers(backend):
    for base, features in (("int2:g32", 1), ("gauss2:g128", 5), ("gauss4:g256", 300)):
        facts = Statistics(tuple(range(features)), torch.zeros(1, features), torch.ones(1, features))
        codec, x = lowbit.codec(f"{base}:outliers=1").bind(facts, 0), samples.rows(features)
        assert codec.wire_nbytes(x.shape) == -(-x.numel() * 2 // 16) * 16
        assert same(codec.decode(codec.encode(x), x.shape, torch.bfloat16), x.bfloat16())
        assert same(codec.inner.decode(codec.inner.encode(x), x.shape, torch.bfloat16), x.bfloat16())


@pytest.mark.parametrize(
    "fraction, features, count",
    [("1/64", 4096, 64), ("1/64", 64, 1), ("1/64", 63, 1), ("1/64", 1, 1), ("1/3", 300, 100), ("0.29", 100, 29)],
)
def test_how_many_are_outliers(fraction, features, count):
    codec = lowbit.codec(f"int8:g32:outliers={fraction}")
    assert codec.count(features) == count == max(1, int(Fraction(fraction) * features))
    ordinary = lowbit.codec("int8:g32").wire_nbytes((16, features - count))
    assert codec.wire_nbytes((16, features)) == ordinary + 32 * count


@pytest.mark.parametrize(
    "name, bits", [("gauss4:g128:outliers=1/64", 4.3125), ("int4:g32:outliers=1/64", 5.171875), ("selective4", 4.1875)]
)
def test_sizes_are_known_without_a_calibration(name, bits):
    codec = lowbit.codec(name)
    assert codec.bits_per_value((512, 4096)) == bits
    facts = samples.statistics(4096, 64)
    assert codec.bind(facts, 0).encode(torch.zeros(4, 4096)).numel() == codec.wire_nbytes((4, 4096))
    assert codec.wire_nbytes((0, 4096)) == codec.encode(torch.zeros(0, 4096)).numel() == 0


@pytest.mark.parametrize("name", ["int4:outliers=1/64", "gauss4:outliers=1/64", "selective4"])
def test_what_does_not_fit_is_refused(backend, name):
    x, codec = torch.zeros(2, 128), lowbit.codec(name)
    bound = codec.bind(samples.statistics(128, 2), 0)
    wire = torch.zeros(codec.wire_nbytes((2, 128)), dtype=torch.uint8)
    for unbound in (codec, codec.inner):
        with pytest.raises(
            lowbit.ConfigError, match="needs a calibration: make a file with 'megatron-lowbit calibrate'"
        ):
            unbound.encode(x)
        with pytest.raises(lowbit.ConfigError, match="needs a calibration"):
            unbound.decode(wire, x.shape, x.dtype)
    for other in (64, 192):
        for some in (bound, bound.inner):
            with pytest.raises(lowbit.ConfigError, match=f"{other} features at a site that was calibrated with 128"):
                some.encode(torch.zeros(2, other))
            with pytest.raises(lowbit.ConfigError, match=f"{other} features at a site"):
                wire = torch.zeros(codec.wire_nbytes((2, other)), dtype=torch.uint8)
                some.decode(wire, (2, other), torch.float32)
    with pytest.raises(lowbit.ConfigError, match="has 2 outliers among 128 features, the calibration has 3"):
        codec.bind(samples.statistics(128, 3), 0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_stays_where_it_is(backend, value):
    for base, group in (("int4:g32", 32), ("gauss3:g64", 64)):
        codec, x = bound_codec(base, 100, (0, 50, 99)), torch.randn(3, 100, generator=torch.Generator().manual_seed(1))
        x[1, 50], x[2, 52] = value, value  # an outlier; the 50th ordinary feature
        hit = torch.zeros(3, 97, dtype=torch.bool)
        hit[2, 50 // group * group : (50 // group + 1) * group] = True
        y = codec.decode(codec.encode(x), x.shape, torch.float32)
        kept = [feature for feature in range(100) if feature not in (0, 50, 99)]
        assert torch.equal(y[:, kept].isnan(), hit) and y[:, kept][~hit].isfinite().all()
        assert same(y[1, 50], torch.tensor(value)) and y[:, [0, 99]].isfinite().all() and y[[0, 2], 50].isfinite().all()


def test_a_token_does_not_see_its_neighbours(backend):
    for base in BASES:
        codec, x = bound_codec(base, 100, outliers_of(100, 0)), samples.rows(100, 7)[::2]
        together = codec.decode(codec.encode(x), x.shape, x.dtype)
        for token in range(len(x)):
            alone = codec.decode(codec.encode(x[token : token + 1]), (1, 100), x.dtype)
            assert same_bits(alone[0], together[token])


def test_which_legs_share_their_split():
    def transform(name: str, seed: int = 0):
        return lowbit.codec(name).bind(samples.statistics(128, 2, seed=seed), 0).transform

    assert transform("int4:outliers=1/64") == transform("selective4") == transform("int8:sym:outliers=1/64")
    assert transform("gauss4:outliers=1/64") == transform("gauss7:outliers=1/64")
    for other in ("int4:outliers=1/64", "gauss4:g64:outliers=1/64", "gauss4"):
        assert transform("gauss4:outliers=1/64") != transform(other)
    assert transform("selective4") != transform("selective4", seed=1)
    assert lowbit.codec("gauss4").transform == lowbit.codec("gauss2").transform != lowbit.codec("gauss4:g64").transform


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3), st.integers(1, 200), st.sampled_from(BASES), st.integers(0, 100), st.randoms())
def test_any_bytes_decode_alike_and_lengths_are_exact(rows, features, base, seed, random):
    whole = bound_codec(base, features, outliers_of(features, seed))
    for codec, dtype in ((whole, torch.float32), (whole, torch.bfloat16), (whole.inner, torch.float16)):
        size = codec.wire_nbytes((rows, features))
        wire, results = torch.tensor(list(random.randbytes(size)), dtype=torch.uint8), []
        for name in ("reference", "numba"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("LOWBIT_BACKEND", name)
                results.append(codec.decode(wire, (rows, features), dtype))
                assert codec.encode(torch.ones(rows, features)).numel() == size
        assert same(*results)
        with pytest.raises(lowbit.LowBitError, match=f"needs {size} bytes"):
            codec.decode(torch.zeros(size + 16, dtype=torch.uint8), (rows, features), dtype)


def test_good_on_gaussian_outlier_and_heavy_tailed_values_at_once():
    """The codec's reason to exist: at most 4.35 bits, at least 20 dB on all three."""
    generator, shape = torch.Generator().manual_seed(1), (256, 4096)
    outliers = tuple(sorted(torch.randperm(4096, generator=generator)[:64].tolist()))
    ordinary = torch.ones(4096, dtype=torch.bool)
    ordinary[list(outliers)] = False
    gaussian = torch.randn(shape, generator=generator)
    wide = torch.where(ordinary, 1.0, 10 + 30 * torch.rand(4096, generator=generator))
    student = gaussian / (sum(torch.randn(shape, generator=generator) ** 2 for _ in range(3)) / 3).sqrt()
    codec = lowbit.codec("gauss4:g128:outliers=1/64")
    codec = codec.bind(Statistics(outliers, torch.zeros(1, 4096), torch.ones(1, 4096)), 0)
    assert codec.bits_per_value(shape) <= 4.35
    for name, x in {"gaussian": gaussian, "features": gaussian * wide, "student": student}.items():
        y = codec.decode(codec.encode(x), shape, torch.float32)
        assert sqnr(x, y) >= 20 and sqnr(x[:, ordinary], y[:, ordinary]) >= 20, name
