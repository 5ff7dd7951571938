"""inference_optimized layers: Megatron's own, over stand-ins of Transformer Engine and of NVLS, which cannot run here.

The stand-in of symmetric memory is an ordinary tensor and one of torch.distributed's collectives; it answers the calls
of 0.16's and of newer releases' tensor_parallel/inference_layers.py, as where NVLS works and as where it does not.
"""

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import megatron_lowbit as lowbit
from tests.patches.megatron import te_stand_in
from tests.ranks import run_ranks

HIDDEN, SPEC = 64, "int5:g32/int6:g32"
SITES = ["layers.0.attention", "layers.0.attention.gather", "layers.0.mlp", "layers.0.mlp.gather"]
CORE = Path(find_spec("megatron.core").origin).parent  # looked at instead of imported, which takes seconds
pytestmark = pytest.mark.skipif(
    not (CORE / "tensor_parallel" / "inference_layers.py").is_file(), reason="before 0.16 there are no such layers"
)
nvls: list[str] = []  # what symmetric memory was used for


def _init():
    te_stand_in.install()
    from megatron.core import parallel_state, tensor_parallel

    from megatron_lowbit.patches import megatron_cpu

    megatron_cpu.enable()
    parallel_state.initialize_model_parallel(2, create_gloo_process_groups=False)
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)


def _symmetric_memory(available):
    """What is asked of CUDA and of symmetric memory."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel import inference_layers

    def maybe_get_tensor(shape, dtype):
        return {"tensor": torch.empty(shape, dtype=dtype), "handle": dist.group.WORLD if available else None}

    def multimem_all_gather(out, x, group, **_):
        nvls.append("all-gather")
        dist.all_gather_into_tensor(out, x, group=group)

    def multimem_reduce_scatter(out, x, group):
        nvls.append("reduce-scatter")
        dist.reduce_scatter_tensor(out, x, group=group)

    torch.cuda.get_device_properties = lambda device: SimpleNamespace(major=9)
    buffer = SimpleNamespace(maybe_get_tensor=maybe_get_tensor)
    vars(inference_layers).update(
        multimem_all_gather=multimem_all_gather,
        multimem_reduce_scatter=multimem_reduce_scatter,
        get_global_symmetric_memory_buffer=lambda: buffer,  # 0.16
        SymmetricMemoryManager=SimpleNamespace(get_buffer=lambda name, process_group: buffer),  # from 0.17 on
        are_tensors_nvls_eligible=lambda *tensors: available,
    )


def _layer(**options):
    import torch.distributed as dist
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_inference_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.spec_utils import build_module

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=128,
        num_attention_heads=4,
        normalization="RMSNorm",
        transformer_impl="inference_optimized",
        sequence_parallel=True,
        add_bias_linear=False,
        tensor_model_parallel_size=2,
        params_dtype=torch.bfloat16,
        bf16=True,
        use_cpu_initialization=True,
        attention_backend=AttnBackend.local,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        **options,
    )
    spec = get_gpt_layer_with_inference_spec()
    spec.submodules.self_attention.submodules.core_attention = DotProductAttention
    layer = build_module(spec, config=config, layer_number=1).eval()
    for index, parameter in enumerate(layer.parameters()):
        generator = torch.Generator().manual_seed(100 * index + (dist.get_rank() if parameter.ndim > 1 else 0))
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.2).to(torch.bfloat16)
    return layer


def _run(layer, x):
    return layer(x, attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool).triu(1))[0]


def _simulated(layer, x):
    """The layers' own methods, sending by gathering everything exactly and simulating all ranks."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel import inference_layers

    def everywhere(x):
        parts = [torch.empty_like(x) for _ in range(2)]
        dist.all_gather(parts, x.contiguous())
        return parts

    row, column = inference_layers.InferenceRowParallelLinear, inference_layers.InferenceLayerNormColumnParallelLinear
    originals = row._matmul_reduce_scatter, column._all_gather
    row._matmul_reduce_scatter = lambda self, x: lowbit.simulate.reduce_scatter(
        everywhere(torch.matmul(x, self.weight.t())), SPEC
    )[dist.get_rank()]
    column._all_gather = lambda self, x, buffer: lowbit.simulate.all_gather(everywhere(x), SPEC)
    try:
        return _run(layer, x)
    finally:
        row._matmul_reduce_scatter, column._all_gather = originals


