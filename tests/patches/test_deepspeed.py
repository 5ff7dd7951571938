"""The DeepSpeed patch on real ranks, against DeepSpeed's own results and the unsharded model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megatron_lowbit as lowbit
from tests.calibrations import random_calibration
from tests.llama import tiny_llama
from tests.patches.ds.engines import paths, sharded, snapshot, tokens, unchanged
from tests.ranks import run_ranks

SITES = [f"layers.{layer}.{part}" for layer in range(2) for part in ("attention", "mlp")]
INT8 = {"spec": "int8:g32", "min_bytes": 0}


def llama(rank: int, world: int) -> dict:
    ids, model = tokens(), tiny_llama()
    with torch.no_grad():
        whole = model(ids).logits
        engine = sharded(model, world)
        before = snapshot(engine)
        own = engine(ids).logits
        for given in (engine, engine.module):
            with lowbit.patches.deepspeed.enable(given, lowbit.CommConfig("fp32", min_bytes=0)):
                same = engine(ids).logits
        lowbit.telemetry.reset_stats()
        with lowbit.patches.deepspeed.enable(engine, lowbit.CommConfig(**INT8)) as handle:
            compressed = engine(ids).logits
        assert unchanged(engine, before)
        assert engine(ids).logits.equal(own)
    results = {"whole": whole, "own": own, "same": same, "compressed": compressed}
    return results | {"sites": handle.sites, "paths": paths()}


def test_compresses_each_row_parallel_layer():
    first, second = run_ranks(2, llama)
    assert first["sites"] == SITES
    assert first["paths"] == {site: {"one-shot": 1} for site in SITES}
    assert first["compressed"].equal(second["compressed"])
    torch.testing.assert_close(first["own"], first["whole"], rtol=0, atol=1e-5)
    torch.testing.assert_close(first["same"], first["own"], rtol=0, atol=1e-6)
    assert 0 < (first["compressed"] - first["own"]).abs().max() < 0.2


def one_call(rank: int, world: int) -> dict:
    """init_inference with a configuration, generating; then a second engine of another size in the same process."""
    import deepspeed

    ids, init = tokens(), lowbit.patches.deepspeed.init_inference
    engine = init(tiny_llama(), world, lowbit.CommConfig(**INT8))
    with torch.no_grad():
        text = engine.generate(ids, max_new_tokens=6, do_sample=False)
    calls = {site: counters["calls"] for site, counters in lowbit.stats().items()}
    sites = engine.lowbit_handle.sites
    engine.lowbit_handle.disable()
    lowbit.telemetry.reset_stats()
    with torch.no_grad():
        same = engine.generate(ids, max_new_tokens=6, do_sample=False)
        halves = init(tiny_llama(), 2, None)  # of 4 ranks: two groups of neighbours
        whole, half = tiny_llama()(ids).logits, halves(ids).logits
    group = next(module.mp_group for module in halves.modules() if hasattr(module, "mp_group") and module.mp_group)
    ranks = torch.distributed.get_process_group_ranks(group)
    untouched = deepspeed.inference.engine.InferenceEngine.inference_mp_group is None
    return {
        "text": text,
        "same": same,
        "sites": sites,
        "calls": calls,
        "error": (half - whole).abs().max(),
        "ranks": ranks,
        "handle": halves.lowbit_handle,
        "dtype": str(halves.dtype if hasattr(halves, "dtype") else half.dtype),
        "untouched": untouched,
        "paths": paths(),
    }


def test_one_call_on_four_ranks_then_groups_of_two():
    results = run_ranks(4, one_call)
    first = results[0]
    assert first["sites"] == SITES
    assert first["calls"] == dict.fromkeys(SITES, 6)
    assert all(result["text"].equal(first["text"]) for result in results)
    assert [result["ranks"] for result in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert max(result["error"] for result in results) < 1e-5
    assert first["handle"] is None and first["paths"] == {}
    assert first["untouched"]
    assert first["dtype"] == "torch.float32"  # the model's own, where DeepSpeed's default is fp16


def _message(function, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except lowbit.LowBitError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def mistakes(rank: int, world: int) -> dict[str, str]:
    from deepspeed.module_inject import set_autotp_mode

    deepspeed = lowbit.patches.deepspeed
    config, ids = lowbit.CommConfig(**INT8), tokens()
    engine, single = sharded(tiny_llama(), world), sharded(tiny_llama(), 1)
    before = snapshot(engine)
    say = {
        "not a config": _message(deepspeed.enable, engine, "int8:g32"),
        "not an engine": _message(deepspeed.enable, None, config),
        "a class": _message(deepspeed.enable, type(engine), config),
        "plain model": _message(deepspeed.enable, tiny_llama(), config),
        "tp 1": _message(deepspeed.enable, single, config),
        "no site": _message(deepspeed.enable, engine, lowbit.CommConfig(**INT8, sites=("decoder.*",))),
        "embedding": _message(deepspeed.enable, engine, lowbit.CommConfig(**INT8, sites=("layers.*", "embedding"))),
        "calibrated for others": _message(
            deepspeed.enable,
            engine,
            lowbit.CommConfig(
                "int4:g32:outliers=1/16", calibration=random_calibration(["layers.0.mlp"], tp=2, features=32)
            ),
        ),
        "calibrated for 4 ranks": _message(
            deepspeed.enable,
            engine,
            lowbit.CommConfig("int4:g32:outliers=1/16", calibration=random_calibration(SITES, tp=4, features=32)),
        ),
    }
    handle = deepspeed.enable(engine, config)
    say["twice"] = _message(deepspeed.enable, engine, config)
    say["gradients"] = _message(engine, ids)
    layer = engine.module.model.layers[0].mlp.down_proj
    attributes = dict(layer.__dict__)
    layer.defer_collectives_to_compiler = True
    with torch.no_grad():
        say["deferred while enabled"] = _message(engine, ids)
    layer.__dict__.clear()
    layer.__dict__.update(attributes)
    handle.disable()
    handle.disable()
    set_autotp_mode(training=True)
    say["training"] = _message(deepspeed.enable, engine, config)
    set_autotp_mode(training=False)
    attributes = dict(layer.__dict__)
    layer.defer_collectives_to_compiler = True
    say["deferred"] = _message(deepspeed.enable, engine, config)
    layer.__dict__.clear()
    layer.__dict__.update(attributes)
    assert deepspeed.enable(engine, config).disable() is None
    assert [(a, b.keys()) for a, b, *_ in snapshot(engine)] == [(a, b.keys()) for a, b, *_ in before]
    return say


def test_errors_of_enable():
    say = run_ranks(2, mistakes)[0]
    assert say["not a config"].startswith("ConfigError: config is 'int8:g32': pass a CommConfig")
    assert say["not an engine"].startswith("ModelError: None is no engine")
    assert "is no engine" in say["a class"]
    assert "LlamaForCausalLM has no row-parallel layer of DeepSpeed" in say["plain model"]
    assert "which makes none for tp_size 1: pass what deepspeed.init_inference" in say["tp 1"]
    assert "selects none of this model's sites: layers.0.attention" in say["no site"]
    assert "names 'embedding', which this model does not sum or which" in say["embedding"]
    assert "lacks layers.0.attention" in say["calibrated for others"]
    assert "was made for TP 4, this group has 2 ranks" in say["calibrated for 4 ranks"]
    assert "layers.0.attention is enabled already: call the earlier handle's disable()" in say["twice"]
    assert "torch.no_grad()" in say["gradients"]
    assert "DeepCompile" in say["deferred"] and "DeepCompile" in say["deferred while enabled"]
    assert "training mode" in say["training"]


def compiled(rank: int, world: int) -> dict:
    ids, engine = tokens(), sharded(tiny_llama(), world)
    with torch.no_grad():
        own = engine(ids).logits
        engine.compile(backend="aot_eager")
        before = engine(ids).logits
        with lowbit.patches.deepspeed.enable(engine, lowbit.CommConfig("fp32", min_bytes=0)):
            same = engine(ids).logits
        lowbit.telemetry.reset_stats()
        with lowbit.patches.deepspeed.enable(engine, lowbit.CommConfig(**INT8)):
            close = engine(ids).logits
        counted = paths()
        after = engine(ids).logits
    return {"own": own, "before": before, "same": same, "close": close, "after": after, "paths": counted}


@pytest.mark.slow
def test_compiled_engine():
    first, second = run_ranks(2, compiled)
    assert first["paths"] == {site: {"one-shot": 1} for site in SITES}
    assert first["close"].equal(second["close"])
    for name in ("before", "same", "after"):
        torch.testing.assert_close(first[name], first["own"], rtol=0, atol=1e-5)
    assert 0 < (first["close"] - first["own"]).abs().max() < 0.2


def test_without_a_launcher():
    """In a process of its own, as here the tests may have started torch.distributed."""
    script = (
        "import megatron_lowbit as lowbit\n"
        "from tests.llama import tiny_llama\n"
        "lowbit.patches.deepspeed.init_inference(tiny_llama(), 2, lowbit.CommConfig('int8:g128'))"
    )
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environ, cwd=root)
    assert (
        "ConfigError: torch.distributed is not initialised and RANK is not set: start the program with" in done.stderr
    )
