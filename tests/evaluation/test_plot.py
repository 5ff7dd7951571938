"""The picture holds what it was given; how it looks was looked at."""

import math

import pytest

pytest.importorskip("matplotlib")

from megatron_lowbit.evaluation.plot import plot


def row(tp, bits, loss, spec, interval=None):
    interval = interval or (loss - 0.01, loss + 0.01)
    return {"tp": tp, "bits_per_value": bits, "loss": loss, "loss_interval": interval, "kl_mean": loss / 10,
            "spec": spec, "plan": None}  # fmt: skip


def test_draws_every_case(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "annotate", lambda self, text, *_, **__: drawn.append(text))
    rows = [row(2, 5.0, 0.01, "int4:g32"), row(2, 8.25, 0.0, "int8:g128"), row(8, 5.0, 0.02, "int4:g32")]
    plot(rows, "model", tmp_path / "a.png")
    assert drawn == ["int4:g32", "int8:g128", "int4:g32"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_single_window_has_no_interval(tmp_path):
    plot([row(2, 5.0, 0.01, "int4:g32", (math.nan, math.nan))], "model", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
