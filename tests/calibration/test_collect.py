"""The tracker against averages written by hand, and on models whose partial sums are known."""

import random
from fractions import Fraction

import numpy as np
import pytest
import torch

from megatron_lowbit.calibration import RangeTracker
from megatron_lowbit.calibration.collect import watch
from megatron_lowbit.engines.simulated_tp import row_parallel
from megatron_lowbit.errors import ConfigError
from tests.llama import tiny_llama
from tests.models import random_model, site_names

SITES = ("layers.0.attention", "layers.0.mlp", "layers.1.attention", "layers.1.mlp")


def windows(count, tp=2, tokens=5, features=64, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(tokens, features, generator=generator).to(dtype) for _ in range(tp)] for _ in range(count)]


def moving(values, gamma):
    """The paper's average of a list of numbers, one feature of one sender."""
    average = np.float32(values[0])
    for value in values[1:]:
        average = np.float32(1 - gamma) * average + np.float32(gamma) * np.float32(value)
    return average


@pytest.mark.parametrize("gamma", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_are_those_of_a_loop(gamma, dtype):
    seen, tracker = windows(7, tp=3, dtype=dtype), RangeTracker(gamma=gamma)
    sums = [(a.float() + b.float() + c.float()).to(dtype) for a, b, c in seen]
    for partials, total in zip(seen, sums):
        assert torch.equal(tracker.observe("a", partials), total)
    ranges = tracker.finish().ranges["a"]
    for feature in (0, 17, 63):
        for rank in range(3):
            columns = [partials[rank][:, feature].float().tolist() for partials in seen]
            assert float(ranges.low[rank, feature]) == pytest.approx(moving([min(c) for c in columns], gamma), rel=1e-6)
            assert float(ranges.high[rank, feature]) == pytest.approx(
                moving([max(c) for c in columns], gamma), rel=1e-6
            )
        columns = [total[:, feature].float().tolist() for total in sums]
        assert float(ranges.sum_low[feature]) == pytest.approx(moving([min(c) for c in columns], gamma), rel=1e-6)
        assert float(ranges.sum_high[feature]) == pytest.approx(moving([max(c) for c in columns], gamma), rel=1e-6)


def test_tokens_may_lie_in_several_dimensions():
    one, other = RangeTracker(), RangeTracker()
    for partials in windows(3, tokens=6):
        one.observe("a", partials)
        assert other.observe("a", [x.view(2, 3, 64) for x in partials]).shape == (2, 3, 64)
    assert one.finish().digest == other.finish().digest


def test_planted_outliers_are_found_and_agreed_on():
    planted, tracker = sorted(random.Random(0).sample(range(256), 4)), RangeTracker(gamma=0.1)
    for partials in windows(12, features=256, tokens=40):
        for x in partials:
            x[:, planted] *= 20
        tracker.observe("a", partials)
    calibration = tracker.finish()
    assert calibration.outliers["a"] == tuple(planted) and tracker.overlap("a") == 1.0


def test_features_that_change_are_not_agreed_on():
    tracker = RangeTracker(Fraction(1, 16))
    for index, partials in enumerate(windows(10)):
        for x in partials:
            x[:, [index % 2, 2, 3, 4 + index % 2]] *= 50  # two features of every window, two of every second one
        tracker.observe("a", partials)
    assert tracker.overlap("a") == 0.5


def test_no_overlap_of_a_single_window():
    tracker = RangeTracker()
    tracker.observe("a", windows(1)[0])
    assert tracker.overlap("a") is None


def test_one_shot_keeps_no_sums():
    tracker = RangeTracker(algorithm="one-shot")
    both = RangeTracker()
    for partials in windows(3):
        assert torch.equal(tracker.observe("a", partials), both.observe("a", partials))
    calibration = tracker.finish({"model": "x"})
    assert not calibration.has_sums and torch.equal(calibration.ranges["a"].low, both.finish().ranges["a"].low)
    assert calibration.metadata == {"gamma": "0.01", "algorithm": "one-shot", "samples": "3", "model": "x"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"fraction": Fraction(0)}, "the fraction of outliers is Fraction"),
        ({"gamma": 0}, "gamma is 0: give the weight of a new window, above 0 and up to 1"),
        ({"gamma": float("nan")}, "gamma is nan"),
        ({"algorithm": "ring"}, "unknown algorithm 'ring': use one of auto, two-step, one-shot"),
    ],
)
def test_wrong_settings(arguments, message):
    with pytest.raises(ConfigError, match=message):
        RangeTracker(**arguments)


