"""What calibrated codecs know of a site: moving averages of each window's extremes (Dong et al., arXiv 2411.07942).

Outliers are the features with the widest ranges, from the lowest low to the highest high of all ranks; both legs of
two-step share them. The gather leg's ranges are those of the sum.
"""

from __future__ import annotations

from fractions import Fraction

import torch

import megatron_lowbit as lowbit
from megatron_lowbit.codecs.statistics import Statistics
from megatron_lowbit.spec import parse_leg

GAMMA = 0.01  # weight of a new window, the paper's


class UsualRanges:
    """Of one site: `observe` windows, then `bind` codecs."""

    def __init__(self) -> None:
        self._extremes: torch.Tensor | None = None  # fp32 [2, ranks + 1, features]; the last sender is the sum

    def observe(self, partials: list[torch.Tensor]) -> None:
        """One window: a partial sum [tokens, features] per rank."""
        senders = [x.float() for x in partials]
        window = torch.stack([torch.stack(x.aminmax(dim=0)) for x in [*senders, sum(senders)]], dim=1)
        before = window if self._extremes is None else self._extremes
        self._extremes = (1 - GAMMA) * before + GAMMA * window

    def bind(self, spec: str) -> tuple[lowbit.Codec, lowbit.Codec]:
        """The codecs of the scatter and of the gather leg, ready to encode."""
        codec, fraction = lowbit.codec(spec), parse_leg(spec).outliers
        if fraction is None:
            return codec, codec
        low, high = self._extremes
        outliers = _widest(high[:-1].amax(0) - low[:-1].amin(0), fraction)
        scatter, gather = Statistics(outliers, low[:-1], high[:-1]), Statistics(outliers, low[-1:], high[-1:])
        return codec.bind(scatter, 0), codec.bind(gather, 0)


def _widest(widths: torch.Tensor, fraction: Fraction) -> tuple[int, ...]:
    count = max(1, int(len(widths) * fraction))
    return tuple(sorted(widths.sort(descending=True, stable=True).indices[:count].tolist()))