@torch.no_grad()
def _everything(rank, world):
    _init()
    from megatron.core.tensor_parallel.inference_layers import InferenceRowParallelLinear

    from megatron_lowbit.patches import megatron_core

    original, results = InferenceRowParallelLinear.forward, {}
    x = torch.randn(6, 2, HIDDEN, generator=torch.Generator().manual_seed(0))[rank * 3 :][:3].to(torch.bfloat16)
    for available in (True, False):
        _symmetric_memory(available)
        layer = _layer()
        sent, found = [], {}
        for name, sites in (("none", ()), ("all", None), ("mlp", ("*.mlp",))):
            nvls.clear()
            te_stand_in.sent.clear()
            lowbit.reset_stats()
            if name == "none":
                found[name] = _run(layer, x)
            else:
                with megatron_core.enable(lowbit.CommConfig(SPEC, sites=sites), layer) as handle:
                    found[name] = _run(layer, x)
                found[f"{name} sites"] = sorted(handle.sites)
            found[f"{name} stats"] = {site: [each["paths"], each["fallbacks"]] for site, each in lowbit.stats().items()}
            sent.append([*nvls, *(f"TE {collective}" for collective, _ in te_stand_in.sent)])
        results[f"NVLS {available}"] = [found, sent, _simulated(layer, x), _run(layer, x)]
    with megatron_core.enable(lowbit.CommConfig(SPEC)):
        results["process-wide"] = _run(_layer(), x)
    results["restored"] = InferenceRowParallelLinear.forward is original
    fused = _layer(inference_fuse_tp_communication=True)
    try:
        megatron_core.enable(lowbit.CommConfig(SPEC), fused)
    except lowbit.ModelError as error:
        results["refused"] = str(error)
    return results


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(2, _everything, timeout=200)


@pytest.mark.parametrize("available", [True, False])
def test_messages_are_compressed_instead_of_sent_by_nvls_or_transformer_engine(two_ranks, available):
    for rank in two_ranks:
        found, (exactly, compressed, _), simulated, after = rank[f"NVLS {available}"]
        assert exactly == [("" if available else "TE ") + each for each in ("all-gather", "reduce-scatter")] * 2
        assert compressed == []
        assert torch.equal(found["all"], simulated) and torch.equal(found["none"], after)
        error = (found["all"] - after).float().norm()
        assert 0 < error < 0.2 * after.float().norm()
        assert found["all sites"] == SITES == sorted(found["all stats"]) and found["none stats"] == {}
        for site, counted in found["all stats"].items():
            assert counted == [{"all-gather" if site.endswith("gather") else "reduce-scatter": 1}, {}]


def test_unselected_sites_are_exact_and_counted(two_ranks):
    for rank in two_ranks:
        for site, counted in rank["NVLS True"][0]["mlp stats"].items():
            selected = site == "layers.0.mlp"
            assert counted == ([{"reduce-scatter": 1}, {}] if selected else [{"exact": 1}, {"site not selected": 1}])


def test_the_process_wide_route_and_what_it_leaves(two_ranks):
    for rank in two_ranks:
        assert torch.equal(rank["process-wide"], rank["NVLS False"][0]["all"]) and rank["restored"]


def test_the_fused_kernel_is_refused(two_ranks):
    for rank in two_ranks:
        assert "whose reduce-scatter is one kernel with the norm" in rank["refused"]
        assert "--inference-fuse-tp-communication" in rank["refused"]
