"""The codebooks: the fixed point, found again by Newton's method and numeric integration, and as documented."""

import math

import numpy as np
import pytest

from benchmarks import lloyd_max as benchmark
from megatron_lowbit.codecs.lloyd_max import LEVELS
from tests.codecs import oracle_gauss

DECIBELS = {2: 9.30, 3: 14.62, 4: 20.22, 5: 26.01, 6: 31.91, 7: 37.87}
_nodes, _weights = np.polynomial.legendre.leggauss(40)


def moments(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integrals of 1, x and x**2 times the Gaussian over each level's cell, by Gauss-Legendre quadrature."""
    low = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2])
    high = np.append(low[1:], low[-1] + 10)
    x = (low + high)[:, None] / 2 + (high - low)[:, None] / 2 * _nodes
    mass = np.exp(-x * x / 2) / math.sqrt(2 * math.pi) * (high - low)[:, None] / 2 * _weights
    return mass.sum(1), (mass * x).sum(1), (mass * x * x).sum(1)


def improvement(levels: np.ndarray) -> np.ndarray:
    mass, first, _ = moments(levels)
    return first / mass - levels


def fixed_point(bits: int) -> np.ndarray:
    levels = np.linspace(0.1, 1 + 0.6 * bits, 2 ** (bits - 1))
    for _ in range(300):  # Lloyd's steps, until Newton's converge
        levels = levels + improvement(levels)
    while True:
        steps = 1e-6 * np.eye(len(levels))
        slopes = np.stack([(improvement(levels + d) - improvement(levels - d)) / 2e-6 for d in steps], 1)
        step = np.linalg.solve(slopes, -improvement(levels))
        levels = levels + step
        if abs(step).max() < 1e-12:
            return levels


@pytest.mark.parametrize("bits", LEVELS)
def test_levels_are_the_fixed_point(bits):
    assert np.array_equal(fixed_point(bits).astype(np.float32), np.array(LEVELS[bits], np.float32))


@pytest.mark.parametrize("bits", LEVELS)
def test_distortion(bits):
    levels = np.array(LEVELS[bits])
    mass, first, second = moments(levels)
    distortion = 2 * (second - 2 * levels * first + levels**2 * mass).sum()
    assert -10 * math.log10(distortion) == pytest.approx(DECIBELS[bits], abs=0.006)


@pytest.mark.parametrize("bits", LEVELS)
def test_levels_are_fp32_ascending_and_as_documented(bits):
    assert len(LEVELS[bits]) == 2 ** (bits - 1) and list(LEVELS[bits]) == sorted(set(LEVELS[bits]))
    assert LEVELS[bits][0] > 0
    assert [np.float32(level) for level in LEVELS[bits]] == oracle_gauss.levels(bits)


@pytest.mark.slow
def test_the_file_is_what_the_benchmark_writes():
    books = {bits: benchmark.lloyd_max(bits) for bits in benchmark.BITS}
    text = benchmark.TARGET.read_text()
    assert benchmark.table("LEVELS", books) in text and f"distortions {benchmark.decibels(books)} dB" in text