@pytest.mark.parametrize(
    "partials, message",
    [
        ([], "expected partial sums"),
        ([torch.zeros(2, 64), torch.zeros(2, 32)], "rank 1 has shape"),
        ([torch.zeros(0, 64), torch.zeros(0, 64)], r"a window of shape \(0, 64\) is none: give \[tokens, features\]"),
        ([torch.zeros(()), torch.zeros(())], r"a window of shape \(\) is none"),
        ([torch.zeros(2, 64), torch.full((2, 64), torch.nan)], "a: a partial sum is not finite"),
        ([torch.full((2, 64), 3e38), torch.full((2, 64), 3e38)], "a: a partial sum is not finite"),
        ([torch.zeros(2, 64)] * 4, "a: 5 senders of 64 features, after windows with 3 senders of 64 features"),
        ([torch.zeros(2, 32)] * 2, "a: 3 senders of 32 features, after windows with 3 senders of 64 features"),
    ],
)
def test_wrong_windows(partials, message):
    tracker = RangeTracker()
    tracker.observe("a", windows(1)[0])
    with pytest.raises(ConfigError, match=message):
        tracker.observe("a", partials)


def test_nothing_observed():
    with pytest.raises(ConfigError, match="no partial sum was observed"):
        RangeTracker().finish()


@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_have_the_ranges_of_their_own_weights(tp):
    """Hooks in the unsplit model see what enters each layer; the columns of each rank are cut by hand."""
    model, tracker, expected, hooks = tiny_llama(), RangeTracker(gamma=0.5), {}, []
    ids = torch.randint(61, (4, 12), generator=torch.Generator().manual_seed(1))
    for site, layer in row_parallel(model).items():

        def hook(layer, inputs, output, site=site):
            x, size = inputs[0][0], layer.weight.shape[1] // tp
            parts = [x[:, r * size : (r + 1) * size] @ layer.weight[:, r * size : (r + 1) * size].T for r in range(tp)]
            window = torch.stack([torch.stack([p.amin(0), p.amax(0)]) for p in [*parts, output[0]]])
            expected[site] = 0.5 * expected[site] + 0.5 * window if site in expected else window

        hooks.append(layer.register_forward_hook(hook))
    with torch.no_grad():
        for window in ids:
            model(window[None])
    for hook in hooks:
        hook.remove()

    advanced = []
    watch(model, ids, tp, tracker, lambda: advanced.append(1))
    calibration = tracker.finish()
    assert (calibration.sites, calibration.tp, len(advanced)) == (SITES, tp, 4)
    for site, ranges in calibration.ranges.items():
        assert torch.allclose(ranges.low, expected[site][:tp, 0], atol=1e-3)
        assert torch.allclose(ranges.high, expected[site][:tp, 1], atol=1e-3)
        assert torch.allclose(ranges.sum_low, expected[site][tp, 0], atol=1e-3)
        assert torch.allclose(ranges.sum_high, expected[site][tp, 1], atol=1e-3)
        for rank in range(1, tp):
            assert not torch.allclose(ranges.low[0], ranges.low[rank], atol=1e-2)


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen2_moe", "t5", "bert"])
def test_watches_models_that_are_built_otherwise(family):
    """Those without `model.model`, with an encoder, or with both: every site is seen, and the model left alone."""
    model, tracker = random_model(family), RangeTracker()
    ids = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(1))
    watch(model, ids, 2, tracker)
    calibration = tracker.finish()
    assert sorted(calibration.sites) == sorted(site_names(family)) and calibration.tp == 2
    assert all("forward" not in vars(layer) for layer in row_parallel(model).values())
