"""Mixture of experts: which messages of dispatchers and shared experts are compressed, to what, and what is exact."""

from contextlib import contextmanager

import pytest
import torch

import megatron_lowbit as lowbit
from tests.calibrations import random_calibration
from tests.patches.megatron.moe_layers import (
    HIDDEN,
    SPEC,
    build_layer,
    compare,
    gather_unevenly,
    init_parallel,
    tokens,
    without_router,
)
from tests.ranks import run_ranks

DISPATCH, COMBINE, SHARED = "layers.0.moe.dispatch", "layers.0.moe.combine", "layers.0.moe.shared_experts"
ALLTOALL, ALLGATHER = {"moe_token_dispatcher_type": "alltoall"}, {"moe_token_dispatcher_type": "allgather"}
WITH_SHARED = {"moe_shared_expert_intermediate_size": 32, "moe_shared_expert_gate": True}
OVERLAP = {**WITH_SHARED, "moe_shared_expert_overlap": True}
PADDED = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
EP2 = {
    "allgather": ALLGATHER,
    "alltoall": ALLTOALL,
    "alltoall, router in fp64": ALLTOALL | {"moe_router_dtype": "fp64"},
    "allgather, router in fp64": ALLGATHER | {"moe_router_dtype": "fp64"},
    "alltoall, padded to capacity": ALLTOALL | PADDED,
}
SP = {"tp": 2, "ep": 1, "etp": 2, "sequence_parallel": True}
TP2 = {
    "allgather": ALLGATHER | SP,
    "alltoall, some tokens dropped": ALLTOALL | SP | {"moe_expert_capacity_factor": 0.75},  # ranks keep unequal numbers
    "alltoall, padded to capacity": ALLTOALL | SP | PADDED,
    "shared experts": ALLTOALL | SP | WITH_SHARED | {"sequence_parallel": False},
    "shared experts, overlap": ALLTOALL | SP | OVERLAP | {"sequence_parallel": False},
    "shared experts, overlap, sequence-parallel": ALLTOALL | SP | OVERLAP,
}


def _two_ranks(rank, world):
    with torch.no_grad():
        init_parallel(tp=1, ep=2, etp=1)
        x = tokens(5, seed=rank)
        results = {f"EP2 {name}": compare(build_layer(**options), x) for name, options in EP2.items()}
        layer = build_layer(**ALLTOALL, moe_router_topk=1, moe_router_pre_softmax=True)
        layer.mlp.router.weight.data.zero_()[0] = 1.0
        results["EP2 one expert has all"] = compare(layer, x.abs())
        results["EP2 a rank without tokens"] = compare(
            build_layer(**ALLTOALL), tokens(5 * rank, seed=rank), without_router
        )
        results["EP2 nobody has tokens"] = compare(build_layer(**ALLTOALL), x[:0], without_router)
        results["untouched"] = [_untouched(build_layer(**options), x) for options in (ALLGATHER, ALLTOALL)]
        results["wide"] = _as_many_experts_as_features(x)
        results["routes"] = _routes(x)
        results["refused"] = _refused(x)
        init_parallel(tp=2, ep=1, etp=2)
        gather_unevenly()
        for name, options in TP2.items():
            x = tokens(6, seed=rank * options["sequence_parallel"] if "sequence_parallel" in options else 0)
            results[f"TP2 {name}"] = compare(build_layer(**options), x)
    results["training"] = _training(rank)
    return results


