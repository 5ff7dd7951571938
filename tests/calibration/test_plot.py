"""The picture is drawn for few and for many sites, without a display, and says it when it cannot be."""

import sys

import pytest
import torch

from megatron_lowbit.calibration.plot import GRAPHS, plot
from megatron_lowbit.calibration_file import Calibration
from megatron_lowbit.errors import ConfigError
from megatron_lowbit.ranges import Ranges

pytest.importorskip("matplotlib")
PNG = b"\x89PNG\r\n\x1a\n"


def calibration(sites, features=(96,), zero=False):
    torch.manual_seed(0)
    ranges = {}
    for index in range(sites):
        high = torch.rand(2, features[index % len(features)]) * (not zero)
        ranges[f"layers.{index}.mlp"] = Ranges(-high, high)
    return Calibration.from_ranges(ranges, metadata={"model": "a model"})


@pytest.mark.parametrize("sites", [1, 5, GRAPHS, GRAPHS + 1, 60])
def test_a_picture(tmp_path, sites):
    made = calibration(sites, features=(96, 160))
    plot(made, {site: 0.5 for site in made.sites}, tmp_path / "a.out")
    data = (tmp_path / "a.out").read_bytes()
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    assert data.startswith(PNG) and 1000 < width < 2000 and 300 < height < 2000


@pytest.mark.parametrize("sites", [2, GRAPHS + 2])
@pytest.mark.filterwarnings("error")
def test_ranges_of_zero_and_unknown_overlaps(tmp_path, sites):
    made = calibration(sites, zero=True)
    plot(made, dict.fromkeys(made.sites), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_the_callers_backend_is_left_alone(tmp_path):
    import matplotlib

    before = matplotlib.get_backend(auto_select=False)
    plot(calibration(1), {}, tmp_path / "a.png")
    assert matplotlib.get_backend(auto_select=False) == before


def test_where_it_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written"):
        plot(calibration(1), {}, tmp_path)


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"needs matplotlib: pip install 'megatron-lowbit\[eval\]', or leave it out"):
        plot(calibration(1), {}, tmp_path / "a.png")
