"""MoE layers for tests, and what their messages should become.

The reference replaces the collectives of Megatron's own modules: every rank gathers the exact tensors of all ranks and
simulates them. Which of the tensors are hidden states it decides by width, in layers where nothing else is as wide.
"""

from contextlib import contextmanager

import torch

import megatron_lowbit as lowbit

HIDDEN, SPEC = 64, "int5:g32/int6:g32"


def init_parallel(tp, ep, etp):
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    from megatron_lowbit.patches import megatron_cpu

    megatron_cpu.enable()
    vars(moe_utils).setdefault("te_general_gemm", None)  # 0.16.1 forgets to define it where TE is missing
    if (move := token_dispatcher.maybe_move_tensor_to_cpu).__module__ == moe_utils.__name__:  # leaves CPU tensors alone
        token_dispatcher.maybe_move_tensor_to_cpu = lambda x, as_numpy=False, record_stream=False: (
            x.numpy() if as_numpy and isinstance(x, torch.Tensor) else move(x, as_numpy, record_stream)
        )
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp, create_gloo_process_groups=False
    )
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)


def gather_unevenly():
    """gloo's all_gather and reduce_scatter want equal parts, NCCL's and Megatron do not."""
    import torch.distributed as dist

    def parts_of(x, group):
        parts = [None] * group.size()
        dist.all_gather_object(parts, x, group=group)
        return parts

    def all_gather(outputs, x, group=None):
        for output, part in zip(outputs, parts_of(x, group), strict=True):
            output.copy_(part)

    def reduce_scatter(output, inputs, group=None):
        output.copy_(torch.stack([parts[group.rank()] for parts in parts_of(inputs, group)]).sum(0))

    dist.all_gather, dist.reduce_scatter = all_gather, reduce_scatter


def build_layer(tp=1, ep=2, etp=1, experts=4, hidden=HIDDEN, **options):
    """A TransformerLayer without norms; its MoE layer's weights depend on their names and this rank's shard."""
    import torch.distributed as dist
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.spec_utils import build_module

    if "moe_shared_expert_gate" not in vars(TransformerConfig):  # before 0.16 it is an option of specs
        options.pop("moe_shared_expert_gate", None)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        ffn_hidden_size=32,
        moe_ffn_hidden_size=32,
        num_attention_heads=4,
        add_bias_linear=False,
        num_moe_experts=experts,
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        use_cpu_initialization=True,
        attention_backend=AttnBackend.local,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **{"moe_router_topk": 2, "moe_router_load_balancing_type": "none", **options},
    )
    spec = get_gpt_layer_local_spec(num_experts=experts, moe_grouped_gemm=False)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = IdentityOp
    layer = build_module(spec, config=config, layer_number=1).eval()
    for index, (name, parameter) in enumerate(layer.named_parameters()):
        shared = "router" in name or "gate_weight" in name
        generator = torch.Generator().manual_seed(100 * index + (0 if shared else dist.get_rank()))
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return layer


def tokens(rows, seed, batch=2, hidden=HIDDEN):
    return torch.randn(rows, batch, hidden, generator=torch.Generator().manual_seed(seed))


@contextmanager
def simulated():
    """Megatron's own collectives on hidden states, done by gathering everything exactly and simulating all ranks."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import shared_experts, token_dispatcher

    def everywhere(thing, group):
        things = [None] * group.size()
        dist.all_gather_object(things, thing, group=group)
        return things

    def of_tp(group):
        return group if group is not None else parallel_state.get_tensor_model_parallel_group()

    def wide(x):
        return x.dim() >= 2 and x.shape[-1] == HIDDEN and x.is_floating_point()

    def all_to_all(group, x, outputs=None, inputs=None, **rest):
        if not wide(x) or group.size() == 1:
            return originals["all_to_all"](group, x, outputs, inputs, **rest)
        splits = [None if s is None else [int(n) for n in s] for s in everywhere(inputs, group)]
        return lowbit.simulate.all_to_all(everywhere(x, group), SPEC, splits)[group.rank()]

    def gather(x, group=None, output_split_sizes=None, **rest):
        group = of_tp(group)
        if not wide(x) or group.size() == 1:
            return originals[GATHER](x, group=group, output_split_sizes=output_split_sizes, **rest)
        codec = lowbit.codec(SPEC.partition("/")[2])
        return torch.cat([codec.decode(codec.encode(part), part.shape, part.dtype) for part in everywhere(x, group)])

    def reduce_scatter(x, group=None, input_split_sizes=None, **rest):
        group = of_tp(group)
        if group.size() == 1:
            return x
        assert wide(x)
        world = group.size()
        splits = input_split_sizes or [len(x) // world] * world
        mine = [part.split(splits)[group.rank()].float() for part in everywhere(x, group)]
        # As if this rank's rows were everybody's: so pieces need not be equal.
        return lowbit.simulate.reduce_scatter([torch.cat([m] * world) for m in mine], SPEC)[group.rank()].to(x.dtype)

    def reduce(x, group=None):
        group = of_tp(group)
        return lowbit.simulate.all_reduce(everywhere(x, group), SPEC, "two-step") if group.size() > 1 else x

    GATHER = "gather_from_sequence_parallel_region"
    replaced = {
        "all_to_all": all_to_all,
        GATHER: gather,
        "reduce_scatter_to_sequence_parallel_region": reduce_scatter,
        "reduce_from_tensor_model_parallel_region": reduce,
    }
    found = [(m, n) for m in (token_dispatcher, shared_experts) for n in replaced if hasattr(m, n)]
    originals = {name: getattr(module, name) for module, name in found}
    for module, name in found:
        setattr(module, name, replaced[name])
    try:
        yield
    finally:
        for module, name in found:
            setattr(module, name, originals[name])


def without_router(layer, x):
    """The router can do nothing with no tokens; here token n goes to experts n and n + 1."""
    import torch.nn.functional as F

    numbers = torch.arange(x.shape[0] * x.shape[1])
    routes = (F.one_hot(numbers % 4, 4) + F.one_hot((numbers + 1) % 4, 4)).bool()
    layer.mlp.router.forward = lambda hidden, *args: (routes * 0.5, routes)
    return layer.mlp(x)[0]


def _forward(layer, x):
    return layer.mlp(x)[0]


def compare(layer, x, run=_forward):
    """Exact, compressed and simulated output of the MoE layer, and what was counted."""
    from megatron_lowbit.patches import megatron_core

    exact = run(layer, x)
    with simulated():
        expected = run(layer, x)
    lowbit.reset_stats()
    with megatron_core.enable(lowbit.CommConfig(SPEC, algorithm="two-step"), layer) as handle:
        compressed = run(layer, x)
    stats = lowbit.stats()
    return {
        "outputs": [exact, compressed, expected, run(layer, x)],
        "sites": sorted(handle.sites),
        "stats": {site: [s["paths"], s["values"], s["fallbacks"]] for site, s in stats.items()},
    }
