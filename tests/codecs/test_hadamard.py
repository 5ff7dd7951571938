"""The rotation: equal to the oracle's recursion, orthogonal, linear, and no structure it leaves in one value."""

import hashlib
import math

import numpy as np
import pytest
import torch

from megatron_lowbit.codecs import hadamard
from tests.codecs import oracle_gauss
from tests.codecs.samples import same_bits

SIZES = [32, 33, 48, 63, 64, 65, 80, 100, 127, 128, 129, 160, 192, 200, 252, 255, 256]
POWERS = [32, 64, 128, 256]


def sample(n: int, groups: int = 5) -> torch.Tensor:
    return torch.randn(groups, n, generator=torch.Generator().manual_seed(n))


def test_signs_are_the_documented_digest():
    assert oracle_gauss.SIGN_BYTES == hashlib.sha256(b"megatron_lowbit").digest()
    assert oracle_gauss.signed([np.float32(1)] * 256) == hadamard.SIGNS.tolist()
    assert 100 < int((hadamard.SIGNS < 0).sum()) < 156


@pytest.mark.parametrize("n", [1, 2, 31, *SIZES])
def test_against_the_recursion(n):
    x = sample(n)
    for ours, back in ((hadamard.rotate, False), (hadamard.unrotate, True)):
        expected = [oracle_gauss.rotated(list(group), back) for group in x.numpy()]
        assert same_bits(ours(x), torch.tensor(np.array(expected)))


@pytest.mark.parametrize("n", POWERS)
def test_is_the_hadamard_matrix_where_there_is_one(n):
    matrix = torch.ones(1, 1)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    assert torch.equal(hadamard.rotate(torch.eye(n)), matrix * hadamard.SIGNS[:n, None])


@pytest.mark.parametrize("n", SIZES)
def test_keeps_relative_lengths_and_is_undone(n):
    x = sample(n)
    z = hadamard.rotate(x)
    length = math.sqrt(n) if n in POWERS else 1.0
    matrix = hadamard.rotate(torch.eye(n)).double() / length
    assert torch.allclose(matrix @ matrix.T, torch.eye(n).double(), atol=1e-6)
    assert torch.allclose(z.norm(dim=-1), x.norm(dim=-1) * length, rtol=1e-6)
    assert torch.allclose(hadamard.unrotate(z), x, atol=2e-6)


@pytest.mark.parametrize("n", [5, *SIZES])
def test_commutes_with_sums_signs_and_powers_of_two(n):
    a, b = sample(n), sample(n).flip(0)
    for turn in (hadamard.rotate, hadamard.unrotate):
        assert torch.equal(turn(-a), -turn(a))
        assert torch.equal(turn(a * 2.0**60), turn(a) * 2.0**60)
        assert torch.allclose(turn(a + b), turn(a) + turn(b), atol=1e-4)


@pytest.mark.parametrize("n", [1, 8, 31])
def test_few_values_stay_as_they_are_in_a_new_tensor(n):
    x = sample(n)
    for turn in (hadamard.rotate, hadamard.unrotate):
        y = turn(x)
        assert torch.equal(x, y) and y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("n", SIZES)
def test_input_is_left_alone(n):
    x = sample(n)
    before = x.clone()
    hadamard.rotate(x), hadamard.unrotate(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("n", SIZES)
def test_no_common_pattern_ends_up_in_few_values(n):
    """Peak over rms; all in one value would be sqrt(n). The two butterflies of 129 to 191 values overlap little."""
    i, spikes = torch.arange(n), torch.eye(n)
    periods = torch.stack([1.0 - 2.0 * (i // h % 2) for h in (1, 2, 4, 8, 16, 64)])
    for pattern in (spikes, periods, torch.ones(1, n), i[None] / n):
        z = hadamard.rotate(pattern.float())
        peak = z.abs().amax(-1) / z.square().mean(-1).sqrt()
        assert peak.max() <= 0.6 * math.sqrt(n), (n, peak)
