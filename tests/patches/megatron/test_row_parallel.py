"""Row-parallel layers inside of what torch does with a forward: running it again for the backward, and compiling it."""

from contextlib import contextmanager

import pytest
import torch

import megatron_lowbit as lowbit
from tests.megatron_models import BATCH, HIDDEN, LENGTH, gpt, settings, start
from tests.ranks import run_ranks

WORLD, SPEC = 2, "int6:g32/int8:g64"
SITE = "layers.0.mlp"


def _mlp(sequence_parallel):
    model = gpt(settings(WORLD, layers=1, sequence_parallel=sequence_parallel))
    return model, model.decoder.layers[0].mlp


@contextmanager
def _without_cuda_states():
    """Megatron's own recomputation saves CUDA's random state, which is not here."""
    from megatron.core.tensor_parallel import random

    names = "_get_cuda_rng_state", "_set_cuda_rng_state"
    saved = [getattr(random, name) for name in names]
    for name in names:
        setattr(random, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for name, function in zip(names, saved, strict=True):
            setattr(random, name, function)


def _recompute(rank, world):
    from megatron.core import tensor_parallel
    from torch.utils.checkpoint import checkpoint

    from megatron_lowbit.patches import megatron_core

    start(world)
    results = {}
    for parallel in (False, True):
        model, mlp = _mlp(parallel)
        generator = torch.Generator().manual_seed(rank if parallel else 0)
        x = torch.randn(LENGTH // (WORLD if parallel else 1), BATCH, HIDDEN, generator=generator).requires_grad_()
        ways = {
            "plain": lambda x, run: run(x),
            "torch": lambda x, run: checkpoint(run, x, use_reentrant=False),
            "torch, reentrant": lambda x, run: checkpoint(run, x, use_reentrant=True),
            "megatron": lambda x, run: tensor_parallel.checkpoint(run, False, x),
        }
        for name, way in ways.items():
            model.zero_grad()
            x.grad = None
            lowbit.reset_stats()
            config = lowbit.CommConfig(SPEC, "two-step", min_bytes=0)
            with megatron_core.enable(config, model), _without_cuda_states():
                out = way(x, lambda x, mlp=mlp: mlp(x)[0])
                out.square().sum().backward()
            gradients = [x.grad, mlp.linear_fc1.weight.grad, mlp.linear_fc2.weight.grad]
            results[f"{name} {parallel}"] = [lowbit.stats(), out.detach(), *(grad.clone() for grad in gradients)]
    return results


def test_recomputing_a_forward_changes_no_gradient():
    for rank in run_ranks(WORLD, _recompute, timeout=200):
        for key, (stats, *tensors) in rank.items():
            path = "reduce-scatter" if key.endswith("True") else "two-step"
            # torch's own way stops a recomputation when it has what the backward needs, which the sum is not.
            assert stats[SITE]["paths"] == {path: 2 if "reentrant" in key or "megatron" in key else 1}, key
            plain = rank[f"plain {key.rpartition(' ')[2]}"][1:]
            assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(tensors, plain, strict=True)), key


@torch.no_grad()
def _compile(rank, world, backend):
    from megatron_lowbit.patches import megatron_core

    start(world)
    results = {}
    for parallel in (False, True):
        model, mlp = _mlp(parallel)
        compiled, pairs = torch.compile(mlp, backend=backend), []
        inputs = [torch.randn(n, BATCH, HIDDEN, generator=torch.Generator().manual_seed(n)) for n in (8, 4, 6, 2)]
        with megatron_core.enable(lowbit.CommConfig(SPEC, "two-step", min_bytes=0), model):
            lowbit.reset_stats()
            for x in inputs:
                pairs.append([compiled(x)[0], mlp(x)[0]])
            results[f"{parallel}"] = [pairs, lowbit.stats()]
        results[f"disabled {parallel}"] = [compiled(inputs[0])[0], mlp(inputs[0])[0]]
        with megatron_core.enable(lowbit.CommConfig(SPEC), model):
            torch._dynamo.reset()  # what was compiled with a break would be taken
            try:
                torch.compile(mlp.linear_fc2, backend=backend, fullgraph=True)(torch.randn(2, 2, 128 // WORLD))
            except Exception as error:
                results[f"whole graph {parallel}"] = type(error).__name__
    return results


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_layer_breaks_its_graph_at_the_reduce(backend):
    for rank in run_ranks(WORLD, _compile, backend, timeout=300):
        for parallel in (False, True):
            pairs, stats = rank[f"{parallel}"]
            # Inductor's own arithmetic may move a value to the next step of the codec.
            assert all((ours - eager).norm() < 0.02 * eager.norm() for ours, eager in pairs)
            assert stats[SITE]["paths"] == {"reduce-scatter" if parallel else "two-step": 2 * len(pairs)}
            assert rank[f"whole graph {parallel}"] == "Unsupported"
            assert torch.allclose(*rank[f"disabled {parallel}"], atol=1e-5)
