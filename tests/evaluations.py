"""Made-up results of evaluations: what `evaluate --json`, sensitivity and consistency would give."""

from __future__ import annotations

FACTS = {
    "model": "small",
    "fingerprint": "f" * 64,
    "text": "prose.txt",
    "text_sha256": "a" * 64,
    "window_length": "512",
    "stride": "512",
    "dtype": "float32",
    "megatron_lowbit": "0.1.0",
    "torch": "2.13.0",
    "date": "2026-11-21",
}


def row(
    spec: str,
    tp: int = 4,
    bits: float = 5.0,
    loss: float = 0.005,
    interval: tuple[float, float] | None = None,
    **changes,
):
    """A row of the JSON. Bytes are two-step's, of 100 features; the interval is ± 0.1 % unless it is given."""
    hops = 2 * (tp - 1) / tp
    return {
        "spec": spec,
        "tp": tp,
        "algorithm": "two-step",
        "sites": None,
        "plan": None,
        "plan_digest": None,
        "bits_per_value": bits,
        "bytes_per_token": 100 * bits / 8 * hops,
        "bytes_per_token_bf16": 100 * 2 * hops,
        "perplexity": 50 * (1 + loss),
        "perplexity_error": 1.0,
        "perplexity_exact": 50.0,
        "loss": loss,
        "loss_interval": interval or (loss - 0.001, loss + 0.001),
        "kl_mean": abs(loss) / 2 + 1e-5,
        "kl_error": 1e-5,
        "kl_p99": 2 * abs(loss),
        "top1_agreement": 0.97,
        "tokens": 32704,
        "windows": 64,
    } | changes


def rows() -> list[dict]:
    """Good, cheap, bad and dear cases at two TP sizes."""
    return [
        row("int8:g128", 2, 8.25, 0.0, algorithm="one-shot"),
        row("int4:g32", 2, 5.0, 0.003, algorithm="one-shot"),
        row("int2:g32:sym", 2, 2.5, 0.25, algorithm="one-shot"),
        row("int8:g128", 8, 8.25, 0.0001),
        row("int4:g32", 8, 5.0, 0.006),
        row("gauss4:g128", 8, 4.125, 0.0098),
        row("int2:g32:sym", 8, 2.5, 0.4),
        row("int8:g128", 8, 8.25, 0.0, algorithm="one-shot", bytes_per_token=1443.75),
    ]


def sensitivity(layers: int = 3) -> dict:
    """Of attention and MLP; the last layer's MLP is the worst."""
    sites = [(layer, kind) for layer in range(layers) for kind in ("attention", "mlp")]
    kl = [0.001 * (1 + index) for index in range(len(sites))]
    found = [
        {"site": f"layers.{layer}.{kind}", "layer": layer, "kind": kind, "features": 64, "kl_mean": value,
         "kl_error": 1e-5, "share": value / sum(kl), "sqnr_db": 20.0 + index if index else None}
        for index, ((layer, kind), value) in enumerate(zip(sites, kl))
    ]  # fmt: skip
    explanation = f"layers.{layers - 1}.mlp is the most sensitive site."
    facts = {"fingerprint": FACTS["fingerprint"], "spec": "int4:g32", "tp": 8, "algorithm": "two-step"}
    return facts | {"rows": found, "kl_all": 1.1 * sum(kl), "explanation": explanation}


def consistency(windows: int = 8, calibration: bool = True) -> dict:
    """As evaluation/consistency.py makes it."""
    found = [
        {"site": f"layers.{layer}.{kind}", "layer": layer, "kind": kind, "features": 64, "outliers": 1,
         "overlap": 0.5 + layer / 4 if windows > 1 else None, "chance": 1 / 64, "times": 2.0 + layer,
         "calibrated": 0.75 if calibration else None}
        for layer in range(3) for kind in ("attention", "mlp")
    ]  # fmt: skip
    return {"tp": 8, "windows": windows, "fraction": "1/64", "calibration": calibration, "rows": found}


def tasks() -> list[dict]:
    return [
        {"task": "cloze", "metric": "acc", "spec": "int4:g32", "tp": 8, "algorithm": "two-step", "exact": 0.31,
         "value": 0.305, "change": -0.005, "change_interval": [-0.02, 0.01], "p_value": 0.4, "samples": 400}
    ]  # fmt: skip
