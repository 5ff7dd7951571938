"""How far reduced sums are from exact ones, at every site and for several configurations, in one run of the model.

The model goes on with the exact sums, so that a site's partial sums are those of the exact model, whatever the
configurations make of them, and so that one run serves all of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .. import simulate
from ..config import CommConfig
from ..engines.simulated_tp import simulated_tp
from .run import predictions
from .windows import Window


@dataclass
class Noise:
    """What was added up at one site: energies of the exact sum and of the error, and the error relative to each token.

    `relative` weighs every token alike, where the energies are those of the largest tokens.
    """

    signal: float = 0.0
    noise: float = 0.0
    relative_sum: float = 0.0
    tokens: int = 0

    def __add__(self, other: Noise) -> Noise:
        return Noise(
            self.signal + other.signal,
            self.noise + other.noise,
            self.relative_sum + other.relative_sum,
            self.tokens + other.tokens,
        )

    @property
    def sqnr_db(self) -> float:
        """10 log10 of the energy of the sum over that of the error; infinite for no error."""
        return 10 * math.log10(self.signal / self.noise) if self.noise else math.inf

    @property
    def relative(self) -> float:
        """The error's energy as a part of its token's, mean over tokens."""
        return self.relative_sum / self.tokens if self.tokens else 0.0


@torch.inference_mode()
def measure(
    model: torch.nn.Module,
    windows: Sequence[Window],
    configs: Sequence[CommConfig],
    tp: int,
    advance: Callable[[], None] = lambda: None,
) -> list[dict[str, Noise]]:
    """Site -> noise of each configuration over all windows, at the sites that it compresses. advance: after a window.

    The reference is the fp32 sum in rank order, not rounded to the model's dtype; the reduced sum is in that dtype, as
    it is used. Raises ConfigError as `simulate.reduced` does.
    """
    found: list[dict[str, Noise]] = [defaultdict(Noise) for _ in configs]

    def reduce(site: str, partials: list[torch.Tensor]) -> torch.Tensor:
        exact = partials[0].float()
        for partial in partials[1:]:
            exact = exact + partial
        energy = exact.double().square().sum(-1)
        for config, noise in zip(configs, found, strict=True):
            if config.selects(site) and not config.keeps_exact(site):
                error = (simulate.reduced(partials, config, site).double() - exact).square().sum(-1)
                relative = (error / energy)[energy > 0].sum()
                sums = (float(part) for part in (energy.sum(), error.sum(), relative))
                noise[site] += Noise(*sums, energy.numel())
        return exact.to(partials[0].dtype)

    with simulated_tp(model, tp, reduce):
        for window in windows:
            predictions(model, window)
            advance()
    return [dict(noise) for noise in found]
