"""Kernel injection: DeepSpeed's own layers on real ranks, with its own fallbacks in place of its CUDA kernels."""

import types

import pytest
import torch
from torch import nn

import megatron_lowbit as lowbit
from tests.patches.ds.engines import paths, start
from tests.ranks import run_ranks

HIDDEN, TOKENS = 32, 5
INT8 = {"spec": "int8:g32", "min_bytes": 0}


class Injected(nn.Module):
    """Two layers as DeepSpeed puts them into a model, with weights of this rank."""

    def __init__(self, rank: int, world: int, beside: bool) -> None:
        from deepspeed.inference.engine import InferenceEngine
        from deepspeed.model_implementations.transformers.ds_transformer import DeepSpeedTransformerInference
        from deepspeed.ops.transformer.inference.config import DeepSpeedInferenceConfig
        from deepspeed.ops.transformer.inference.op_binding.base import BaseOp

        super().__init__()
        BaseOp.inference_module = types.SimpleNamespace()  # has no kernel, so every operation takes its fallback
        self.layers = nn.ModuleList()
        for _ in range(2):
            config = DeepSpeedInferenceConfig(
                hidden_size=HIDDEN,
                intermediate_size=64,
                heads=4,
                num_hidden_layers=2,
                dtype=torch.float32,
                mp_size=world,
                mlp_after_attn=not beside,
                return_tuple=False,
            )
            self.layers.append(DeepSpeedTransformerInference(config, InferenceEngine.inference_mp_group))
        for name, parameter in self.named_parameters():
            whole = name.endswith(("norm_w", "norm_b", "nw", "nb", "_ob", "output_b"))
            seed = sum(map(ord, name)) + (0 if whole else 1000 * (1 + rank))
            parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(seed))
        if beside:  # DeepSpeed has no fallback of the MLP's kernel then, but of the one that GPT-J takes
            for layer in self.layers:
                layer.mlp.attn_nw = None

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()  # the layers write into their input
        for layer in self.layers:
            x = layer(x)
        return x


def compressed(rank: int, world: int, beside: bool) -> dict:
    from deepspeed.inference.engine import InferenceEngine

    InferenceEngine.inference_mp_group = start()
    model = Injected(rank, world, beside)
    x = torch.randn(2, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    own, loud = model(x), model(1000 * x)
    before = [(type(module), set(module.__dict__)) for module in model.modules()]
    enable = lowbit.patches.deepspeed.enable
    with enable(model, lowbit.CommConfig("fp32", min_bytes=0)):
        same = model(x)
    lowbit.telemetry.reset_stats()
    with enable(model, lowbit.CommConfig(**INT8)) as handle:
        close, close_loud = model(x), model(1000 * x)
    assert [(type(module), set(module.__dict__)) for module in model.modules()] == before  # layers keep their caches
    torch.testing.assert_close(model(x), own, rtol=0, atol=0)
    loud = [loud, close_loud]
    return {"own": own, "same": same, "close": close, "loud": loud, "sites": handle.sites, "paths": paths()}


@pytest.mark.parametrize("beside", [False, True], ids=["one after the other", "attention beside the MLP"])
def test_sums_of_attention_and_mlp(beside):
    first, second = run_ranks(2, compressed, beside)
    parts = ["mlp"] if beside else ["attention", "mlp"]
    sites = [f"layers.{layer}.{part}" for layer in range(2) for part in parts]
    assert first["sites"] == sites
    assert first["paths"] == {site: {"one-shot": 2} for site in sites}
    torch.testing.assert_close(first["same"], first["own"], rtol=1e-6, atol=1e-6)
    assert first["close"].equal(second["close"])
    assert 0 < (first["close"] - first["own"]).abs().max() < 0.2


def test_the_residual_is_not_quantized():
    """A residual stream a thousand times larger than what layers add to it would be off by far more in 8 bits."""
    exact, close = run_ranks(2, compressed, False)[0]["loud"]
    assert exact.abs().max() > 2000
    assert (exact - close).abs().max() < 0.2


def experts(rank: int, world: int) -> dict:
    from deepspeed.inference.engine import InferenceEngine
    from deepspeed.ops.transformer.inference.moe_inference import DeepSpeedMoEMLP

    InferenceEngine.inference_mp_group = start()
    # What the expert reads of its configuration; DeepSpeed 0.19's layer around it cannot be built (it uses its
    # ep_group before it has one), so the experts stand in a layer of this test's.
    config = types.SimpleNamespace(
        hidden_size=HIDDEN, intermediate_size=64, q_int8=False, epsilon=1e-5, pre_layer_norm=True
    )
    expert = object.__new__(DeepSpeedMoEMLP)
    nn.Module.__init__(expert)
    torch.manual_seed(rank)
    expert.config, expert.mp_group = config, InferenceEngine.inference_mp_group
    expert.inter_w, expert.output_w = nn.Parameter(torch.randn(HIDDEN, 32)), nn.Parameter(torch.randn(32, HIDDEN))
    expert.inter_b, expert.output_b = nn.Parameter(torch.zeros(32)), nn.Parameter(torch.ones(HIDDEN))
    expert.q_scales, expert.q_groups, expert.merge_count, expert.vector_matmul_func = None, 1, 0, None
    expert.gelu_gemm_func = lambda x, w, b, out, *_: torch.relu(x @ w + b) @ out
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Module()])
    model.layers[0].mlp = nn.ModuleList([expert])
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own = expert(x, async_op=False)
        with lowbit.patches.deepspeed.enable(model, lowbit.CommConfig(**INT8)):
            close = expert(x, async_op=True)
    return {"own": own, "close": close, "paths": paths()}


def test_sums_of_experts():
    first, second = run_ranks(2, experts)
    assert first["paths"] == {"layers.0.moe.experts": {"one-shot": 1}}
    assert first["close"].equal(second["close"])
    assert 0 < (first["close"] - first["own"]).abs().max() < 0.5
