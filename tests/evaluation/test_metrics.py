"""Against formulas written out with Python's own numbers."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lowbit.evaluation.metrics import Tokens, compare, mean, quantile, summary


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    powers = [math.exp(x - top) for x in logits]
    return [p / sum(powers) for p in powers]


@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(2, 9), st.sampled_from([0.0, 0.01, 3.0]))
@settings(max_examples=40, deadline=None)
def test_tokens_are_as_the_formulas_say(seed, tokens, vocabulary, noise):
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(tokens, vocabulary, generator=generator) * 3
    logits = exact + noise * torch.randn(tokens, vocabulary, generator=generator)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    found = compare(exact, logits, targets)
    for i, target in enumerate(targets.tolist()):
        p, q = softmax(exact[i].double().tolist()), softmax(logits[i].double().tolist())
        kl = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
        assert found.nll_exact[i].item() == pytest.approx(-math.log(p[target]), rel=1e-5, abs=1e-6)
        assert found.nll[i].item() == pytest.approx(-math.log(q[target]), rel=1e-5, abs=1e-6)
        assert found.kl[i].item() == pytest.approx(kl, rel=1e-4, abs=2e-6)
        assert found.agree[i].item() == (p.index(max(p)) == q.index(max(q)))


def test_equal_logits_differ_in_nothing():
    logits = torch.randn(5, 7).bfloat16()
    found = compare(logits, logits, torch.arange(5))
    assert found.kl.eq(0).all() and found.agree.eq(1).all() and found.nll.equal(found.nll_exact)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_visible(bad):
    exact, logits = torch.zeros(3, 4), torch.zeros(3, 4)
    logits[1, 2] = bad
    found = compare(exact, logits, torch.zeros(3, dtype=torch.int64))
    assert not found.nll[1].isfinite() and found.nll[[0, 2]].isfinite().all()
    total = summary([found, found])
    assert not math.isfinite(total.perplexity) and not math.isfinite(total.kl_mean) and math.isnan(total.kl_p99)
    assert math.isfinite(total.perplexity_exact)


def test_windows_of_one_length_have_the_error_of_their_means():
    windows = [torch.randn(20) + i for i in range(9)]
    found = mean(windows)
    means = [w.double().mean().item() for w in windows]
    assert found.value == pytest.approx(statistics.mean(means))
    assert found.error == pytest.approx(statistics.stdev(means) / 3)


def test_the_error_covers_the_truth_as_often_as_it_says():
    """Windows of uneven lengths whose tokens share their window's level: 95 % of intervals hold the true mean."""
    generator, held = torch.Generator().manual_seed(1), 0
    lengths = [3, 10, 10, 17, 5, 10, 8, 10, 12, 10]
    for _ in range(400):
        windows = [torch.randn((), generator=generator) + 0.3 * torch.randn(n, generator=generator) for n in lengths]
        low, high = mean(windows).interval()
        held += low < 0 < high
    assert 0.90 < held / 400 < 0.98


@pytest.mark.parametrize(
    ("freedom", "table"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (63, 1.998)]
)
def test_quantiles_are_those_of_printed_tables(freedom, table):
    assert quantile(0.95, freedom) == pytest.approx(table, rel=2e-3)


def test_a_single_window_has_no_error():
    one = Tokens(*(torch.ones(4) for _ in range(4)))
    found = summary([one])
    assert math.isnan(found.perplexity_error) and all(map(math.isnan, found.loss_interval))
    assert found.perplexity == pytest.approx(math.e) and found.loss == 0 and found.tokens == 4


def test_summary_of_windows():
    nll_exact = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0, 1.0])]
    nll = [w + 0.1 for w in nll_exact]
    kl = [torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4, 5.0])]
    agree = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])]
    found = summary([Tokens(*each) for each in zip(nll_exact, nll, kl, agree, strict=True)])
    assert found.perplexity_exact == pytest.approx(math.exp(9 / 5))
    assert found.loss == pytest.approx(math.expm1(0.1), rel=1e-5)
    assert found.loss_interval == pytest.approx((math.expm1(0.1),) * 2, rel=1e-3)  # all windows differ alike
    assert found.kl_mean == pytest.approx(1.2) and found.kl_p99 == 5.0
    assert found.top1_agreement == pytest.approx(0.8) and (found.tokens, found.windows) == (5, 2)
