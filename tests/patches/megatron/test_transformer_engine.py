"""Transformer Engine's layers: Megatron's own classes over a stand-in of TE, which cannot run here."""

import pytest
import torch

import megatron_lowbit as lowbit
from tests.patches.megatron import te_stand_in
from tests.ranks import run_ranks

HIDDEN, SPEC = 64, "int5:g32/int6:g32"
ATTENTION, MLP = "layers.0.attention", "layers.0.mlp"


def _init():
    te_stand_in.install()
    from megatron.core import parallel_state, tensor_parallel

    from megatron_lowbit.patches import megatron_cpu

    megatron_cpu.enable()
    parallel_state.initialize_model_parallel(2, create_gloo_process_groups=False)
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)


def _config(**options):
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnBackend

    return TransformerConfig(
        **{
            "num_layers": 1,
            "hidden_size": HIDDEN,
            "ffn_hidden_size": 128,
            "num_attention_heads": 4,
            "normalization": "RMSNorm",
            "tensor_model_parallel_size": 2,
            "use_cpu_initialization": True,
            "attention_backend": AttnBackend.local,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "bias_dropout_fusion": False,
            **options,
        }
    )


def _randomize(module):
    import torch.distributed as dist

    for index, (_, parameter) in enumerate(module.named_parameters()):
        shared = parameter.ndim == 1 and parameter.shape[0] == HIDDEN  # norms, and biases behind reduces
        generator = torch.Generator().manual_seed(100 * index + (0 if shared else dist.get_rank()))
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def _layer(columns=False, **options):
    """A TransformerLayer of TE's spec; columns: with a norm of its own before the MLP, which then gathers by itself."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.spec_utils import build_module

    spec = get_gpt_layer_with_transformer_engine_spec()
    spec.submodules.self_attention.submodules.core_attention = DotProductAttention
    if columns:
        spec.submodules.pre_mlp_layernorm = TENorm
        spec.submodules.mlp.submodules.linear_fc1 = TEColumnParallelLinear
    return _randomize(build_module(spec, config=_config(**options), layer_number=1).eval())


def _run(layer, x):
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).triu(1)
    return layer(x, attention_mask=mask)[0]


class _Simulated:
    """TE's collectives, done by gathering everything exactly and simulating all ranks."""

    def __enter__(self):
        import torch.distributed as dist

        def of(simulate):
            def collective(x, group):
                parts = [torch.empty_like(x) for _ in range(group.size())]
                dist.all_gather(parts, x.contiguous(), group=group)
                return simulate(parts)

            return collective

        self.originals = {name: getattr(te_stand_in, name) for name in ("_reduce", "_scatter", "_gather")}
        te_stand_in._reduce = of(lambda parts: lowbit.simulate.all_reduce(parts, SPEC))
        te_stand_in._scatter = of(lambda parts: lowbit.simulate.reduce_scatter(parts, SPEC)[dist.get_rank()])
        te_stand_in._gather = of(lambda parts: lowbit.simulate.all_gather(parts, SPEC))

    def __exit__(self, *_):
        for name, original in self.originals.items():
            setattr(te_stand_in, name, original)


def _compare(layer, x, run=_run):
    from megatron_lowbit.patches import megatron_core

    exact = run(layer, x)
    with _Simulated():
        simulated = run(layer, x)
    lowbit.reset_stats()
    with megatron_core.enable(lowbit.CommConfig(SPEC, algorithm="two-step"), layer) as handle:
        te_stand_in.sent.clear()
        compressed = run(layer, x)
        sent = [name for name, _ in te_stand_in.sent]
    stats = {site: [each["paths"], each["fallbacks"]] for site, each in lowbit.stats().items()}
    return {
        "outputs": [exact, compressed, simulated, run(layer, x)],
        "stats": stats,
        "sent": sent,
        "sites": handle.sites,
    }


CASES = {
    "all-reduce": {},
    "without bias": {"add_bias_linear": False},
    "sequence-parallel": {"sequence_parallel": True},
    "sequence-parallel, columns": {"sequence_parallel": True, "columns": True},
}


def _everything(rank, world):
    _init()
    from megatron.core.extensions.transformer_engine import TERowParallelLinear

    from megatron_lowbit.patches import megatron_core

    results = {}
    with torch.no_grad():
        for name, options in CASES.items():
            rows = 3 if "sequence_parallel" in options else 6
            x = torch.randn(6, 2, HIDDEN, generator=torch.Generator().manual_seed(0))
            results[name] = _compare(_layer(**options), x[rank * rows :][:rows] if rows == 3 else x)
        with megatron_core.enable(lowbit.CommConfig(SPEC, algorithm="two-step")) as handle:
            lowbit.reset_stats()
            results["process-wide"] = [_run(_layer(), x), handle.sites, sorted(lowbit.stats())]
        results["restored"] = "forward" not in vars(TERowParallelLinear)
        results["refused"] = _refused()
        results["experts"] = _experts_are_left_alone(x)
    results["linear"] = {
        f"{kind}, bias {bias}, skipped {skip}, sequence-parallel {sp}": _linear(rank, kind, bias, skip, sp)
        for kind in ("row", "column")
        for bias, skip in ((True, False), (True, True), (False, False))
        for sp in (False, True)
        if kind == "row" or sp
    }
    return results


