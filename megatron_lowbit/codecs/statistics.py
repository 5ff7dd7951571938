"""What calibration tells a codec about the values of one site on one leg."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Statistics:
    """Static facts that all ranks share.

    outliers: indices of the features that travel in bf16, ascending.
    low, high: fp32 [senders, features], the usual range of each feature's values; on the scatter leg there is a sender
        per rank, on the gather leg one for all, because there every rank holds the sum.
    """

    outliers: tuple[int, ...]
    low: torch.Tensor
    high: torch.Tensor

    @property
    def features(self) -> int:
        return self.low.shape[1]
