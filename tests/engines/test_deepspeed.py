"""The DeepSpeed engine: quiet, compressed where it says so, and as before when that is disabled."""

import contextlib
import io
import sys

import pytest
import torch

import megatron_lowbit as lowbit
from megatron_lowbit.cli.files import BUNDLED
from megatron_lowbit.engines.base import Sampling
from tests.ranks import run_ranks

PROMPTS = [line for line in (BUNDLED / "prompts.txt").read_text().splitlines() if line]
SITES = [f"layers.{layer}.{part}" for layer in range(6) for part in ("attention", "mlp")]
NEW = 200 // len(PROMPTS) + 1


def run_engine(rank, world, name):
    """What the engine `name` gives for the bundled model; tests/engines/test_transformers.py runs this too."""
    import os

    os.environ["LOCAL_RANK"] = str(rank)
    from megatron_lowbit.engines.registry import engine_class

    found, out, err = {}, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        found["dtype"] = str(engine_class(name)(BUNDLED / "model").dtype)
        engine = engine_class(name)(BUNDLED / "model", dtype=torch.float32)  # in bf16 rounding alone changes texts
        found["facts"] = list(engine.facts.sites)
        found["device"] = str(engine.device)
        ids = torch.arange(40)[None] * 97 % 4096
        before = engine.logits(ids)
        for spec in ("exact", "int8:g128"):
            config = lowbit.CommConfig(algorithm="exact") if spec == "exact" else lowbit.CommConfig(spec, min_bytes=0)
            with engine.enable(config) as handle:
                lowbit.telemetry.reset_stats()
                logits = engine.logits(ids)
                found[f"paths {spec}"] = {site: dict(s["paths"]) for site, s in lowbit.stats().items()}
                found[f"tokens {spec}"] = [g.tokens for g in engine.generate(PROMPTS, Sampling(NEW))]
            found[f"sites {spec}"] = list(handle.sites)
            found[f"changed {spec}"] = float((logits - before).abs().max())
        found["after"] = torch.equal(engine.logits(ids), before)
    found["printed"] = out.getvalue() + err.getvalue()
    found["imported"] = sorted({"megatron.core", "deepspeed"} & set(sys.modules))
    return found


def check_engine(found: list[dict], imported: list[str]) -> None:
    """What holds for both engines."""
    first, second = found
    assert first == second
    assert first["facts"] == first["sites exact"] == first["sites int8:g128"] == SITES
    assert first["paths exact"] == {site: {"exact": 1} for site in SITES}
    assert first["paths int8:g128"] == {site: {"one-shot": 1} for site in SITES}
    assert first["changed exact"] < 1e-6 < 1e-3 < first["changed int8:g128"]
    assert first["after"] and first["printed"] == "" and first["imported"] == imported
    assert (first["device"], first["dtype"]) == ("cpu", "torch.bfloat16")


def agreement(found: dict) -> float:
    pairs = [
        (a, b)
        for left, right in zip(found["tokens exact"], found["tokens int8:g128"], strict=True)
        for a, b in zip(left, right, strict=True)
    ]
    assert len(pairs) >= 200
    return sum(a == b for a, b in pairs) / len(pairs)


@pytest.fixture(scope="module")
def found():
    return run_ranks(2, run_engine, "deepspeed", timeout=200)


def test_compresses_every_row_parallel_layer_and_says_nothing(found):
    check_engine(found, ["deepspeed"])


def test_eight_bits_keep_the_text(found):
    assert agreement(found[0]) >= 0.95
