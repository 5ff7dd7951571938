"""Trellis codes: wire, values and paths against an independent oracle, both backends bit for bit, bounds, isolation."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import megatron_lowbit as lowbit
from megatron_lowbit.codecs import gauss, trellis
from megatron_lowbit.codecs.lloyd_max import TRELLIS
from megatron_lowbit.kernels import cpu_trellis
from tests.codecs import oracle_trellis as oracle

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
WIDTHS, GROUPS = range(2, 6), (32, 64, 128, 256)
FEATURES = (1, 2, 3, 31, 32, 33, 64, 100, 128, 252, 256, 300)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DISTORTIONS = {2: 10.50, 3: 16.11, 4: 21.79, 5: 27.57}  # dB, as codecs/lloyd_max.py states


def spec_of(bits: int, group: int) -> str:
    return f"gauss{bits}:g{group}:trellis"


def specials(features: int) -> list[torch.Tensor]:
    """Rows that have no scale, a scale at the ends of its range, or paths that tie."""
    sign = 1.0 - 2.0 * (torch.arange(features) * 7 % 5 > 2)
    rows = [torch.ones(features), sign, torch.full((features,), -3.5), 2.0 * (torch.arange(features) % 4 == 1)]
    rows += [torch.zeros(features), torch.zeros(features) * sign, -torch.zeros(features)]
    rows += [sign * 2.0**exponent for exponent in (-149, -140, -127, -126, -125, 115, 119, 121, 127)]
    rows += [torch.linspace(-1, 1, features) * 2.0**-126, torch.full((features,), 3.4e38)]
    for value in (torch.nan, torch.inf, -torch.inf, 1e30, -1e-30):
        rows.append(sign.clone())
        rows[-1][features // 3] = value
    return rows


def sample(rows: int, features: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different size, some with outliers, and special ones among them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn((rows, features), generator=g) * torch.exp2(torch.randint(-20, 12, (rows, 1), generator=g))
    x = torch.where(torch.rand(x.shape, generator=g) > 0.98, x * 50, x)
    others = specials(features)
    for row in range(rows):
        if (row + seed) % 3 == 1:
            x[row] = others[(row + seed) // 3 % len(others)]
    return x


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def round_trip(codec, x: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(x), x.shape, x.dtype)


def sqnr(spec: str, x: torch.Tensor) -> float:
    error = x.double() - round_trip(lowbit.codec(spec), x)
    return 10 * math.log10(x.double().square().sum() / error.square().sum())


@pytest.fixture(params=["reference", "numba"])
def backend(request, monkeypatch):
    monkeypatch.setenv("LOWBIT_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_wire_and_values_match_the_oracle(monkeypatch, bits, rotates):
    shapes = [(3, features) for features in FEATURES] + [(31, 3), (33, 33), (65, 9), (64, 8)]
    for seed, ((rows, features), group) in enumerate(zip(shapes, GROUPS * 4, strict=True)):
        codec, x = lowbit.codec(spec_of(bits, group)), sample(rows, features, seed)
        codec = codec if rotates else codec.inner
        expected = [oracle.encode(v.numpy(), bits, group, rotates) for v in (x, x.flip(0))[: 1 + seed % 2]]
        values = torch.from_numpy(oracle.decode(expected, *x.shape, bits, group, rotates))
        for name in ("reference", "numba"):
            monkeypatch.setenv("LOWBIT_BACKEND", name)
            wires = torch.stack([codec.encode(v) for v in (x, x.flip(0))[: 1 + seed % 2]])
            assert [bytes(wire.tolist()) for wire in wires] == expected, (name, rows, features, group)
            total = torch.empty_like(x)
            codec.reduce_rows(wires, total)
            assert same_bits(total, values.masked_fill(values.isnan(), torch.nan)), (name, rows, features, group)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_backends_agree_bit_for_bit(monkeypatch, bits, group):
    """Batches of 32 groups full and partly filled, short last groups, every dtype, several wires, random bytes."""
    codec, g = lowbit.codec(spec_of(bits, group)), torch.Generator().manual_seed(1)
    shapes = [(3, features) for features in FEATURES] + [(2, 4032), (1, 31 * group), (33, group), (65, group + 1)]
    for seed, (rows, features) in enumerate(shapes):
        dtype, own = DTYPES[seed % 3], codec.inner if (seed + bits) % 2 else codec
        x = sample(rows, features, seed).clamp(-6e4, 6e4).to(dtype)
        noise = torch.randint(0, 256, (2, codec.wire_nbytes(x.shape)), dtype=torch.uint8, generator=g)
        results = []
        for name in ("reference", "numba"):
            monkeypatch.setenv("LOWBIT_BACKEND", name)
            wire, totals = own.encode(x), torch.empty(3, *x.shape, dtype=dtype)
            codec.reduce_rows(torch.stack([wire, wire.flip(0), *noise]), totals[0])
            codec.reduce_rows(torch.stack([wire, wire]), totals[1])
            codec.inner.reduce_rows(torch.stack([*noise, wire]), totals[2])
            results.append((wire, own.decode(wire, x.shape, dtype), totals))
        assert all(same_bits(a, b) for a, b in zip(*results, strict=True)), (rows, features, dtype)


def test_the_root_of_the_mean_square_is_rounded_correctly():
    """As PyTorch's own fp32 root is not."""
    z = torch.randn(20000, 3, generator=torch.Generator().manual_seed(4))
    w, rms, *_ = gauss._normalize(z)
    mean = (gauss._sum(w * w) / 3).double().numpy()
    assert np.array_equal(rms.numpy(), np.sqrt(mean).astype(np.float32))


