"""Values of known distributions for the quality benchmark, in bf16, as models send them.

Each distribution is drawn several times: once to be measured, and apart from that for the codecs that calibrate. The
draws of "outliers" share their outlier features, as the tokens of a model do: 1/64 of the features are Gaussian of a
standard deviation from 10 to 40, the others of 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

SHAPE = (512, 4096)
CALIBRATION_DRAWS = 4
FRACTION, LEAST, MOST = 1 / 64, 10.0, 40.0  # outlier features and how much larger they are
SPARSITY = 0.9

Draw = Callable[[tuple[int, int], torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class Sample:
    """x: bf16 [rows, features]. calibration: other draws, alike. parts: name -> the features of x it speaks of."""

    x: torch.Tensor
    calibration: list[torch.Tensor]
    parts: dict[str, slice | torch.Tensor]


def gaussian(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def uniform(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=generator) * 2 - 1


def laplace(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """By the inverse of the distribution function, in fp64: in fp32 the tail would end at 16."""
    u = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    return (-u.sign() * torch.log1p(-2 * u.abs())).float()


def student_t3(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """3 degrees of freedom: so heavy a tail that no fourth moment exists."""
    square = sum(torch.randn(shape, generator=generator).square() for _ in range(3))
    return torch.randn(shape, generator=generator) / (square / 3).sqrt()


def sparse(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.where(torch.rand(shape, generator=generator) < SPARSITY, 0.0, gaussian(shape, generator))


def planted(features: int) -> torch.Tensor:
    """The standard deviation of each feature of "outliers"; the same at every call."""
    generator = torch.Generator().manual_seed(1)
    count = math.floor(features * FRACTION)
    deviations = torch.ones(features)
    larger = LEAST + (MOST - LEAST) * torch.rand(count, generator=generator)
    deviations[torch.randperm(features, generator=generator)[:count]] = larger
    return deviations


def outliers(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return gaussian(shape, generator) * planted(shape[1])


DISTRIBUTIONS: dict[str, Draw] = {
    "Gaussian": gaussian,
    "uniform": uniform,
    "Laplace": laplace,
    "Student t(3)": student_t3,
    "outliers": outliers,
    "sparse 90 %": sparse,
}
ORDINARY = "outliers, ordinary"  # the noise of the ordinary features alone, against their own energy
NAMES = [name for key in DISTRIBUTIONS for name in ([key, ORDINARY] if key == "outliers" else [key])]


def sample(name: str, shape: tuple[int, int] = SHAPE) -> Sample:
    generator = torch.Generator().manual_seed(0)
    x, *others = (DISTRIBUTIONS[name](shape, generator).bfloat16() for _ in range(1 + CALIBRATION_DRAWS))
    parts: dict[str, slice | torch.Tensor] = {name: slice(None)}
    if name == "outliers":
        parts[ORDINARY] = (planted(shape[1]) == 1).nonzero().squeeze(1)
    return Sample(x, others, parts)
