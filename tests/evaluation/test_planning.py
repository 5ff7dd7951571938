"""Effects of legs and the options made of them, on a tiny model and against runs written out here."""

import pytest
import torch

pytest.importorskip("scipy")

import megatron_lowbit as lowbit
from megatron_lowbit.engines.simulated_tp import features, simulated_tp
from megatron_lowbit.errors import ConfigError
from megatron_lowbit.evaluation.noise import Noise
from megatron_lowbit.evaluation.planning import (
    Option,
    Setting,
    least_bytes,
    least_kl,
    measured_effects,
    options,
    predicted,
    probes,
    scaled_effects,
    uncompressed,
)
from megatron_lowbit.evaluation.run import evaluate
from megatron_lowbit.evaluation.windows import consecutive
from tests.llama import tiny_llama

TWO = Setting(4, "two-step", {"a": 64, "b": 64})


def windows():
    torch.manual_seed(3)
    return consecutive(torch.randint(0, 61, (200,)).tolist(), 20, count=2)


def by_hand(model, chosen, spec):
    """Mean KL divergence with `spec` at one site alone."""

    def reduce(site, partials):
        return lowbit.simulate.all_reduce(partials, spec, "two-step") if site == chosen else sum(partials)

    total, count = 0.0, 0
    for window in windows():
        exact = model(window.ids[None]).logits[0].log_softmax(-1)
        with simulated_tp(model, 4, reduce):
            own = model(window.ids[None]).logits[0].log_softmax(-1)
        kl = (exact.exp() * (exact - own)).sum(-1)[window.positions]
        total, count = total + kl.sum().item(), count + len(kl)
    return total / count


@torch.inference_mode()
def test_effects_are_those_of_one_leg_at_one_site():
    model = tiny_llama()
    setting = Setting(4, "two-step", features(model))
    cases = probes(setting, ["int2:g32"])
    assert len(cases) == 8
    found = {case: [] for case in [uncompressed(setting.uniform("fp32")), *cases.values()]}
    for _, case, tokens in evaluate(model, windows(), list(found)):
        found[case].append(tokens)
    effects = measured_effects(setting, cases, found)
    for (site, leg, _), effect in effects.items():
        spec = "int2:g32/fp32" if leg == "scatter" else "fp32/int2:g32"
        assert effect == pytest.approx(by_hand(model, site, spec), rel=1e-3, abs=1e-7) and effect > 1e-5
    assert len({round(effect, 9) for effect in effects.values()}) == 8


def test_one_shot_has_one_leg():
    setting = Setting(2, "one-shot", {"a": 32})
    assert setting.legs == ("scatter",)
    assert [case.config.spec for case in probes(setting, ["int4:g32"]).values()] == ["int4:g32"]
    effects = {("a", "scatter", "int4:g32"): 0.5}
    assert [option.spec for option in options(setting, effects, ["int4:g32"])["a"]] == ["exact", "int4:g32"]
    assert predicted(effects, setting, {"a": "int4:g32"}) == 0.5


def test_effects_grow_with_the_noise():
    effects = {(site, leg, "int3:g32"): 0.3 for site in "ab" for leg in TWO.legs}
    noise = {(leg, "int3:g32"): {site: Noise(1, 0.5, 2.0, 10) for site in "ab"} for leg in TWO.legs}
    noise |= {(leg, "int6:g32"): {"a": Noise(9, 9, 0.02, 10), "b": Noise(9, 9, 0.2, 10)} for leg in TWO.legs}
    found = scaled_effects(TWO, "int3:g32", effects, noise, ["int3:g32", "int6:g32"])
    assert found["a", "gather", "int6:g32"] == pytest.approx(0.003)
    assert found["b", "scatter", "int6:g32"] == pytest.approx(0.03)
    assert found["b", "scatter", "int3:g32"] == pytest.approx(0.3)


def effects_of(**kl):
    return {(site, leg, spec): kl[site + leg[0]] / 4**bits for site in "ab" for leg in TWO.legs
            for spec, bits in (("int4:g32", 5), ("int2:g32", 3))}  # fmt: skip


def test_options_price_both_legs():
    effects = effects_of(**{"as": 1.0, "ag": 2.0, "bs": 3.0, "bg": 4.0})
    found = {option.spec: option for option in options(TWO, effects, ["int4:g32", "int2:g32"])["a"]}
    assert list(found) == ["exact", "int4:g32", "int4:g32/int2:g32", "int2:g32/int4:g32", "int2:g32"]
    assert found["exact"] == Option("exact", 16 * 64, 64 * 2 * 1.5, 0.0)
    mixed = found["int4:g32/int2:g32"]
    assert mixed.bits == 4 * 64 and mixed.bytes == 64 * 4 / 8 * 1.5
    assert mixed.kl == pytest.approx(1 / 4**5 + 2 / 4**3)


def test_bits_go_where_they_are_needed():
    choices = options(TWO, effects_of(**{"as": 1.0, "ag": 1.0, "bs": 100.0, "bg": 1.0}), ["int4:g32", "int2:g32"])
    assert least_kl(TWO, choices, 3.5) == {"a": "int2:g32", "b": "int4:g32/int2:g32"}
    assert least_kl(TWO, choices, 3.0) == {"a": "int2:g32", "b": "int2:g32"}
    assert least_bytes(choices, 103.1 / 4**3) == {"a": "int2:g32", "b": "int2:g32"}
    assert least_bytes(choices, 1.0) == {"a": "int2:g32", "b": "int4:g32/int2:g32"}
    assert least_bytes(choices, 0.0) == {"a": "exact", "b": "exact"}
    with pytest.raises(ConfigError, match="2.9 bits per value are fewer than the 3 of the cheapest"):
        least_kl(TWO, choices, 2.9)


def test_a_prediction_is_the_sum_of_its_legs():
    effects = effects_of(**{"as": 1.0, "ag": 2.0, "bs": 3.0, "bg": 4.0})
    assert predicted(effects, TWO, {"a": "int4:g32/int2:g32", "b": "exact"}) == pytest.approx(1 / 4**5 + 2 / 4**3)