@contextmanager
def _recorded(messages, names=None):
    """Record what Megatron's own collectives carry, before and after; bytes are what this package sends."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel import mappings

    def recording(base, name):
        def collective(out, *args, **kwargs):
            given = [x.clone() for x in (out, *args) if isinstance(x, torch.Tensor)]
            done = base(out, *args, **kwargs)
            if out.dtype is not torch.uint8:
                messages.append([*given[1:], out.clone()])
                if names is not None:
                    names.append(f"{name} {out.dtype}")
            return done

        return collective

    found = [(dist, "all_reduce"), (dist, "all_to_all_single"), (mappings, "dist_all_gather_func")]
    originals = [getattr(owner, name) for owner, name in found]
    for (owner, name), original in zip(found, originals, strict=True):
        setattr(owner, name, recording(original, name))
    try:
        yield
    finally:
        for (owner, name), original in zip(found, originals, strict=True):
            setattr(owner, name, original)


def _untouched(layer, x):
    """Whether what is no hidden state makes the same messages, by Megatron itself, while others are compressed."""
    from megatron_lowbit.patches import megatron_core

    exact, compressed = [], []
    with _recorded(exact):
        layer.mlp(x)
    with megatron_core.enable(lowbit.CommConfig(SPEC), layer):
        layer.mlp(x)  # communicators are made
        with _recorded(compressed):
            layer.mlp(x)
    kept = [message for message in exact if message[-1].shape[-1:] != (HIDDEN,)]
    assert len(kept) < len(exact) and {m[-1].dtype for m in kept} >= {torch.float32}
    assert any(not m[-1].is_floating_point() for m in kept)
    return len(kept) == len(compressed) and all(
        torch.equal(a, b) for one, other in zip(kept, compressed) for a, b in zip(one, other, strict=True)
    )


def _as_many_experts_as_features(x):
    """Probabilities [tokens, experts] are gathered beside hidden states [tokens, features] of the same shape."""
    from megatron.core.transformer.moe import token_dispatcher

    from megatron_lowbit.patches import megatron_core

    layer, gathered = build_layer(experts=HIDDEN, **ALLGATHER), []
    permute = token_dispatcher.permute
    token_dispatcher.permute = lambda hidden, *args, **kwargs: (
        gathered.append(hidden.clone()) or permute(hidden, *args, **kwargs)
    )
    try:
        layer.mlp(x)
        probs = layer.mlp.token_dispatcher.local_probs
        lowbit.reset_stats()
        with megatron_core.enable(lowbit.CommConfig(SPEC), layer):
            layer.mlp(x)
    finally:
        token_dispatcher.permute = permute
    hidden, compressed = gathered
    same = torch.equal(probs, layer.mlp.token_dispatcher.local_probs)
    return same and not torch.equal(hidden, compressed) and lowbit.stats()[DISPATCH]["calls"] == 1


def _routes(x):
    """The process-wide route, for layers built under it and earlier, and sites that are not selected."""
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from megatron_lowbit.patches import megatron_core

    dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher
    watched = [
        (MoELayer, "forward"),
        (token_dispatcher, "all_to_all"),
        *((dispatcher, name) for name in vars(dispatcher)),
    ]
    before = [getattr(*each) for each in watched]
    earlier, config = build_layer(**ALLTOALL), lowbit.CommConfig(SPEC)
    with megatron_core.enable(config, earlier):
        expected = earlier.mlp(x)[0]
    results = {}
    for name, patterns in (("all", None), ("combine only", ("*.combine",))):
        lowbit.reset_stats()
        earlier = build_layer(**ALLTOALL)
        with megatron_core.enable(lowbit.CommConfig(SPEC, sites=patterns)):
            built = build_layer(**ALLTOALL)
            outputs = [built.mlp(x)[0], earlier.mlp(x)[0]]
        results[name] = [*outputs, {site: stats["paths"] for site, stats in lowbit.stats().items()}]
    known = random_calibration(["layers.0.attention"], 4, HIDDEN, "1/8")  # of 4 ranks, where experts have 2
    config = lowbit.CommConfig("selective4:outliers=1/8", calibration=known, sites=("*.attention",))
    lowbit.reset_stats()
    with megatron_core.enable(config, earlier):
        out = earlier.mlp(x)[0]
    fallbacks = {site: stats["fallbacks"] for site, stats in lowbit.stats().items()}
    results["calibrated"] = [torch.equal(out, earlier.mlp(x)[0]), fallbacks]
    results["expected"] = expected
    results["restored"] = all(getattr(*each) is original for each, original in zip(watched, before, strict=True))
    return results


def _refused(x):
    """Dispatchers that communicate elsewhere: at enable, in a forward if they came later, not if unselected."""
    from megatron.core.transformer.moe import token_dispatcher

    from megatron_lowbit.patches import megatron_core

    messages, layer = [], build_layer(**ALLGATHER)
    mine = layer.mlp.token_dispatcher
    flex = object.__new__(token_dispatcher.MoEFlexTokenDispatcher)  # its __init__ wants DeepEP
    flex.tp_size, flex.ep_size = 1, 2
    derived = type("NVLSAllGatherVDispatcher", (type(mine),), {"token_dispatch": lambda self, *args: args})
    derived.__module__ = "megatron.core.transformer.moe.token_dispatcher_inference"
    swapped = object.__new__(derived)
    swapped.__dict__.update(mine.__dict__)
    for other in (flex, swapped):
        layer.mlp.token_dispatcher = other
        try:
            megatron_core.enable(lowbit.CommConfig(SPEC), layer)
        except lowbit.ModelError as error:
            messages.append(str(error))
        with megatron_core.enable(lowbit.CommConfig(SPEC, sites=("*.attention",)), layer) as handle:
            assert handle.sites == ["layers.0.attention"]
        layer.mlp.token_dispatcher = mine
        with megatron_core.enable(lowbit.CommConfig(SPEC), layer):
            layer.mlp.token_dispatcher = other
            try:
                layer.mlp(x)
            except lowbit.ModelError as error:
                messages.append(str(error))
        layer.mlp.token_dispatcher = mine
    layer = build_layer(**ALLTOALL, **WITH_SHARED)
    layer.mlp.shared_experts.__class__ = type("FusedSharedExpertMLP", (type(layer.mlp.shared_experts),), {})
    try:
        megatron_core.enable(lowbit.CommConfig(SPEC), layer)
    except lowbit.ModelError as error:
        messages.append(str(error))
    return messages


def _training(rank):
    """Gradients where compression is last, so that what is multiplied is the same; the router's counts are reduced."""
    from megatron_lowbit.patches import megatron_core

    layer = build_layer(**ALLTOALL, **SP, moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.1).train()
    x, grad = tokens(6, seed=rank), tokens(6, seed=10 + rank)
    found = []
    for config in (None, lowbit.CommConfig(SPEC, sites=("*.combine",))):
        messages, names = [], []
        lowbit.reset_stats()
        handle = megatron_core.enable(config, layer) if config else None
        for _ in range(2):  # communicators are made in the first
            layer.zero_grad()
            inputs = x.clone().requires_grad_()
            messages.clear()
            with _recorded(messages, names):
                out = layer.mlp(inputs)[0]
            out.backward(grad)
        if handle:
            handle.disable()
        counts = [m for m in messages if not m[-1].is_floating_point()]
        gradients = [inputs.grad, *(p.grad.clone() for p in layer.mlp.parameters() if p.grad is not None)]
        found.append([out.detach(), gradients, counts, names])
    return [*found, {site: stats["paths"] for site, stats in lowbit.stats().items()}]


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(2, _two_ranks, timeout=200)


