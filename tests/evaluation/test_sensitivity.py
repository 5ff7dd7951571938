"""Effects of single sites, against single-site runs written out here."""

import math

import pytest
import torch

import megatron_lowbit as lowbit
from megatron_lowbit.engines.simulated_tp import features, simulated_tp
from megatron_lowbit.evaluation.cases import Case
from megatron_lowbit.evaluation.noise import Noise, measure
from megatron_lowbit.evaluation.run import evaluate
from megatron_lowbit.evaluation.sensitivity import Group, Sensitivity, alone, cases, grouped, place, sensitivity
from megatron_lowbit.evaluation.windows import consecutive
from tests.llama import tiny_llama

SITES = [f"layers.{i}.{kind}" for i in range(2) for kind in ("attention", "mlp")]


def case(spec="int2:g32", tp=4):
    return Case(lowbit.CommConfig(spec, "two-step", 0), tp)


def windows():
    torch.manual_seed(3)
    return consecutive(torch.randint(0, 61, (200,)).tolist(), 20, count=3)


def result(groups):
    model, which = tiny_llama(), case()
    found = {each: [] for each in cases(which, groups)}
    for _, each, tokens in evaluate(model, windows(), list(found)):
        found[each].append(tokens)
    [noise] = measure(model, windows(), [which.config], which.tp)
    return sensitivity(which, groups, found, noise, features(model))


@torch.inference_mode()
def kl_by_hand(*chosen):
    """Mean KL divergence with int2:g32 at the chosen sites and plain sums elsewhere."""
    model, total, count = tiny_llama(), 0.0, 0

    def reduce(site, partials):
        return lowbit.simulate.all_reduce(partials, "int2:g32", "two-step") if site in chosen else sum(partials)

    for window in windows():
        exact = model(window.ids[None]).logits[0].log_softmax(-1)
        with simulated_tp(model, 4, reduce):
            own = model(window.ids[None]).logits[0].log_softmax(-1)
        kl = (exact.exp() * (exact - own)).sum(-1)[window.positions]
        total, count = total + kl.sum().item(), count + len(kl)
    return total / count


def test_each_site_alone():
    found = result(grouped(SITES))
    assert [row["site"] for row in found.rows] == SITES
    assert [(row["layer"], row["kind"]) for row in found.rows] == [(0, "attention"), (0, "mlp"), (1, "attention"),
                                                                   (1, "mlp")]  # fmt: skip
    for row in found.rows:
        assert row["kl_mean"] == pytest.approx(kl_by_hand(row["site"]), rel=1e-3, abs=1e-7)
        assert row["share"] == pytest.approx(row["kl_mean"] / found.kl_sum) and row["kl_error"] > 0
        assert row["features"] == 32 and 0 < row["sqnr_db"] < 12
        assert row["bits_if_exact"] == pytest.approx((16 - 3) / 4)
    assert found.kl_all == pytest.approx(kl_by_hand(*SITES), rel=1e-3)
    assert len({round(row["kl_mean"], 9) for row in found.rows}) == 4 and abs(found.floor) < 1e-6


def test_groups():
    found = result(grouped(SITES, "kind"))
    assert [(row["site"], row["layer"], row["kind"]) for row in found.rows] == [("attention", None, "attention"),
                                                                                ("mlp", None, "mlp")]  # fmt: skip
    assert found.rows[1]["kl_mean"] == pytest.approx(kl_by_hand(SITES[1], SITES[3]), rel=1e-3)
    assert found.rows[1]["features"] == 64


def test_grouping_by_names():
    names = [*SITES, "encoder.layers.0.mlp", "logits"]
    layers = grouped(names, "layer")
    assert [group.name for group in layers] == ["layers.0", "layers.1", "encoder.layers.0", "logits"]
    assert [(group.layer, group.kind) for group in layers] == [
        (0, "all"), (1, "all"), (0, "encoder.all"), (None, "logits")
    ]  # fmt: skip
    assert len({(group.layer, group.kind) for group in layers}) == len(layers)  # each has a place of its own on a map
    kinds = grouped(names, "kind")
    assert [group.name for group in kinds] == ["attention", "mlp", "encoder.mlp", "logits"]
    assert place("layers.12.moe.combine") == (12, "moe.combine")


def test_names_that_globs_would_read_differently():
    odd = "vision[0].blocks.*.o?"
    config = alone(case(), [odd]).config
    assert config.selects(odd) and not any(map(config.selects, ("vision0.blocks.1.op", "vision[0].blocks.x.oy")))


def made_up(kl, sqnr, kl_all):
    rows = [
        {"site": f"layers.{i}.mlp", "layer": i, "kind": "mlp", "features": 64, "kl_mean": value, "kl_error": 0.0,
         "share": value / sum(kl), "sqnr_db": db, "bits_if_exact": 2.0}
        for i, (value, db) in enumerate(zip(kl, sqnr, strict=True))
    ]  # fmt: skip
    return Sensitivity(case(), tuple(rows), kl_all, 0.0, 0.0).explanation


def test_says_why():
    placed = made_up([0.1, 0.01, 0.01, 0.01], [10.0, 10.1, 10.0, 9.9], 0.13)
    assert "layers.0.mlp carries 77% of the KL divergence, 3.1 times an even share" in placed
    assert "What matters is the place" in placed and "Effects add up" in placed and "for 2.00 bits more" in placed
    noisy = made_up([0.1, 0.01, 0.01, 0.01], [0.0, 10.1, 10.0, 9.9], 0.30)
    assert "What matters is how much noise" in noisy and "do not quite add up" in noisy and "(43%)" in noisy
    both = made_up([0.1, 0.01, 0.02, 0.01], [5.0, 10.0, 10.0, 10.0], 0.14)
    assert "Both the noise and the place matter" in both
    assert "Nothing stands out" in made_up([0.01] * 8, [10.0] * 8, 0.08)


def test_no_effect_at_all():
    row = {"site": "a", "kl_mean": 0.0, "share": 0.0, "sqnr_db": None}
    assert "no effect that could be measured" in Sensitivity(case("fp32"), (row,), 0.0, math.nan, 0.0).explanation


def test_a_site_without_noise_is_no_number():
    group = [Group("a", ("a",), None, "a")]
    which = case("fp32")
    tokens = next(iter(evaluate(tiny_llama(), windows()[:1], [case("fp32")])))[2]
    found = sensitivity(which, group, {each: [tokens] for each in cases(which, group)}, {"a": Noise(1.0)}, {"a": 32})
    assert found.rows[0]["sqnr_db"] is None and found.rows[0]["kl_mean"] == 0


def test_a_single_site_is_compared_with_nothing():
    said = result(grouped(SITES[:1])).explanation
    assert said.startswith(f"Only {SITES[0]} was compressed: it costs ") and "stands out" not in said
