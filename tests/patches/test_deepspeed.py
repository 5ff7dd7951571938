"""The DeepSpeed patch on real ranks, against DeepSpeed's own results."""

import torch

import megatron_lowbit as lowbit
from tests.llama import tiny_llama
from tests.ranks import run_ranks


def llama(rank: int, world: int) -> dict:
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.manual_seed(0)
    ids = torch.randint(0, 61, (2, 12))
    engine = deepspeed.init_inference(tiny_llama(), tensor_parallel={"tp_size": world}, dtype=torch.float32)
    kinds = [type(module) for module in engine.modules()]
    with torch.no_grad():
        own = engine(ids).logits
        with lowbit.patches.deepspeed.enable(engine, lowbit.CommConfig("fp32", min_bytes=0)):
            same = engine(ids).logits
        lowbit.telemetry.reset_stats()
        with lowbit.patches.deepspeed.enable(engine, lowbit.CommConfig("int8:g32", min_bytes=0)) as handle:
            compressed = engine(ids).logits
        assert kinds == [type(module) for module in engine.modules()]
        assert engine(ids).logits.equal(own)
    paths = {site: dict(counters["paths"]) for site, counters in lowbit.stats().items()}
    return {"own": own, "same": same, "compressed": compressed, "sites": handle.sites, "paths": paths}


def test_compresses_each_row_parallel_layer():
    first, second = run_ranks(2, llama)
    sites = [f"layers.{layer}.{part}" for layer in range(2) for part in ("attention", "mlp")]
    assert first["sites"] == sites
    assert first["paths"] == {site: {"one-shot": 1} for site in sites}
    assert first["compressed"].equal(second["compressed"])
    torch.testing.assert_close(first["same"], first["own"], rtol=0, atol=1e-6)
    assert 0 < (first["compressed"] - first["own"]).abs().max() < 0.2
