"""How two runs of one model over the same tokens differ: per token, and then over all of them, with errors.

Of a token: its negative log likelihood in both runs, the Kullback-Leibler divergence KL(exact || compressed) of the
predicted distributions, and whether both would choose the same token. Both runs see the same windows, so their
difference is paired: what makes one text harder than another cancels, and losses far below the perplexity's own error
become visible.

Tokens of a window are not independent of each other, so errors are those of means over windows (a ratio estimate: see
Cochran, Sampling Techniques, 3rd ed., section 6.3). They are unknown for a single window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import NormalDist

import torch
import torch.nn.functional as F

CONFIDENCE = 0.95
ROWS = 16  # of logits that are looked at together: copies of all of a large vocabulary's would be gigabytes


@dataclass(frozen=True)
class Tokens:
    """The scored tokens of one window, fp32 [tokens] each; `agree` is 1 or 0. In nats."""

    nll_exact: torch.Tensor
    nll: torch.Tensor
    kl: torch.Tensor
    agree: torch.Tensor


def compare(exact: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> Tokens:
    """exact, logits [tokens, vocabulary] of any float dtype, targets int64 [tokens] -> what the tokens tell.

    A logit that is not finite makes its token's figures not finite; they are never dropped.
    """
    parts = zip(exact.split(ROWS), logits.split(ROWS), targets.split(ROWS), strict=True)
    found = [_compare(*part) for part in parts]
    return Tokens(*(torch.cat([getattr(part, field.name) for part in found]) for field in fields(Tokens)))


def _compare(exact: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> Tokens:
    exact, logits = exact.float(), logits.float()  # first of all: in bf16, argmax alone took as long as all the rest
    p, q = F.log_softmax(exact, dim=-1), F.log_softmax(logits, dim=-1)
    kl = F.kl_div(q, p, log_target=True, reduction="none").sum(dim=-1).clamp(min=0)  # below zero only by rounding
    chosen = targets[:, None]
    return Tokens(
        nll_exact=-p.gather(1, chosen)[:, 0],
        nll=-q.gather(1, chosen)[:, 0],
        kl=kl,
        agree=(exact.argmax(-1) == logits.argmax(-1)).float(),
    )


@dataclass(frozen=True)
class Mean:
    """A mean over tokens and its standard error over windows; NaN for a single window."""

    value: float
    error: float
    windows: int

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """The confidence interval, by Student's t with windows - 1 degrees of freedom."""
        reach = quantile(confidence, self.windows - 1) * self.error
        return self.value - reach, self.value + reach


def mean(windows: Sequence[torch.Tensor]) -> Mean:
    """windows: values per token, one tensor a window."""
    sums = torch.stack([w.double().sum() for w in windows])
    counts = torch.tensor([len(w) for w in windows], dtype=torch.float64)
    value, number = sums.sum() / counts.sum(), len(windows)
    if number < 2:
        return Mean(value.item(), math.nan, number)
    rest = sums - counts * value
    error = (rest.square().sum() * number / (number - 1)).sqrt() / counts.sum()
    return Mean(value.item(), error.item(), number)


def quantile(confidence: float, freedom: int) -> float:
    """How many standard errors a two-sided interval reaches, by Student's t; NaN without a degree of freedom.

    Exact for 1 and 2 degrees of freedom, else Fisher's expansion (Abramowitz and Stegun 26.7.5): 0.2 % off at 3 for
    95 %, and less beyond.
    """
    p = (1 + confidence) / 2
    if freedom < 1:
        return math.nan
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    x = NormalDist().inv_cdf(p)
    terms = (
        x,
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


@dataclass(frozen=True)
class Summary:
    """All windows of one case. Losses are relative: 0.01 is a perplexity 1 % higher than exact."""

    perplexity: float
    perplexity_error: float
    perplexity_exact: float
    loss: float
    loss_interval: tuple[float, float]
    kl_mean: float
    kl_error: float
    kl_p99: float
    top1_agreement: float
    tokens: int
    windows: int


def summary(windows: Sequence[Tokens]) -> Summary:
    """The figures of a case over its windows, at least one."""
    exact, own = mean([w.nll_exact for w in windows]), mean([w.nll for w in windows])
    change = mean([w.nll.double() - w.nll_exact.double() for w in windows])
    kl, values = mean([w.kl for w in windows]), torch.cat([w.kl for w in windows])
    return Summary(
        perplexity=_exp(own.value),
        perplexity_error=_exp(own.value) * own.error,
        perplexity_exact=_exp(exact.value),
        loss=_expm1(change.value),
        loss_interval=tuple(_expm1(bound) for bound in change.interval()),
        kl_mean=kl.value,
        kl_error=kl.error,
        kl_p99=_percentile(values, 0.99),
        top1_agreement=mean([w.agree for w in windows]).value,
        tokens=len(values),
        windows=len(windows),
    )


def _percentile(values: torch.Tensor, part: float) -> float:
    """The smallest value that at least `part` of the values do not exceed; NaN if any is."""
    if values.isnan().any():
        return math.nan
    return values.kthvalue(math.ceil(part * len(values))).values.item()


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf if not math.isnan(x) else math.nan


def _expm1(x: float) -> float:
    return math.expm1(x) if x < 709 else math.inf if not math.isnan(x) else math.nan