@pytest.mark.parametrize("bits", WIDTHS)
def test_paths_match_the_oracle_where_they_tie(backend, bits):
    """Levels, thresholds and zeros, periodic ones too, behind what makes their rms exactly 1 (so u = z): ties between
    levels, between ways to a state, and between states at the end."""
    book, codec = oracle.levels(bits), lowbit.codec(spec_of(bits, 32)).inner
    levels, g = torch.tensor(book), torch.Generator().manual_seed(bits)
    ends = (levels[2:] + levels[:-2]) * 0.5
    choices = torch.cat([levels, (levels[4:] + levels[:-4]) * 0.5, ends, torch.tensor([0.0, -0.0, 1.0, -1.0])])
    rows = choices[torch.randint(0, len(choices), (400, 29), generator=g)]
    rows[::2] = choices[torch.randint(0, len(choices), (200, 2), generator=g)].repeat(1, 15)[:, :29]
    rows[:, 1::3] *= rows[:, 1::3].abs() < 1
    rows[:, -1] = ends[torch.randint(0, len(ends), (400,), generator=g)]
    rest = 32 - rows.double().square().sum(1, keepdim=True)
    z = torch.cat([(rest / 3).sqrt().expand(-1, 3).float(), rows], 1)[rest[:, 0] > 0]
    exact = [row for row in z if oracle.normalized(list(row.numpy()))[1] in (0.25, 0.5, 1.0)][:100]
    assert len(exact) > 50
    wire = codec.encode(torch.stack(exact))
    codes, _ = oracle.unpack(bytes(wire.tolist()), len(exact), 32, bits)
    assert codes.tolist() == [oracle.viterbi(list(row.numpy()), book)[0] for row in exact]


