"""Runs over a tiny model, against runs written out here."""

import pytest
import torch

import megatron_lowbit as lowbit
from megatron_lowbit.engines.simulated_tp import simulated_tp
from megatron_lowbit.errors import ModelError
from megatron_lowbit.evaluation.cases import Case
from megatron_lowbit.evaluation.metrics import summary
from megatron_lowbit.evaluation.run import evaluate
from megatron_lowbit.evaluation.windows import consecutive
from megatron_lowbit.plan_file import Plan
from tests.llama import tiny_llama


def case(spec, tp=2, algorithm="auto", **more):
    return Case(lowbit.CommConfig(spec, algorithm, 0, **more), tp)


def windows(count=3):
    torch.manual_seed(3)
    return consecutive(torch.randint(0, 61, (200,)).tolist(), 20, stride=15, count=count)


def test_every_window_and_case_once():
    cases = [case("int4:g32"), case("int8:g32", tp=4)]
    found = list(evaluate(tiny_llama(), windows(), cases))
    assert [(number, which) for number, which, _ in found] == [(n, c) for n in range(3) for c in cases]
    assert [len(tokens.nll) for *_, tokens in found] == [19, 19, 15, 15, 15, 15]


def test_skips_what_is_done():
    cases = [case("int4:g32"), case("int8:g32")]
    found = list(evaluate(tiny_llama(), windows(), cases, done=lambda c, n: c is cases[0] or n == 1))
    assert [(number, which) for number, which, _ in found] == [(0, cases[1]), (2, cases[1])]


@torch.inference_mode()
def test_figures_are_those_of_the_logits():
    model, window = tiny_llama(), windows(1)[0]
    [(_, _, tokens)] = evaluate(model, [window], [case("int3:g32", tp=4)])
    exact = model(window.ids[None]).logits[0].log_softmax(-1)
    reduce = lambda site, partials: lowbit.simulate.all_reduce(partials, "int3:g32", "two-step")  # noqa: E731
    with simulated_tp(model, 4, reduce):
        own = model(window.ids[None]).logits[0].log_softmax(-1)
    for i, (at, token) in enumerate(zip(window.positions.tolist(), window.targets.tolist(), strict=True)):
        assert tokens.nll_exact[i].item() == pytest.approx(-exact[at, token].item(), abs=1e-5)
        assert tokens.nll[i].item() == pytest.approx(-own[at, token].item(), abs=1e-5)
        kl = (exact[at].exp() * (exact[at] - own[at])).sum().item()
        assert tokens.kl[i].item() == pytest.approx(kl, abs=1e-5)
    assert tokens.kl.max() > 1e-4


def test_a_bad_spec_is_reported_as_bad_and_an_exact_one_as_exact():
    specs = ("fp32", "int8:g32", "int2:g32:sym")
    cases = [case(spec, tp=4, algorithm="two-step") for spec in specs]
    by_case = {c: [] for c in cases}
    for _, which, tokens in evaluate(tiny_llama(), windows(), cases):
        by_case[which].append(tokens)
    exact, good, bad = (summary(tokens) for tokens in by_case.values())
    assert exact.kl_mean < 1e-6 and exact.top1_agreement == 1
    assert 1e-6 < good.kl_mean < 0.02 and good.top1_agreement > 0.8
    assert bad.kl_mean > 20 * good.kl_mean and bad.top1_agreement < good.top1_agreement


def test_a_plan_gives_each_site_its_own():
    plan = Plan({f"layers.{i}.{kind}": "exact" for i in range(2) for kind in ("attention", "mlp")}, tp=2)
    one = Plan(dict(plan.sites) | {"layers.1.mlp": "int2:g32"}, tp=2)
    cases = [Case(lowbit.CommConfig(min_bytes=0, plan=each), 2) for each in (plan, one)]
    found = {which: tokens for _, which, tokens in evaluate(tiny_llama(), windows(1), cases)}
    assert found[cases[0]].kl.max() < 1e-6 < 1e-4 < found[cases[1]].kl.max()


def test_says_where_a_loss_ceased_to_be_finite():
    model = tiny_llama().half()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(3e4)
    with pytest.raises(ModelError, match="own logits are not finite|layers.1.mlp"):
        list(evaluate(model, windows(1), [case("fp8")]))


def test_one_logit_of_minus_infinity_is_seen(monkeypatch):
    """It leaves the log likelihood of every other token as it was, and makes the KL divergence infinite."""
    from megatron_lowbit.evaluation import run

    def excluded(model, window, predictions=run.predictions, calls=[]):  # noqa: B006
        logits = predictions(model, window)
        calls.append(1)
        if len(calls) == 2:
            logits[:, (window.targets[0] + 1) % 61] = -torch.inf
        return logits

    window = consecutive([5, 6] * 10, 20)
    monkeypatch.setattr(run, "predictions", excluded)
    with pytest.raises(ModelError, match="window 0, int8:g32, TP=2: the loss is not finite"):
        list(evaluate(tiny_llama(), [*window, *window], [case("int8:g32")]))


def test_says_where_the_models_own_logits_ceased_to_be_finite():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="own logits are not finite; it began before the sum of layers.1.mlp"):
        list(evaluate(model, windows(1), [case("int8:g128")]))


def test_bits_and_bytes():
    features = {"layers.0.attention": 64, "layers.0.mlp": 64}
    two, one = case("int4:g32/int8:g32", tp=4), case("int4:g32", tp=2)
    assert two.algorithm == "two-step" and one.algorithm == "one-shot"
    assert two.bits_per_value(features) == pytest.approx((5 + 9) / 2)
    assert two.bytes_per_token(features) == pytest.approx(128 * 7 / 8 * 2 * 3 / 4)
    assert one.bytes_per_token(features) == pytest.approx(128 * 5 / 8)
    half = case("int4:g32", tp=2, sites=("*.mlp",))
    assert half.bits_per_value(features) == pytest.approx((5 + 16) / 2)