def _linear(rank, kind, bias, skip, sequence_parallel):
    """One layer alone: its output, its bias and its gradients, exact, compressed and simulated."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    from megatron_lowbit.patches import megatron_core

    kinds = {
        "row": (TERowParallelLinear, "input_is_parallel", True),
        "column": (TEColumnParallelLinear, "gather_output", False),
    }
    cls, name, value = kinds[kind]
    layer = _randomize(
        cls(
            HIDDEN,
            HIDDEN,
            config=_config(sequence_parallel=sequence_parallel),
            init_method=torch.nn.init.zeros_,
            bias=bias,
            skip_bias_add=skip,
            is_expert=False,
            **{name: value},
        )
    )
    width = HIDDEN // 2 if kind == "row" else HIDDEN
    x = torch.randn(4, 2, width, generator=torch.Generator().manual_seed(rank))

    def run():
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        out, skipped = layer(inputs)
        assert (skipped is not None) == skip
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(10 + rank * sequence_parallel)))
        return out.detach(), inputs.grad, [p.grad.clone() for p in layer.parameters() if p.grad is not None]

    exact = run()
    with torch.no_grad(), _Simulated():
        simulated, _ = layer(x)
    lowbit.reset_stats()
    with megatron_core.enable(lowbit.CommConfig(SPEC, algorithm="two-step"), layer):
        compressed = run()
    paths = [path for site in lowbit.stats().values() for path in site["paths"]]
    return [*map(list, (exact, compressed)), simulated, paths]


def _refused():
    """What is said of layers that communicate where this patch cannot reach; unselected, they are left alone."""
    from megatron_lowbit.patches import megatron_core

    messages = []
    config = lowbit.CommConfig(SPEC)

    def refuse(layer):
        try:
            megatron_core.enable(config, layer).disable()
        except lowbit.ModelError as error:
            messages.append(str(error))
        else:
            messages.append("no error")
        with megatron_core.enable(lowbit.CommConfig(SPEC, sites=("*.attention",)), layer):
            pass

    layer = _layer(sequence_parallel=True)
    layer.mlp.linear_fc2.ub_overlap_rs_fprop = True
    refuse(layer)
    layer = _layer()
    layer.mlp.linear_fc2.symmetric_ar_type = "two_shot"
    refuse(layer)
    layer = _layer()
    layer.mlp.linear_fc2.forward = layer.mlp.linear_fc2.forward
    refuse(layer)
    layer = _layer()
    layer.mlp.__class__ = type("TEFusedMLP", (type(layer.mlp),), {})
    refuse(layer)
    layer = _layer()
    with megatron_core.enable(config, layer):
        layer.mlp.linear_fc2.symmetric_ar_type = "two_shot"  # Megatron's controller sets it between steps
        try:
            layer.mlp(torch.zeros(6, 2, HIDDEN))
        except lowbit.ModelError as error:
            messages.append(str(error))
    return messages


def _experts_are_left_alone(x):
    """Layers that were told not to communicate, as experts are, and shared experts beside a dispatcher."""
    from megatron_lowbit.patches import megatron_core

    layer = _layer()
    layer.mlp.linear_fc2.parallel_mode = None
    lowbit.reset_stats()
    with megatron_core.enable(lowbit.CommConfig(SPEC), layer) as handle:
        _run(layer, x)
    return [handle.sites, sorted(lowbit.stats())]


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(2, _everything, timeout=200)


@pytest.mark.parametrize("name", CASES)
def test_reduces_leave_transformer_engine(two_ranks, name):
    fused = [{"exact": 1}, {"gathered within Transformer Engine": 1}]
    expected = {ATTENTION: [{"two-step": 1}, {}], MLP: [{"two-step": 1}, {}]}
    if "sequence" in name:
        expected = {site: [{"reduce-scatter": 1}, {}] for site in (ATTENTION, MLP)}
        expected[f"{ATTENTION}.gather"] = fused
        expected[f"{MLP}.gather"] = [{"all-gather": 1}, {}] if "columns" in name else fused
    for rank in two_ranks:
        exact, compressed, simulated, after = rank[name]["outputs"]
        assert torch.equal(compressed, simulated) and torch.equal(after, exact)
        assert 0 < (compressed - exact).norm() < 0.2 * exact.norm()
        assert rank[name]["stats"] == expected and sorted(rank[name]["sites"]) == sorted(expected)
        assert rank[name]["sent"] == ["all-gather"] * sum(each == fused for each in expected.values())


def test_the_process_wide_route_and_what_it_leaves(two_ranks):
    for rank in two_ranks:
        out, sites, counted = rank["process-wide"]
        assert torch.equal(out, rank["all-reduce"]["outputs"][1])
        assert sorted(sites) == counted == [ATTENTION, MLP]
        assert rank["restored"]


def test_biases_and_gradients(two_ranks):
    for rank in two_ranks:
        assert len(rank["linear"]) == 9
        for name, (exact, compressed, simulated, paths) in rank["linear"].items():
            assert torch.equal(compressed[0], simulated) and not torch.equal(exact[0], compressed[0])
            assert paths == [
                "all-gather" if "column" in name else "reduce-scatter" if name.endswith("True") else "two-step"
            ]
            assert torch.equal(exact[1], compressed[1])
            assert len(exact[2]) == len(compressed[2]) > 0
            for a, b in zip(exact[2], compressed[2], strict=True):
                # A column's weight is multiplied by what was received, and so is its gradient.
                assert torch.equal(a, b) or ("column" in name and (a - b).norm() < 0.05 * a.norm())


def test_what_transformer_engine_keeps_to_itself_is_refused(two_ranks):
    parts = [
        "--tp-comm-overlap",
        "--symmetric-ar-type",
        "prepare_model_for_fp8_inference",
        "is a TEFusedMLP, which",
        "--symmetric-ar-type",
    ]
    for rank in two_ranks:
        for message, part in zip(rank["refused"], parts, strict=True):
            assert message.startswith(MLP) and part in message, message


def test_layers_that_were_told_to_be_silent_stay_so(two_ranks):
    for rank in two_ranks:
        assert rank["experts"] == [[ATTENTION], [ATTENTION]]