@pytest.mark.parametrize("n", range(1, 7))
def test_short_paths_are_the_best_of_all(n):
    book = torch.tensor(oracle.levels(2))
    every = torch.tensor(
        [[book[m] for m in oracle.level_numbers(codes)] for codes in itertools.product(range(4), repeat=n)]
    )
    u = torch.randn(40, n, generator=torch.Generator().manual_seed(n)) * 1.5
    found = book[trellis.level_index(trellis.best_path(u, book))]
    for row, path in zip(u, found, strict=True):
        least = float((row - every).double().square().sum(1).min())
        _, cost = oracle.viterbi(list(row.numpy()), oracle.levels(2))
        assert float(cost) == pytest.approx(least, rel=1e-6, abs=1e-9)
        assert float((row - path).double().square().sum()) == pytest.approx(least, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", sorted(GOLDEN["trellis_wires"]))
def test_golden_wires(backend, name):
    """Bytes on the wire are a format: they may only change together with its version."""
    x = torch.tensor(GOLDEN["input"]).view(2, 43) / 16
    assert bytes(lowbit.codec(name).encode(x).tolist()).hex() == GOLDEN["trellis_wires"][name]


@pytest.mark.parametrize("bits", WIDTHS)
def test_codebooks_are_symmetric_ascending_and_those_of_the_page(bits):
    levels = lowbit.codec(spec_of(bits, 128)).levels
    assert len(levels) == 2 ** (bits + 1) and torch.equal(levels, -levels.flip(0))
    assert (levels[1:] > levels[:-1]).all()
    assert (
        levels.tolist() == oracle.levels(bits)
        and levels[len(levels) // 2 :].tolist() == torch.tensor(TRELLIS[bits]).tolist()
    )


@pytest.mark.parametrize("bits", WIDTHS)
def test_gaussian_values_gain_what_the_docstrings_say(bits):
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(5))
    assert sqnr(spec_of(bits, 128), x) > DISTORTIONS[bits]
    assert sqnr(spec_of(bits, 256), x) > DISTORTIONS[bits] - 0.05
    for group in GROUPS:
        gain = sqnr(spec_of(bits, group), x) - sqnr(f"gauss{bits}:g{group}", x)
        assert gain > (1.0 if group == 32 else 1.1), (group, gain)


def test_more_bits_lose_less(backend):
    x = torch.randn(32, 512, generator=torch.Generator().manual_seed(0))
    figures = [sqnr(spec_of(bits, 64), x) for bits in WIDTHS]
    assert all(b > a + 5 for a, b in itertools.pairwise(figures)), figures


@pytest.mark.parametrize("bits", WIDTHS)
def test_powers_of_two_change_nothing_but_the_scale(backend, bits):
    g = torch.Generator().manual_seed(6)
    for codec in (lowbit.codec(spec_of(bits, 64)), lowbit.codec(spec_of(bits, 64)).inner):
        x = torch.randn(9, 100, generator=g)
        y = round_trip(codec, x)
        for exponent in (-110, 1, 110):
            assert same_bits(round_trip(codec, x * 2.0**exponent), y * 2.0**exponent)


def squares(x: torch.Tensor) -> float:
    return float(x.double().square().sum())


def greedy_error(u: torch.Tensor, levels: torch.Tensor) -> float:
    """Squared error of always taking the nearest of the levels that are open: every other one, which half of them
    being the previous code's lowest bit."""
    total, before, last = 0.0, 0, 0
    for value in u.double():
        number = int((value - levels[last::2]).abs().argmin()) * 2 + last
        total += float(value - levels[number]) ** 2
        before, last = last, (number % 4 // 2) ^ before
    return total


values = st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100)
small = st.floats(width=32, min_value=-4, max_value=4)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(values, min_size=1, max_size=70) | st.lists(small, min_size=30, max_size=70),
    st.sampled_from(WIDTHS),
    st.sampled_from(GROUPS),
    st.booleans(),
)
def test_error_is_within_the_bound(row, bits, group, rotates):
    """That of docs/wire-format.md; on what is not rotated, a group may be anything."""
    x = torch.tensor([row])
    codec = lowbit.codec(spec_of(bits, group))
    y = round_trip(codec if rotates else codec.inner, x).double()
    levels = codec.levels.double()
    wide, t = float((levels[2:] - levels[:-2]).max()), float(levels[-2])
    for part, own in zip(x.double().split(group, 1), y.split(group, 1), strict=True):
        n = part.shape[1]
        bound = math.sqrt(min(1, wide**2 / 4 + max(0, 1 - t / math.sqrt(n)) ** 2) + 2**-16)
        size = math.sqrt(squares(part))
        assert math.sqrt(squares(part - own)) <= size * (bound + 1e-5) + 2.0**-117


