"""The logits: exact unless they are asked for by name."""

import torch

import megatron_lowbit as lowbit
from tests.llama import tiny_llama
from tests.patches.ds.engines import paths, sharded, snapshot, tokens, unchanged
from tests.ranks import run_ranks


def logits(rank: int, world: int) -> dict:
    engine = sharded(tiny_llama(), world)
    before, head, results = snapshot(engine), engine.module.lm_head, {}
    assert type(head).__name__ == "LmHeadLinearAllreduce"
    hidden = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        results["own"] = head(hidden)
        asks = {"all": None, "wildcard": ("*",), "named": ("layers.*", "logits"), "alone": ("logits",)}
        for name, sites in asks.items():
            lowbit.telemetry.reset_stats()
            with lowbit.patches.deepspeed.enable(engine, lowbit.CommConfig("int8:g32", min_bytes=0, sites=sites)) as on:
                engine(tokens())
                out = head(hidden)
            results[name] = {"out": out, "sites": on.sites, "paths": paths()}
        width, first = head.weight.shape[1], 0 if rank == 0 else 32 - head.weight.shape[1]
        partial = hidden[..., first : first + width] @ head.weight.t()
    parts = [torch.empty_like(partial) for _ in range(world)]
    torch.distributed.all_gather(parts, partial)
    results["simulated"] = lowbit.simulate.all_reduce(parts, "int8:g32", algorithm="one-shot")
    assert unchanged(engine, before)
    return results


def test_exact_unless_named():
    first, second = run_ranks(2, logits)
    layers = [f"layers.{layer}.{part}" for layer in range(2) for part in ("attention", "mlp")]
    for name in ("all", "wildcard"):
        assert first[name]["sites"] == layers
        assert "logits" not in first[name]["paths"]
        assert first[name]["out"].equal(first["own"])
    assert first["named"]["sites"] == [*layers, "logits"]
    assert first["named"]["paths"] == {site: {"one-shot": 1 + (site == "logits")} for site in [*layers, "logits"]}
    for name in ("named", "alone"):
        assert first[name]["out"].equal(first["simulated"])
        assert first[name]["out"].equal(second[name]["out"])
    assert first["alone"]["paths"] == {site: {"exact": 1} for site in layers} | {"logits": {"one-shot": 2}}
