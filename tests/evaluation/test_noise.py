"""Noise at the sites of a tiny model, against partial sums made here."""

import math

import pytest
import torch

import megatron_lowbit as lowbit
from megatron_lowbit.evaluation.noise import Noise, measure
from megatron_lowbit.evaluation.windows import consecutive
from tests.llama import tiny_llama


def windows():
    torch.manual_seed(3)
    return consecutive(torch.randint(0, 61, (40,)).tolist(), 20)


@torch.inference_mode()
def test_is_that_of_the_exact_models_partial_sums():
    """Of the last site, too, whose input would differ if the sums before it were compressed."""
    model, inputs = tiny_llama(), []
    layer = model.model.layers[1].mlp.down_proj
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for window in windows():
        model(window.ids[None])
    hook.remove()
    signal = error = relative = 0.0
    for x in inputs:
        parts = [x[..., i * 12 : i * 12 + 12] @ layer.weight[:, i * 12 : i * 12 + 12].T for i in range(4)]
        exact, own = sum(parts), lowbit.simulate.all_reduce(parts, "int3:g32", "two-step")
        signal, error = signal + (exact**2).sum(), error + ((own - exact) ** 2).sum()
        relative += (((own - exact) ** 2).sum(-1) / (exact**2).sum(-1)).sum()
    configs = [lowbit.CommConfig(spec, "two-step", 0) for spec in ("int2:g32", "int3:g32")]
    coarse, found = measure(model, windows(), configs, 4)
    assert len(found) == 4
    assert found["layers.1.mlp"].sqnr_db == pytest.approx(10 * math.log10(signal / error), abs=1e-3)
    assert found["layers.1.mlp"].relative == pytest.approx(relative.item() / 40, rel=1e-3)
    assert all(coarse[site].sqnr_db + 5 < found[site].sqnr_db for site in found)


def test_sites_that_are_not_compressed_have_none():
    [found] = measure(tiny_llama(), windows(), [lowbit.CommConfig("int3:g32", "two-step", 0, ("*.mlp",))], 2)
    assert list(found) == ["layers.0.mlp", "layers.1.mlp"]


def test_no_error_is_infinite_and_noise_adds():
    assert Noise(2.0, 0.0, 0.0, 3).sqnr_db == math.inf and Noise().relative == 0
    both = Noise(30.0, 1.0, 0.2, 2) + Noise(70.0, 9.0, 0.4, 2)
    assert both.sqnr_db == pytest.approx(10) and both.relative == pytest.approx(0.15)
