"""Minifloats in Triton, against the standard's tables: every code, and rounding at every boundary between two.

In the interpreter that is the arithmetic for processors without E4M3; where there is a GPU, whatever that one has.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_lowbit.codecs.minifloat import E2M1, E2M3, E4M3
from tests.codecs.oracle_microscaling import TABLES, nearest

triton = pytest.importorskip("triton")
tl = triton.language
minifloat = pytest.importorskip("megatron_lowbit.kernels.triton_minifloat")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ELEMENTS = {"e4m3": E4M3, "e2m3": E2M3, "e2m1": E2M1}


@triton.jit
def encode_all(x, codes, BITS: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(codes + i, minifloat.encode(tl.load(x + i), BITS).to(tl.uint8))


@triton.jit
def decode_all(codes, values, BITS: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(values + i, minifloat.decode(tl.load(codes + i).to(tl.uint32), BITS))


def encoded(x: np.ndarray, bits: int) -> list[int]:
    size = triton.next_power_of_2(len(x))
    padded = torch.zeros(size, device=DEVICE)
    padded[: len(x)] = torch.from_numpy(x)
    codes = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    encode_all[(1,)](padded, codes, bits, size, enable_fp_fusion=False)
    return codes[: len(x)].tolist()


def decoded(bits: int) -> torch.Tensor:
    codes = torch.arange(2**bits, device=DEVICE).to(torch.uint8)
    values = torch.empty(2**bits, device=DEVICE)
    decode_all[(1,)](codes, values, bits, 2**bits, enable_fp_fusion=False)
    return values.cpu()


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_code_has_the_value_of_the_table(name):
    expected, values = torch.tensor(TABLES[name]), decoded(ELEMENTS[name].bits)
    assert torch.equal(values.isnan(), expected.isnan()) and values.isnan().sum() == (2 if name == "e4m3" else 0)
    assert torch.equal(values.nan_to_num().view(torch.int32), expected.nan_to_num().view(torch.int32))  # minus zero too


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_value_its_boundaries_and_what_lies_beyond(name):
    """Midpoints go to the even code, their neighbours in fp32 to the nearer one; beyond the largest it saturates."""
    positive = np.float32([v for v in TABLES[name][: len(TABLES[name]) // 2] if v == v])
    middles = (positive[1:] + positive[:-1]) / 2
    largest = positive[-1]
    beyond = np.float32([1.03, 1.0625, 1.1, 1.25, 2, 1e30]) * largest
    x = np.concatenate([positive, middles, beyond, np.float32([1e-45, 2.0**-126, 2.0**-30])])
    x = np.concatenate([x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(np.inf))])
    x = np.concatenate([x, -x])
    assert encoded(x, ELEMENTS[name].bits) == [nearest(float(v), TABLES[name]) for v in x]


@pytest.mark.parametrize("name", ELEMENTS)
def test_as_defined(name):
    """Values of all sizes, those included that are far too small or large."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4096, generator=g) * torch.exp2(torch.randint(-20, 14, (4096,), generator=g))
    assert encoded(x.numpy(), ELEMENTS[name].bits) == ELEMENTS[name].encode(x).tolist()
