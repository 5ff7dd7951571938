"""Calibrations for the tests, made of random ranges."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

import torch

from megatron_lowbit.calibration_file import Calibration
from megatron_lowbit.ranges import Ranges


def random_calibration(
    sites: Iterable[str], tp: int, features: int, fraction: str = "1/16", sums: bool = True, seed: int = 0
) -> Calibration:
    """Ranges about [-3, 3] for each rank, sqrt(tp) times that for the sum; planted nowhere, outliers are by chance."""
    generator = torch.Generator().manual_seed(seed)

    def one(*shape: int) -> torch.Tensor:
        return 2.5 + torch.rand(shape, generator=generator)

    ranges = {}
    for site in sites:
        total = (-one(features) * tp**0.5, one(features) * tp**0.5) if sums else ()
        ranges[site] = Ranges(-one(tp, features), one(tp, features), *total)
    return Calibration.from_ranges(ranges, Fraction(fraction))