@settings(max_examples=100, deadline=None)
@given(st.lists(small, min_size=1, max_size=70), st.sampled_from(WIDTHS))
def test_a_path_is_no_worse_than_what_is_always_open(row, bits):
    """Than the nearest open level, value by value, than every fourth level, and fitted than unfitted."""
    w = torch.tensor(row)
    rms = math.sqrt(squares(w) / len(w))
    if rms < 2**-100:
        return
    levels = torch.tensor(oracle.levels(bits)).double()
    u = w / rms
    path = levels[trellis.level_index(trellis.best_path(u[None], levels.float()))[0]]
    error, slack = squares(u - path), 1e-5 * len(w)
    assert error <= greedy_error(u, levels) + slack
    assert error <= squares((u[:, None] - levels[0::4]).abs().amin(1)) + slack
    wide, t = float((levels[2:] - levels[:-2]).max()), float(levels[-2])
    assert greedy_error(u, levels) <= squares((u.abs() - t).clamp(min=wide / 2)) + slack
    y = round_trip(lowbit.codec(spec_of(bits, 256)).inner, w[None])[0]
    assert squares(w - y) <= squares(w - rms * path) + (2**-16 + 1e-5) * squares(w)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("spec", ["gauss2:g32:trellis", "gauss3:g64:trellis", "gauss5:g256:trellis"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_stays_non_finite_and_in_its_group(backend, spec, value, dtype):
    codec = lowbit.codec(spec)
    x = torch.randn(3, 290, generator=torch.Generator().manual_seed(7)).to(dtype)
    x[1, 37], x[2, 289] = value, -value
    y, group = round_trip(codec, x), codec.group
    bad = torch.zeros(3, 290, dtype=torch.bool)
    bad[1, 37 // group * group : (37 // group + 1) * group] = True
    bad[2, 289 // group * group :] = True
    assert torch.equal(y.isnan(), bad)


def test_what_overflows_is_nan_and_what_vanishes_is_zero(backend):
    codec = lowbit.codec("gauss3:g64:trellis")
    x = torch.stack([torch.full((64,), v) for v in (3e38, -(2.0**124), 2.0**118, 2.0**-148, -(2.0**-140))])
    y = round_trip(codec, x)
    assert y[:2].isnan().all() and y[2].isfinite().all()
    assert torch.equal(y[3:], torch.zeros(2, 64))


@pytest.mark.parametrize("bits", WIDTHS)
def test_zeros_of_either_sign_stay_zeros(backend, bits):
    """A group of minus zeros has a fitted scale of minus zero; zeros decode to such before they are rotated back."""
    for group, features in ((32, 1), (256, 100), (32, 64)):
        x = torch.zeros(3, features)
        for codec in (lowbit.codec(spec_of(bits, group)), lowbit.codec(spec_of(bits, group)).inner):
            for zeros in (x, -x):
                wire = codec.encode(zeros)
                assert not wire.any() and torch.equal(codec.decode(wire, x.shape, x.dtype), x)
    assert torch.equal(lowbit.simulate.all_reduce([x, -x, x], spec_of(bits, 32), algorithm="two-step"), x)


def test_groups_of_one_batch_do_not_see_each_other(backend):
    """65 groups: two full batches of 32 and a partly filled one, with special groups next to every other."""
    for bits, features in ((2, 64), (4, 100), (5, 252)):
        for codec in (lowbit.codec(spec_of(bits, 256)), lowbit.codec(spec_of(bits, 64)).inner):
            x = sample(65, features, 3)
            together = round_trip(codec, x)
            for token in [0, 1, 4, 7, 31, 32, 33, 34, 63, 64]:
                assert same_bits(round_trip(codec, x[token : token + 1])[0], together[token]), token


@pytest.mark.parametrize("fill", [0x00, 0xFF])
def test_the_kernel_keeps_within_its_scratch_and_its_wire(monkeypatch, fill):
    """Whatever its scratch holds beforehand, NaNs among them: lanes without a group are computed all the same."""
    monkeypatch.setenv("LOWBIT_BACKEND", "numba")
    for bits, group, rows, features in ((5, 256, 33, 256), (2, 256, 1, 255), (3, 64, 7, 97), (4, 32, 31, 3)):
        codec, x = lowbit.codec(spec_of(bits, group)), sample(rows, features, 2)
        wire, values = codec.encode(x), round_trip(codec, x)
        guards = []

        def guarded(size, dtype, guards=guards):
            guards.append(torch.full((size + 128,), 0xA5, dtype=dtype))
            return guards[-1][64:-64].fill_(fill)

        slot, out = torch.full((len(wire) + 128,), 0x5A, dtype=torch.uint8), torch.full((x.numel() + 32,), 7.0)
        with monkeypatch.context() as patch:
            patch.setattr(cpu_trellis.torch, "zeros", guarded)
            codec.encode_rows(x, slot[64:-64])
            codec.reduce_rows(wire.view(1, -1), out[16:-16].view(x.shape))
        assert len(guards) == 2 and all((guard[:64] == 0xA5).all() and (guard[-64:] == 0xA5).all() for guard in guards)
        assert torch.equal(slot[64:-64], wire) and (slot[:64] == 0x5A).all() and (slot[-64:] == 0x5A).all()
        assert same_bits(out[16:-16].view(x.shape), values) and (out[:16] == 7).all() and (out[-16:] == 7).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(0, 300), st.sampled_from(WIDTHS), st.sampled_from(GROUPS), st.randoms())
def test_any_bytes_decode_and_lengths_are_exact(rows, features, bits, group, random):
    codec = lowbit.codec(spec_of(bits, group))
    size = codec.wire_nbytes((rows, features))
    wire = torch.tensor(list(random.randbytes(size)), dtype=torch.uint8)
    assert codec.decode(wire, (rows, features), torch.bfloat16).shape == (rows, features)
    assert codec.encode(torch.zeros(rows, features)).numel() == size
    with pytest.raises(lowbit.LowBitError, match=f"needs {size} bytes"):
        codec.decode(torch.zeros(size + 16, dtype=torch.uint8), (rows, features), torch.bfloat16)


@pytest.mark.parametrize(
    "spec, bits", [("gauss2:g32:trellis", 2.5), ("gauss3:trellis", 3.125), ("gauss5:g256:trellis", 5.0625)]
)
def test_bits_per_value_counts_every_scale(spec, bits):
    codec = lowbit.codec(spec)
    assert codec.bits_per_value((64, 4096)) == bits == 8 * codec.encode(torch.zeros(64, 4096)).numel() / (64 * 4096)


@pytest.mark.parametrize("name", ["gauss6", "gauss7", "int4", "fp8", "bf16"])
def test_codecs_without_a_trellis_refuse_it(name):
    with pytest.raises(lowbit.ConfigError, match=f"option 'trellis' in spec '{name}:trellis': '{name}' .*leave it out"):
        lowbit.codec(f"{name}:trellis")


def test_non_contiguous_and_unaligned(backend):
    codec, x = lowbit.codec("gauss4:g32:trellis"), sample(64, 96, 9)
    assert torch.equal(codec.encode(x.t()), codec.encode(x.t().contiguous()))
    wire = codec.encode(x)
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), wire])[3:]
    assert same_bits(codec.decode(shifted, x.shape, x.dtype), codec.decode(wire, x.shape, x.dtype))
    assert np.array_equal(codec.encode(x.view(2, 32, 96)), wire)
