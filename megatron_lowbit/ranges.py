"""The usual ranges of the values at one site, and which of its features are outliers.

A feature's range, for that choice, is the hull over ranks: highest high minus lowest low. All ranks send the same
features apart, so one that is wide on a single rank, or at another height on each, would cost precision wherever they
are summed. A mean over ranks would hide both.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch

from .errors import ConfigError


@dataclass(frozen=True, eq=False)
class Ranges:
    """low, high: fp32 [tp, features], of each rank's partial sums. sum_low, sum_high: fp32 [features], of their sum;
    None where one-shot is all that is wanted, as no sum travels there.

    Raises ConfigError for other shapes and dtypes, values that are not finite, and a low above its high.
    """

    low: torch.Tensor
    high: torch.Tensor
    sum_low: torch.Tensor | None = None
    sum_high: torch.Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.low.shape if isinstance(self.low, torch.Tensor) else ()
        if len(shape) != 2 or 0 in shape:
            raise ConfigError(f"low is {kind(self.low)}: give fp32 [tp, features]")
        self._check("low", "high", shape)
        if self.sum_low is not None or self.sum_high is not None:
            self._check("sum_low", "sum_high", shape[1:])

    def _check(self, low_name: str, high_name: str, shape: torch.Size) -> None:
        for name in (low_name, high_name):
            x = getattr(self, name)
            if not isinstance(x, torch.Tensor) or x.dtype != torch.float32 or x.shape != shape:
                raise ConfigError(f"{name} is {kind(x)}: give fp32 {list(shape)}")
            if not x.isfinite().all():
                raise ConfigError(f"{name} holds a value that is not finite: give finite ranges")
        if (getattr(self, low_name) > getattr(self, high_name)).any():
            raise ConfigError(f"a value of {low_name} is above that of {high_name}: swap them")
        if not (getattr(self, high_name) - getattr(self, low_name)).isfinite().all():
            raise ConfigError(f"from {low_name} to {high_name} is further than fp32 can tell: give narrower ranges")

    @property
    def tp(self) -> int:
        return self.low.shape[0]

    @property
    def features(self) -> int:
        return self.low.shape[1]

    @property
    def has_sum(self) -> bool:
        return self.sum_low is not None

    @property
    def hull(self) -> torch.Tensor:
        """fp32 [features]: from the lowest low to the highest high of all ranks."""
        return self.high.amax(0) - self.low.amin(0)

    def outliers(self, fraction: Fraction) -> tuple[int, ...]:
        """The features of the widest hulls, ascending; of equal ones, the first."""
        order = torch.sort(self.hull, descending=True, stable=True).indices
        return tuple(sorted(order[: outlier_count(self.features, fraction)].tolist()))


def outlier_count(features: int, fraction: Fraction) -> int:
    """How many of `features` are kept as outliers: at least one."""
    return max(1, int(features * fraction))


def check_fraction(fraction: Fraction) -> None:
    """Raise ConfigError unless `fraction` is a Fraction of the features."""
    if not isinstance(fraction, Fraction) or not 0 < fraction <= 1 or fraction.denominator >= 10**9:
        raise ConfigError(
            f"the fraction of outliers is {fraction!r}: give a Fraction above 0 and up to 1, such as 1/64"
        )


def kind(x: object) -> str:
    """What `x` is, for messages: "float32 [2, 64]"."""
    if not isinstance(x, torch.Tensor):
        return type(x).__name__
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
