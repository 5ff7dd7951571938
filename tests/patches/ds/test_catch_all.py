"""The catch-all: what has no class of its own, and only that."""

import torch
import torch.distributed as dist

import megatron_lowbit as lowbit
from tests.llama import tiny_llama
from tests.patches.ds.engines import paths, sharded, tokens
from tests.ranks import run_ranks


class Own(torch.nn.Module):
    """A module of a user's own: sums in place and looks at no result, as DeepSpeed's do."""

    def forward(self, x: torch.Tensor, **arguments) -> torch.Tensor:
        import deepspeed.comm

        deepspeed.comm.inference_all_reduce(x, **arguments)
        return x


def _message(function, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except lowbit.LowBitError as error:
        return str(error)
    return "no error"


def caught(rank: int, world: int) -> dict:
    import deepspeed.comm

    enable, config = lowbit.patches.deepspeed.enable, lowbit.CommConfig("int8:g32", min_bytes=0)
    engine, other = sharded(tiny_llama(), world), sharded(tiny_llama(), world)
    original, forward = deepspeed.comm.inference_all_reduce, type(engine.module.lm_head).forward
    own, x = Own(), torch.randn(3, 32, generator=torch.Generator().manual_seed(rank))
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x)
    results = {"simulated": lowbit.simulate.all_reduce(parts, "int8:g32", algorithm="one-shot"), "exact": sum(parts)}
    heads = (
        engine.module.lm_head,
        other.module.lm_head,
    )  # also that of a model which is enabled otherwise, or not at all
    with torch.no_grad():
        logits = heads[0](torch.ones(1, 2, 32))
        with enable(engine, config):
            results["off"] = own(x.clone())
        lowbit.telemetry.reset_stats()
        with enable(engine, config, catch_all=True) as handle:
            results["on"], results["group"] = own(x.clone()), own(x.clone(), group=dist.group.WORLD)
            maximum = own(x.clone(), op=deepspeed.comm.ReduceOp.MAX)
            integers, scalar = own(torch.ones(3, dtype=torch.int64)), own(torch.tensor(1.0))
            engine(tokens())
            assert all(head(torch.ones(1, 2, 32)).equal(logits) for head in heads)
            results["twice"] = _message(enable, other, config, catch_all=True)
            with torch.enable_grad():
                results["gradient"] = _message(own, (x.clone().requires_grad_() * 1))
        results["sites"], results["paths"] = handle.sites, paths()
        assert deepspeed.comm.inference_all_reduce is original and type(heads[0]).forward is forward
        with enable(torch.nn.Linear(2, 2), config, catch_all=True):  # without a layer of DeepSpeed
            own(x.clone())
    assert maximum.equal(torch.stack(parts).amax(0))
    assert integers.tolist() == [world] * 3 and scalar == world
    results["unselected"] = _message(enable, engine, lowbit.CommConfig("int8:g32", sites=("mtp.*",)), catch_all=True)
    assert deepspeed.comm.inference_all_reduce is original
    return results


def test_sums_without_a_class():
    first, second = run_ranks(2, caught)
    layers = [f"layers.{layer}.{part}" for layer in range(2) for part in ("attention", "mlp")]
    assert first["off"].equal(first["exact"])
    for name in ("on", "group"):
        assert first[name].equal(first["simulated"]) and second[name].equal(first["simulated"])
    assert first["sites"] == [*layers, "catch_all"]
    assert first["paths"] == {site: {"one-shot": 1} for site in layers} | {"catch_all": {"one-shot": 2}}
    assert "the catch-all is enabled already" in first["twice"]
    assert "torch.no_grad()" in first["gradient"]
    assert "selects none of this model's sites: layers.0.attention, " in first["unselected"]
