"""The picture holds what it was given; how it looks was looked at."""

import pytest

pytest.importorskip("matplotlib")

from megatron_lowbit.evaluation.heat_map import heat_map


def row(layer, kind, kl, sqnr=20.0):
    return {"layer": layer, "kind": kind, "kl_mean": kl, "sqnr_db": sqnr}


def test_draws_every_number(monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "text", lambda self, x, y, text, **__: drawn.append((x, y, text)))
    rows = [row(0, "attention", 0.01), row(0, "mlp", 0.02, 10.0), row(3, "mlp", 0.0, None), row(None, "logits", 0.3)]
    assert heat_map(rows, "model").startswith(b"\x89PNG")
    assert drawn == [
        (0.5, 0.5, "0.01"), (1.5, 0.5, "0.02"), (2.5, 2.5, "0.3"),
        (0.5, 0.5, "20.0"), (1.5, 0.5, "10.0"), (2.5, 2.5, "20.0"),
    ]  # fmt: skip


def test_many_layers_and_no_effect_at_all():
    assert heat_map([row(i, "mlp", 1e-4 * (i + 1)) for i in range(90)], "model").startswith(b"\x89PNG")
    assert heat_map([row(0, "mlp", -1e-9, None)], "model").startswith(b"\x89PNG")
