"""Minifloats: every code against the standard's table, rounding against a search for the nearest entry."""

import itertools
import math

import numpy as np
import pytest
import torch

from megatron_lowbit.codecs.minifloat import E2M1, E2M3, E4M3, exponent_of, power_of_two
from tests.codecs.oracle_microscaling import TABLES, nearest

FORMATS = {"e4m3": E4M3, "e2m3": E2M3, "e2m1": E2M1}
ELEMENTS = sorted(FORMATS)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("name, bits, lowest, highest, largest", [
    ("e4m3", 8, -6, 8, 448.0), ("e2m3", 6, 0, 2, 7.5), ("e2m1", 4, 0, 2, 6.0),
])  # fmt: skip
def test_the_numbers_of_the_standard(name, bits, lowest, highest, largest):
    f = FORMATS[name]
    assert (f.bits, f.lowest, f.highest, f.largest) == (bits, lowest, highest, largest)
    assert len(TABLES[name]) == 2**bits and max(v for v in TABLES[name] if v == v) == largest


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_code_has_the_value_of_the_table(name):
    expected = torch.tensor(TABLES[name])
    values = FORMATS[name].decode(torch.arange(len(expected), dtype=torch.uint8))
    assert torch.equal(values.isnan(), expected.isnan()) and values.isnan().sum() == (2 if name == "e4m3" else 0)
    assert same_bits(values.nan_to_num(), expected.nan_to_num())  # minus zero too


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_value_is_encoded_as_its_code(name):
    values = torch.tensor(TABLES[name])
    codes = torch.arange(len(values), dtype=torch.uint8)
    assert torch.equal(FORMATS[name].encode(values[~values.isnan()]), codes[~values.isnan()])


@pytest.mark.parametrize("name", ELEMENTS)
def test_rounding_around_every_midpoint(name):
    """Midpoints go to the even code, their neighbours in fp32 to the nearer one."""
    positive = [v for v in TABLES[name][: len(TABLES[name]) // 2] if v == v]
    middles = np.float32([(a + b) / 2 for a, b in itertools.pairwise(positive)])
    x = np.concatenate([middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(1e9))])
    x = np.concatenate([x, -x])
    expected = [nearest(float(v), TABLES[name]) for v in x]
    assert FORMATS[name].encode(torch.from_numpy(x)).tolist() == expected
    assert all(code % 2 == 0 for code in expected[: len(middles)])


@pytest.mark.parametrize("name", ELEMENTS)
def test_any_finite_value_is_rounded_and_saturates(name):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3000, generator=g) * torch.exp2(torch.randint(-14, 12, (3000,), generator=g))
    ends = [0.0, -0.0, 1e-45, -1e-45, 2.0**-126, FORMATS[name].largest, 464.0, 480.0, 3.4e38, -3.4e38]
    x = torch.cat([x, torch.tensor(ends)])
    codes = FORMATS[name].encode(x)
    assert codes.tolist() == [nearest(float(v), TABLES[name]) for v in x]
    values = FORMATS[name].decode(codes)
    assert values.isfinite().all() and values.abs().max() == FORMATS[name].largest
    assert torch.equal(torch.signbit(values), torch.signbit(x))


def test_e4m3_is_torchs_own():
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(E4M3.decode(codes).nan_to_num(), codes.view(torch.float8_e4m3fn).float().nan_to_num())
    x = torch.randn(20000, generator=torch.Generator().manual_seed(1)) * 40
    assert torch.equal(E4M3.encode(x), x.to(torch.float8_e4m3fn).view(torch.uint8))


def test_powers_of_two_and_exponents():
    exponents = torch.arange(-126, 128)
    powers = power_of_two(exponents)
    assert powers.tolist() == [math.ldexp(1.0, int(e)) for e in exponents]
    assert torch.equal(exponent_of(-powers * 1.9375), exponents.int())
    ends = torch.tensor([0.0, 1e-45, 1e-38, torch.inf, -torch.inf, torch.nan])
    assert exponent_of(ends).tolist() == [-127, -127, -127, 128, 128, 128]
