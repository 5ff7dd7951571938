"""Outliers of a model that has them where the test put them."""

import pytest
import torch

pytest.importorskip("transformers")

from fractions import Fraction

from megatron_lowbit.evaluation import consistency as module
from megatron_lowbit.evaluation.windows import consecutive
from tests.calibrations import random_calibration
from tests.llama import tiny_llama

PLANTED = 5
SITES = [f"layers.{i}.{kind}" for i in range(2) for kind in ("attention", "mlp")]


@pytest.fixture(scope="module")
def model():
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            for row_parallel in (layer.self_attn.o_proj, layer.mlp.down_proj):
                row_parallel.weight[PLANTED] *= 100
    return model


def windows(count):
    ids = torch.randint(61, (24 * count,), generator=torch.Generator().manual_seed(0)).tolist()
    return consecutive(ids, 24)


def test_finds_what_was_planted_in_every_half(model):
    calibration = random_calibration(SITES, 2, 32, "1/32")
    found = module.consistency(model, windows(6), 2, calibration)
    assert [row["site"] for row in found["rows"]] == SITES
    assert (found["tp"], found["windows"], found["fraction"], found["calibration"]) == (2, 6, "1/32", True)
    for row in found["rows"]:
        assert (row["outliers"], row["features"], row["overlap"], row["chance"]) == (1, 32, 1.0, 1 / 32)
        assert row["times"] > 20
        assert row["calibrated"] == float(PLANTED in calibration.outliers[row["site"]])
    assert {(row["layer"], row["kind"]) for row in found["rows"]} == {
        (i, k) for i in (0, 1) for k in ("attention", "mlp")
    }


def test_a_calibration_of_the_same_outliers_is_said_to_hold(model):
    calibration = random_calibration(SITES, 2, 32, "1/32")
    planted = type(calibration)(calibration.ranges, dict.fromkeys(SITES, (PLANTED,)), Fraction(1, 32))
    assert all(row["calibrated"] == 1 for row in module.consistency(model, windows(2), 2, planted)["rows"])


def test_looks_at_the_first_windows_alone_and_one_has_no_halves(model, monkeypatch):
    monkeypatch.setattr(module, "WINDOWS", 3)
    assert module.consistency(model, windows(5), 4)["windows"] == 3
    found = module.consistency(model, windows(1), 4)
    assert found["windows"] == 1 and not found["calibration"]
    assert {(row["overlap"], row["calibrated"]) for row in found["rows"]} == {(None, None)}
