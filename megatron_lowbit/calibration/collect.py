"""Watching partial sums, window by window, for the ranges that their features usually have.

After "Towards Low-bit Communication for Tensor Parallel LLM Inference" (arXiv 2411.07942): per rank and feature an
exponential moving average of each window's minimum and maximum, so that one odd token does not widen a range for ever.
The first window starts the average, and weighs (1 - gamma)^(windows - 1) in the end: 53 % after 64 windows at the
paper's gamma of 0.01.

The sum is watched as well, for the gather leg of two-step. It is the exact one, while in inference the sum of decoded
partial sums is sent: they differ by the scatter leg's error, a small part of the range.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch

from .. import simulate
from ..calibration_file import FRACTION, Calibration
from ..engines.simulated_tp import simulated_tp
from ..errors import ConfigError
from ..ranges import Ranges, check_fraction

ALGORITHMS = ("auto", "two-step", "one-shot")
GAMMA = 0.01  # the paper's


@dataclass
class _Site:
    """Moving minima and maxima, fp32 [2, senders, features]; senders: the ranks and, if it is wanted, the sum."""

    windows: int = 0
    whole: torch.Tensor | None = None
    halves: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)  # of even and of odd windows


class RangeTracker:
    """Usual ranges of every site it is shown. `observe` is a `Reduce` of engines/simulated_tp.py, and needs no model.

    fraction: of the features that become outliers. gamma: weight of a new window. algorithm: "one-shot" leaves out the
    sums, "two-step" and "auto" keep them. Raises ConfigError for other values.
    """

    def __init__(self, fraction: Fraction = FRACTION, gamma: float = GAMMA, algorithm: str = "auto") -> None:
        check_fraction(fraction)
        if not 0 < gamma <= 1:
            raise ConfigError(f"gamma is {gamma}: give the weight of a new window, above 0 and up to 1")
        if algorithm not in ALGORITHMS:
            raise ConfigError(f"unknown algorithm {algorithm!r}: use one of {', '.join(ALGORITHMS)}")
        self._fraction, self._gamma, self._algorithm = fraction, gamma, algorithm
        self._sites: dict[str, _Site] = {}

    @torch.no_grad()
    def observe(self, site: str, partials: list[torch.Tensor]) -> torch.Tensor:
        """One window: a partial sum [..., features] per rank -> their exact sum: in fp32 and rank order, rounded once.

        Raises ConfigError for values that are not finite, and for other ranks or features than the site had before.
        """
        total = simulate.all_reduce(partials, "fp32", "exact")
        if not total.dim() or not total.numel():
            raise ConfigError(f"{site}: a window of shape {tuple(total.shape)} is none: give [tokens, features]")
        senders = partials if self._algorithm == "one-shot" else [*partials, total]
        extremes = [torch.stack(x.reshape(-1, x.shape[-1]).float().aminmax(dim=0)) for x in senders]
        window = torch.stack(extremes, dim=1).cpu()
        if not window.isfinite().all():
            raise ConfigError(f"{site}: a partial sum is not finite: calibrate in fp32, or mend the weights")
        seen = self._sites.setdefault(site, _Site())
        if seen.whole is not None and seen.whole.shape != window.shape:
            before, now = (f"{x.shape[1]} senders of {x.shape[2]} features" for x in (seen.whole, window))
            raise ConfigError(f"{site}: {now}, after windows with {before}: show one model at one TP size")
        even, odd = seen.halves
        seen.halves = (even, self._moved(odd, window)) if seen.windows % 2 else (self._moved(even, window), odd)
        seen.whole = self._moved(seen.whole, window)
        seen.windows += 1
        return total

    def _moved(self, average: torch.Tensor | None, window: torch.Tensor) -> torch.Tensor:
        return window if average is None else (1 - self._gamma) * average + self._gamma * window

    def _ranges(self, extremes: torch.Tensor) -> Ranges:
        low, high = extremes
        return Ranges(low, high) if self._algorithm == "one-shot" else Ranges(low[:-1], high[:-1], low[-1], high[-1])

    def overlap(self, site: str) -> float | None:
        """Part of the outliers that every second window and the others agree on; None after a single window.

        By chance it would be about the fraction of features that are outliers.
        """
        if any(half is None for half in self._sites[site].halves):
            return None
        one, other = (set(self._ranges(half).outliers(self._fraction)) for half in self._sites[site].halves)
        return len(one & other) / len(one)

    def finish(self, metadata: Mapping[str, str] | None = None) -> Calibration:
        """What was seen so far. `metadata`: more facts to keep with it. Raises ConfigError if nothing was."""
        if not self._sites:
            raise ConfigError("no partial sum was observed: call observe, or give the model at least one window")
        samples = max(site.windows for site in self._sites.values())
        facts = {"gamma": str(self._gamma), "algorithm": self._algorithm, "samples": str(samples)}
        ranges = {name: self._ranges(site.whole) for name, site in self._sites.items()}
        return Calibration.from_ranges(ranges, self._fraction, facts | dict(metadata or {}))


@torch.no_grad()
def watch(
    model: torch.nn.Module,
    windows: torch.Tensor,
    tp: int,
    tracker: RangeTracker,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Show `tracker` what `tp` ranks would reduce of `windows`, token ids [windows, tokens]; `advance` after each.

    A model with an encoder and a decoder sees the window in both.
    """
    base, inputs = _without_head(model)
    with simulated_tp(model, tp, tracker.observe):
        for window in windows:
            base(**inputs(window[None]))
            advance()


def _without_head(model: torch.nn.Module) -> tuple[torch.nn.Module, Callable[[torch.Tensor], dict]]:
    """What has all sites, and no logits to compute where it can do without them; and its arguments, from token ids."""
    base = getattr(model, "base_model", model)
    known = inspect.signature(base.forward).parameters
    constant = {"use_cache": False} if "use_cache" in known else {}
    ids = [name for name in ("input_ids", "decoder_input_ids") if name in known]
    return base, lambda window: constant | dict.fromkeys(ids, window)