def _check(result, expected):
    """expected: {site: {path: calls}}"""
    exact, compressed, simulated, after = result["outputs"]
    assert torch.equal(compressed, simulated) and torch.equal(after, exact)
    assert {site: paths for site, (paths, _, _) in result["stats"].items()} == expected
    assert not any(fallbacks for _, _, fallbacks in result["stats"].values())
    assert set(expected) <= set(result["sites"])
    if exact.numel():
        assert 0 < (compressed - exact).norm() < 0.2 * exact.norm()


THERE_AND_BACK = {DISPATCH: {"all-to-all": 1}, COMBINE: {"all-to-all": 1}}
GATHERED = {DISPATCH: {"all-gather": 1}, COMBINE: {"reduce-scatter": 1}}


@pytest.mark.parametrize("name", EP2)
def test_expert_parallel_dispatchers_send_hidden_states_compressed(two_ranks, name):
    for rank in two_ranks:
        _check(rank[f"EP2 {name}"], GATHERED if name.startswith("allgather") else THERE_AND_BACK)


@pytest.mark.parametrize("name", ["one expert has all", "a rank without tokens"])
def test_all_to_all_with_uneven_numbers_of_tokens(two_ranks, name):
    for rank in two_ranks:
        _check(rank[f"EP2 {name}"], THERE_AND_BACK)
    sent = [rank["EP2 one expert has all"]["stats"] for rank in two_ranks]
    assert [stats[COMBINE][1] for stats in sent] == [2 * 2 * 5 * HIDDEN, 0]  # rank 1 got nothing, and sends nothing


def test_no_tokens_at_all(two_ranks):
    for rank in two_ranks:
        _check(rank["EP2 nobody has tokens"], THERE_AND_BACK)


