"""What holds for every codec: drawn from the tables of the grammar, so that a new one is tested by being there."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import megatron_lowbit as lowbit
from megatron_lowbit import spec
from megatron_lowbit.codecs.base import Codec
from megatron_lowbit.codecs.statistics import Statistics
from tests.codecs import samples
from tests.codecs.samples import DTYPES, same, same_bits

FEATURES = [1, 2, 7, 16, 31, 32, 33, 36, 64, 73, 96, 100, 128, 252, 256, 292, 300]
MODERATE = ("gaussian", "small", "subnormal", "zero", "minus zero", "constant", "spike", "two spikes", "sign pattern",
            "alternating", "ramp", "offset", "integers")  # fmt: skip
SENDERS = 3


def specs_of(name: str) -> list[str]:
    """All spellings of a name that this version has a codec for."""
    family = next(family for family in spec.FAMILIES if name in family.names)
    groups = spec.GROUPS if family.group else (0,)
    flags = [set(some) for n in range(len(family.flags) + 1) for some in itertools.combinations(family.flags, n)]
    outliers = [family.outliers or None] + ([] if family.outliers is False else [Fraction(1, 8)])
    legs = [
        str(spec.Leg(name, group, outliers=fraction, **dict.fromkeys(some, True)))
        for group, some, fraction in itertools.product(groups, flags, outliers)
    ]
    return [leg for leg in legs if codec_of(leg)]


def codec_of(leg: str) -> Codec | None:
    try:
        return lowbit.codec(leg)
    except lowbit.ConfigError as error:
        if "not available in this version" in str(error):
            return None
        raise


def fits(codec: Codec, features: int) -> bool:
    """Some formats want whole blocks."""
    try:
        return codec.wire_nbytes((1, features)) > 0
    except lowbit.ConfigError:
        return False


@cache
def bound(leg: str, features: int) -> Codec:
    """That codec, as rank 0 has it. Ranges differ from rank to rank and have 0 among their values."""
    codec = lowbit.codec(leg)
    if not spec.parse_leg(leg).calibrated:
        return codec
    size = torch.exp2(torch.arange(SENDERS).float())[:, None].expand(-1, features)
    return codec.bind(Statistics(samples.statistics(features, codec.count(features)).outliers, -7 * size, 8 * size), 0)


SPECS = {name: specs_of(name) for name in spec.NAMES}


@st.composite
def codecs(draw, name: str) -> tuple[Codec, int]:
    """-> a codec of that name, the number of features it is bound to."""
    leg = draw(st.sampled_from(SPECS[name]))
    features = draw(st.sampled_from([n for n in FEATURES if fits(lowbit.codec(leg), n)]))
    return bound(leg, features), features


def every_codec(examples: int):
    """A test(codec, features, seed, ...) of each name, on codecs with any of its options."""

    def decorate(test):
        @pytest.mark.parametrize("name", spec.NAMES)
        def run(name):
            if not SPECS[name]:
                pytest.skip(f"{name} is not available in this version")

            @settings(max_examples=examples, deadline=None, database=None)
            @given(codecs(name), st.integers(0, 1000))
            def drawn(codec_and_features, seed):
                test(*codec_and_features, seed)

            drawn()

        run.__doc__ = test.__doc__
        return run

    return decorate


def each_backend(function) -> list:
    results = []
    for name in ("reference", "numba"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LOWBIT_BACKEND", name)
            results.append(function())
    return results


def reduced(codec: Codec, wires: torch.Tensor, rows: int, features: int, dtype=torch.float32) -> torch.Tensor:
    out = torch.empty(rows, features, dtype=dtype)
    codec.reduce_rows(wires, out)
    return out


@every_codec(8)
def test_backends_agree_bit_for_bit(codec, features, seed):
    for some, number in ((codec, 3), (codec.inner, 2)):
        x = samples.some_rows(features, 3, seed).to(DTYPES[seed % 3])

        def run(some=some, x=x, number=number):
            wires = torch.stack([some.encode(part) for part in (x, -x, x.flip(0))])
            return wires, some.decode(wires[0], x.shape, x.dtype), reduced(some, wires[:number], *x.shape, x.dtype)

        assert all(same(a, b) for a, b in zip(*each_backend(run)))


@every_codec(5)
def test_random_bytes_decode_alike(codec, features, seed):
    generator, dtype = torch.Generator().manual_seed(seed), DTYPES[seed % 3]
    wires = torch.randint(256, (2, codec.wire_nbytes((3, features))), generator=generator).to(torch.uint8)
    for some in (codec, codec.inner):
        results = each_backend(lambda some=some: reduced(some, wires, 3, features, dtype))
        assert same(*results) and results[0].shape == (3, features)


@every_codec(6)
def test_finite_values_stay_finite_and_their_shape_is_kept(codec, features, seed):
    kinds = [MODERATE[(seed + n) % len(MODERATE)] for n in range(6)]
    x = samples.rows(features, seed, tuple(kinds)).to(DTYPES[seed % 3])
    for shape in ((6, features), (2, 3, features), (1, 1, 6, features)):
        wire = codec.encode(x.view(shape))
        assert wire.dtype == torch.uint8 and wire.shape == (codec.wire_nbytes(shape),) and wire.is_contiguous()
        for dtype in DTYPES:
            y = codec.decode(wire, shape, dtype)
            assert y.shape == shape and y.dtype == dtype and y.isfinite().all()
    alone = codec.decode(codec.encode(x[0]), (features,), x.dtype)
    assert same_bits(alone, codec.decode(codec.encode(x[:1]), (1, features), x.dtype)[0])


@every_codec(4)
def test_lengths_are_exact(codec, features, seed):
    shape = (seed % 5, features)
    nbytes = codec.wire_nbytes(shape)
    assert codec.encode(torch.ones(shape)).numel() == nbytes
    assert codec.bits_per_value(shape) == (8 * nbytes / math.prod(shape) if math.prod(shape) else 0.0)
    for wrong in (nbytes + 16, max(0, nbytes - 1)):
        if wrong != nbytes:
            with pytest.raises(lowbit.ConfigError, match=f"needs {nbytes} bytes"):
                codec.decode(torch.zeros(wrong, dtype=torch.uint8), shape, torch.float32)


@every_codec(4)
def test_values_are_rounded_once_to_any_dtype(codec, features, seed):
    x = samples.some_rows(features, 3, seed)
    wire = codec.encode(x)
    exact = codec.decode(wire, x.shape, torch.float32)
    for dtype in DTYPES:
        assert same(codec.decode(wire, x.shape, dtype), exact.to(dtype))


@every_codec(3)
def test_zeros_are_exact(codec, features, seed):
    for zeros in (torch.zeros(2, features), -torch.zeros(2, features)):
        assert torch.equal(codec.decode(codec.encode(zeros), zeros.shape, torch.float32), zeros)


@every_codec(6)
def test_non_finite_never_comes_out_finite(codec, features, seed):
    x = samples.rows(features, seed, ("gaussian", "zero", "offset")).to(DTYPES[seed % 3])
    place, value = seed % features, (torch.nan, torch.inf, -torch.inf)[seed % 7 % 3]
    for row, others in ((0, [1, 2]), (1, [0, 2])):
        bad = x.clone()
        bad[row, place] = value
        y = codec.decode(codec.encode(bad), x.shape, x.dtype)
        assert not y[row, place].isfinite() and y[others].isfinite().all()
        total = reduced(codec, torch.stack([codec.encode(x), codec.encode(bad)]), *x.shape)
        assert not total[row, place].isfinite() and total[others].isfinite().all()


@every_codec(5)
def test_a_token_does_not_see_its_neighbours(codec, features, seed):
    x = samples.some_rows(features, 4, seed).to(DTYPES[seed % 3])
    together = codec.decode(codec.encode(x), x.shape, x.dtype)
    for token in range(4):
        assert same(codec.decode(codec.encode(x[token]), x[token].shape, x.dtype), together[token])


@every_codec(4)
def test_input_of_any_strides_is_read_and_left_alone(codec, features, seed):
    x = samples.some_rows(features, 4, seed)
    before, wire = x.clone(), codec.encode(x)
    for view in (x.t().contiguous().t(), x.repeat_interleave(2, 1)[:, ::2], torch.cat([x, x])[2:6].roll(2, 0)):
        assert torch.equal(codec.encode(view), wire)
    assert torch.equal(codec.encode(x[:1].expand(4, -1)), codec.encode(x[:1].repeat(4, 1)))
    shifted = torch.cat([wire[:3], wire])[3:]
    assert same(codec.decode(shifted, x.shape, x.dtype), codec.decode(wire, x.shape, x.dtype))
    assert same_bits(x, before)


@every_codec(5)
def test_only_the_own_bytes_are_written_and_gaps_are_zero(codec, features, seed):
    """Into the middle of larger buffers, as collectives do, over whatever was there."""
    x = samples.some_rows(features, 3, seed).to(DTYPES[seed % 3])
    for some in (codec, codec.inner):
        wire, rows = some.encode(x), len(x)
        buffer = torch.full((len(wire) + 64,), 0xA5, dtype=torch.uint8)
        some.encode_rows(x, buffer[32:-32])
        assert torch.equal(buffer[32:-32], wire)
        assert (buffer[:32] == 0xA5).all() and (buffer[-32:] == 0xA5).all()
        used = torch.zeros(len(wire), dtype=torch.bool)
        start = 0
        for _, size in some.sections(rows, features):
            used[start : start + size] = True
            start += -(-size // 16) * 16
        assert start == len(wire) and not wire[~used].any()

        wires = torch.full((3, len(wire) + 48), 0xA5, dtype=torch.uint8)
        wires[:, : len(wire)] = wire
        values = torch.full((rows + 2, features), 7.0, dtype=x.dtype)
        some.reduce_rows(wires[:, : len(wire)], values[1:-1])
        assert same(values[1:-1], reduced(some, torch.stack(3 * [wire]), rows, features, x.dtype))
        assert (values[0] == 7).all() and (values[-1] == 7).all()


@every_codec(5)
def test_a_sum_is_that_of_single_wires_in_order(codec, features, seed):
    """In fp32, and before the transform is undone: the inner codec's values, of each rank's own codec."""
    parts = [samples.rows(features, seed + n, ("gaussian", "heavy", "span")) for n in range(SENDERS)]
    wires = torch.stack([codec.sent_by(rank).encode(x) for rank, x in enumerate(parts)])
    total = None
    for rank, wire in enumerate(wires):
        values = codec.sent_by(rank).inner.decode(wire, parts[0].shape, torch.float32)
        total = values if total is None else total + values
    assert same(reduced(codec.inner, wires, *parts[0].shape), total)
    if codec.transform is None:
        assert same(reduced(codec, wires, *parts[0].shape), total)


@pytest.mark.parametrize("name", spec.NAMES)
def test_empty_shapes(name):
    for leg in SPECS[name]:
        for shape in ((0, 64), (3, 0), (0,), (0, 0), (2, 0, 32)):
            codec = lowbit.codec(leg)
            if shape[-1] and not fits(codec, shape[-1]):
                continue
            assert (
                codec.bits_per_value(shape) == codec.wire_nbytes(shape) == codec.encode(torch.ones(shape)).numel() == 0
            )
            assert codec.decode(torch.empty(0, dtype=torch.uint8), shape, torch.float16).shape == shape


@pytest.mark.parametrize("family", spec.FAMILIES, ids=lambda family: family.names[0])
def test_more_bits_lose_less(family):
    """Among the names that differ in their number only, with the same options.

    Values are of many sizes. For MX the relative errors count: of a block's largest values mxfp8, which saturates them
    by up to 1/8, sends no more than mxfp6, which does so by 1/16.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 512, generator=generator) * torch.exp2(torch.randint(-6, 7, (64, 512), generator=generator))
    figures: dict[str, list[tuple[int, float]]] = {}
    for name, group in itertools.product(family.names, spec.GROUPS if family.group else (0,)):
        for flag in ("", *family.flags):
            leg = ":".join(part for part in (name, f"g{group}" if group else "", flag) if part)
            if leg_codec := codec_of(leg):
                if family.outliers:
                    continue  # how much that loses is up to the calibration
                difference = leg_codec.decode(leg_codec.encode(x), x.shape, x.dtype) - x
                error = (difference / x if "mxfp4" in family.names else difference).square().mean()
                bits = spec.parse_leg(leg).bits
                figures.setdefault(leg.replace(str(bits), "", 1), []).append((bits, float(error)))
    for kind, series in figures.items():
        series.sort()
        assert all(a[1] > b[1] for a, b in itertools.pairwise(series)), (kind, series)


def test_there_is_something_to_test():
    assert SPECS["int4"] and SPECS["gauss4"] and SPECS["selective4"] and len(SPECS) == len(spec.NAMES)
