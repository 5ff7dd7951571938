"""The Transformers patch on real ranks, against Transformers' own results."""

import os

import torch

import megatron_lowbit as lowbit
from tests.llama import tiny_llama
from tests.ranks import run_ranks


def llama(rank: int, world: int, folder: str) -> dict:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    os.environ["LOCAL_RANK"] = str(rank)
    torch.manual_seed(0)
    ids = torch.randint(0, 61, (2, 12))
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=world))
    with torch.no_grad():
        own = model(ids).logits
        with lowbit.patches.transformers.enable(model, lowbit.CommConfig("fp32", min_bytes=0)):
            same = model(ids).logits
        lowbit.telemetry.reset_stats()
        with lowbit.patches.transformers.enable(model, lowbit.CommConfig("int8:g32", min_bytes=0)) as handle:
            compressed = model(ids).logits
        assert model(ids).logits.equal(own)
    paths = {site: dict(counters["paths"]) for site, counters in lowbit.stats().items()}
    return {"own": own, "same": same, "compressed": compressed, "sites": handle.sites, "paths": paths}


def test_compresses_each_row_parallel_layer(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    first, second = run_ranks(2, llama, str(tmp_path))
    sites = [f"layers.{layer}.{part}" for layer in range(2) for part in ("attention", "mlp")]
    assert first["sites"] == sites
    assert first["paths"] == {site: {"one-shot": 1} for site in sites}
    assert first["compressed"].equal(second["compressed"])
    torch.testing.assert_close(first["same"], first["own"], rtol=0, atol=1e-6)
    assert 0 < (first["compressed"] - first["own"]).abs().max() < 0.2