@pytest.mark.parametrize("name", TP2)
def test_tensor_parallel_experts_and_shared_experts(two_ranks, name):
    expected = dict(GATHERED)
    if "overlap, seq" in name:
        expected[SHARED] = {"all-gather": 1, "reduce-scatter": 1}
    elif "shared" in name:
        expected[SHARED] = {"two-step": 1}
    for rank in two_ranks:
        if name == "shared experts":  # reduced by an ordinary row-parallel layer, which the reference leaves exact
            stats = {site: paths for site, (paths, _, _) in rank[f"TP2 {name}"]["stats"].items()}
            assert stats == expected
        else:
            _check(rank[f"TP2 {name}"], expected)
    if "sequence" not in name and "shared" in name:  # both ranks hold the same tokens
        assert torch.equal(two_ranks[0][f"TP2 {name}"]["outputs"][1], two_ranks[1][f"TP2 {name}"]["outputs"][1])


def test_counts_maps_and_probabilities_stay_as_they_are(two_ranks):
    for rank in two_ranks:
        assert rank["untouched"] == [True, True] and rank["wide"]


def test_the_process_wide_route(two_ranks):
    for rank in two_ranks:
        routes = rank["routes"]
        built, earlier, paths = routes["all"]
        assert torch.equal(built, routes["expected"]) and torch.equal(earlier, built)
        assert paths == THERE_AND_BACK | {"moe.dispatch": {"all-to-all": 1}, "moe.combine": {"all-to-all": 1}}
        assert routes["combine only"][2] == {
            DISPATCH: {"exact": 1},
            COMBINE: {"all-to-all": 1},
            "moe.dispatch": {"exact": 1},
            "moe.combine": {"all-to-all": 1},
        }
        assert routes["restored"]


def test_a_calibration_of_other_ranks_leaves_unselected_experts_alone(two_ranks):
    for rank in two_ranks:
        same, fallbacks = rank["routes"]["calibrated"]
        assert same and fallbacks == {site: {"site not selected": 1} for site in (DISPATCH, COMBINE)}


def test_what_communicates_elsewhere_is_refused_by_name(two_ranks):
    flex = ("MoEFlexTokenDispatcher", "--moe-token-dispatcher-type alltoall or allgather")
    nvls = ("NVLSAllGatherVDispatcher", "--transformer-impl local")
    for rank in two_ranks:
        *dispatchers, shared = rank["refused"]
        for message, (name, option) in zip(dispatchers, (flex, flex, nvls, nvls), strict=True):
            assert message.startswith(
                f"layers.0.moe has a {name}, which communicates where this patch cannot reach: use {option}, or leave"
            )
        assert shared.startswith(f"{SHARED} is a FusedSharedExpertMLP, which reduces around Transformer Engine")


def test_training_has_exact_gradients_and_counts(two_ranks):
    for rank in two_ranks:
        exact, compressed, paths = rank["training"]
        assert not torch.equal(exact[0], compressed[0])
        assert len(exact[1]) > 4 and exact[2]
        reduced = "all_reduce torch.int64"  # of the tokens that each expert gets
        assert exact[3].count(reduced) == compressed[3].count(reduced) > 0
        (gradients, counts), (others, other_counts) = exact[1:3], compressed[1:3]
        pairs = [*zip(gradients, others, strict=True)]
        for message, other in zip(counts, other_counts, strict=True):
            pairs += zip(message, other, strict=True)
        for a, b in pairs:
            assert torch.equal(a, b)
        assert paths[COMBINE] == {"reduce-scatter": 2} and paths[DISPATCH] == {"exact": 2}


def _four_ranks(rank, world):
    with torch.no_grad():
        init_parallel(tp=2, ep=2, etp=2)
        gather_unevenly()
        options = {"tp": 2, "ep": 2, "etp": 2, "sequence_parallel": True}
        layer = build_layer(**ALLTOALL, **options, **OVERLAP)
        results = [compare(layer, tokens(3 + 2 * (rank // 2), seed=rank))]
        results.append(compare(build_layer(**ALLGATHER, **options), tokens(4, seed=rank)))
    return results


@pytest.mark.slow
def test_tensor_and_expert_parallel_at_once():
    for alltoall, allgather in run_ranks(4, _four_ranks, timeout=200):
        _check(
            alltoall,
            {
                DISPATCH: {"all-to-all": 1, "all-gather": 1},
                COMBINE: {"reduce-scatter": 1, "all-to-all": 1},
                SHARED: {"all-gather": 1, "reduce-scatter": 1},
            },
        )
        _check(allgather, GATHERED)
