"""The quality benchmark: figures worked out by hand, the planted outliers, and a small run from end to end."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Benchmarks are scripts, which import each other by their bare names."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def test_decibels_by_hand(load):
    quality = load("quality")
    exact = torch.tensor([3.0, 4.0, 0.0], dtype=torch.bfloat16)
    signal, noise = quality.energies(exact, torch.tensor([3.0, 4.0, 0.5]))
    assert (signal, noise) == (25.0, 0.25)
    assert quality.decibels(signal, noise) == pytest.approx(20.0)
    assert quality.decibels(1.0, 0.0) == math.inf
    large = torch.tensor([2.0**13, 1.0])
    assert quality.energies(large, torch.zeros(2)) == (2.0**26 + 1, 2.0**26 + 1)  # fp32 would lose the one


@pytest.mark.parametrize("name, deviation", [("Gaussian", 1.0), ("uniform", 3**-0.5), ("Laplace", 2**0.5)])
def test_distributions_have_their_deviation(load, name, deviation):
    data = load("distributions").sample(name, (512, 512))
    assert data.x.dtype == torch.bfloat16
    assert float(data.x.double().std()) == pytest.approx(deviation, rel=0.01)
    assert not any(torch.equal(data.x, other) for other in data.calibration)


def test_heavy_and_sparse_distributions(load):
    distributions = load("distributions")
    heavy = distributions.sample("Student t(3)", (512, 512)).x.double()
    assert float((heavy.abs() > 3.182).double().mean()) == pytest.approx(0.05, abs=0.002)  # its two-sided quantile
    assert float((distributions.sample("sparse 90 %", (512, 512)).x == 0).double().mean()) == pytest.approx(
        0.9, abs=0.01
    )


def test_outliers_are_planted_in_the_same_features_of_every_draw(load):
    distributions = load("distributions")
    data = distributions.sample("outliers", (512, 1024))
    ordinary = set(data.parts[distributions.ORDINARY].tolist())
    assert len(ordinary) == 1024 - 16
    for draw in (data.x, *data.calibration):
        deviations = draw.double().std(0)
        assert {f for f in range(1024) if deviations[f] < 2} == ordinary
        assert 9 < float(deviations[deviations > 2].min()) and float(deviations.max()) < 45


def test_targets_by_hand(load):
    quality_targets = load("quality_targets")
    rows = [
        {"data": data, "tp": None, "hop": "one hop", "spec": spec, "bits_per_value": bits, "sqnr_db": db}
        for spec, bits, least in (("a", 4.0, 19.0), ("b", 4.35, 20.5), ("c", 4.4, 30.0), ("d", 2.125, 9.1))
        for data, db in zip(quality_targets.ROBUST, (least, least + 1, least, least + 2), strict=True)
    ]
    rows += [
        {"data": "model", "tp": tp, "hop": "two-step", "spec": spec, "bits_per_value": bits, "sqnr_db": db + tp,
         "mean_of_sites_db": db}
        for tp in (2, 8)
        for spec, bits, db in (("int2:g32", 3.0, 5.0), ("a", 3.0, 7.5), ("b", 2.0, 6.0), ("c", 3.1, 20.0))
    ]  # fmt: skip
    robust, low, gain = quality_targets.targets(rows)
    assert (robust["spec"], robust["db"], robust["met"], robust["met_by"]) == ("b", 20.5, True, ["b"])
    assert (low["spec"], low["db"], low["met"]) == ("d", 9.1, False)
    assert (gain["spec"], gain["db"], gain["met"]) == ("a", 2.5, True)
    assert gain["figures"] == {"plain": 13.0, "best": 15.5, "gain of the mean of sites": 2.5}


def test_a_small_run_from_end_to_end(tmp_path):
    """By way of benchmarks/codecs.py, which hands over to it."""
    specs = ["int2:g32", "gauss3:g256", "selective4"]
    options = ["--quality", "--tokens", "64", "--rows", "8", "--tp", "2", "--json", "q.json", "--plot", "q.png"]
    options += [word for spec in specs for word in ("--spec", spec)]
    command = [sys.executable, str(BENCHMARKS / "codecs.py"), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # this checkout's package, whichever is installed
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "q.json").read_text())
    assert (result["tokens_calibrated"], result["tokens_measured"], result["shape"]) == (32, 32, [8, 4096])
    assert list(dict.fromkeys(row["spec"] for row in result["rows"])) == specs
    gaussian = next(r for r in result["rows"] if r["data"] == "Gaussian" and r["spec"] == "gauss3:g256")
    assert gaussian["bits_per_value"] == 3 and gaussian["shannon_db"] == pytest.approx(18.06, abs=0.01)
    assert 14 < gaussian["sqnr_db"] < 15
    sums = next(r for r in result["rows"] if r["tp"] == 2 and r["hop"] == "two-step")
    assert sums["worst_site_db"] < sums["sqnr_db"] and 0 < sums["worst_site_share_of_energy"] < 1
    assert [goal["spec"] for goal in result["targets"]] == ["gauss3:g256"] * 2  # least of four, gain over int2:g32
    assert (tmp_path / "q.png").read_bytes().startswith(b"\x89PNG")
