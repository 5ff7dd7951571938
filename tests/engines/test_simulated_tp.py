"""Partial sums in one process are those of ranks, and leave the model as it was."""

import pytest
import torch

from megatron_lowbit.engines.hf_model import read_config
from megatron_lowbit.engines.simulated_tp import row_parallel, simulated_tp
from megatron_lowbit.errors import ModelError
from tests.llama import tiny_llama
from tests.models import FAMILIES, random_model

IDS = torch.arange(20)[None] * 7 % 61
SITES = ["layers.0.attention", "layers.0.mlp", "layers.1.attention", "layers.1.mlp"]


def exact(site, partials):
    return torch.stack(partials).sum(0)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_the_sum_of_the_parts_is_the_whole(tp, bias):
    model = tiny_llama(attention_bias=bias, mlp_bias=bias)
    expected, seen = model(IDS).logits, []

    def reduce(site, partials):
        seen.append((site, len(partials), tuple(partials[0].shape)))
        return exact(site, partials)

    with simulated_tp(model, tp, reduce):
        found = model(IDS).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert seen == [(site, tp, (1, 20, 32)) for site in SITES]


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_is_split_where_megatron_splits_it(family, tp, tmp_path):
    model, seen = random_model(family), []
    model.save_pretrained(tmp_path)

    def reduce(site, partials):
        seen.append(site)
        assert len(partials) == tp and not torch.allclose(partials[0], partials[1], atol=0.01)
        return exact(site, partials)

    expected = model(IDS).logits
    with simulated_tp(model, tp, reduce):
        assert torch.allclose(model(IDS).logits, expected, atol=1e-4)
    sums = [site for site in read_config(tmp_path).sites if not site.endswith(".dispatch")]
    assert seen == sums == list(row_parallel(model))
    assert torch.equal(model(IDS).logits, expected)


@torch.no_grad()
def test_partials_of_experts_are_those_of_weights_cut_by_hand():
    """One token: its two experts, each with its share of the intermediate features, weighed and added."""
    model, tp, found = random_model("mixtral"), 4, []
    experts = model.model.layers[0].mlp.experts
    x, chosen, weights = torch.randn(1, 32), torch.tensor([[2, 0]]), torch.tensor([[0.75, 0.25]])
    with simulated_tp(model, tp, lambda site, partials: found.append(partials) or exact(site, partials)):
        experts(x, chosen, weights)
    for rank in range(tp):
        span, total = slice(rank * 12, (rank + 1) * 12), 0
        for expert, weight in zip(chosen[0], weights[0], strict=True):
            gate, up = (half[span] @ x[0] for half in experts.gate_up_proj[expert].chunk(2))
            total = total + weight * experts.down_proj[expert][:, span] @ (torch.nn.functional.silu(gate) * up)
        assert torch.allclose(found[0][rank][0], total, atol=1e-5)


@torch.no_grad()
def test_partials_are_those_of_weights_cut_by_hand():
    """What enters a layer, watched by a hook in the unsplit model, times the columns that Megatron gives each rank."""
    model, tp, expected, found = tiny_llama(mlp_bias=True), 2, {}, {}
    hooks = []
    for site, layer in row_parallel(model).items():

        def hook(layer, inputs, output, site=site):
            size = layer.weight.shape[1] // tp
            spans = [slice(rank * size, (rank + 1) * size) for rank in range(tp)]
            expected[site] = [inputs[0][..., span] @ layer.weight[:, span].T for span in spans]

        hooks.append(layer.register_forward_hook(hook))
    model(IDS)
    for hook in hooks:
        hook.remove()

    def reduce(site, partials):
        found[site] = partials
        return exact(site, partials)

    with simulated_tp(model, tp, reduce):
        model(IDS)
    assert list(found) == list(expected) == SITES
    for site in SITES:
        assert torch.allclose(torch.stack(found[site]), torch.stack(expected[site]), atol=1e-4)
        assert not torch.allclose(found[site][0], found[site][1], atol=0.1)


@torch.no_grad()
def test_what_reduce_returns_is_what_the_model_goes_on_with():
    model = tiny_llama()
    with simulated_tp(model, 2, lambda site, partials: torch.zeros_like(partials[0])):
        zeroed = model(IDS).logits
    for layer in row_parallel(model).values():
        layer.weight.zero_()
    assert torch.equal(model(IDS).logits, zeroed)


@torch.no_grad()
def test_the_model_is_as_before_also_after_an_error():
    model = tiny_llama()
    expected, own = model(IDS).logits, lambda x: torch.zeros(*x.shape[:-1], 32)
    with pytest.raises(ZeroDivisionError), simulated_tp(model, 2, lambda site, partials: 1 / 0):
        model(IDS)
    assert torch.equal(model(IDS).logits, expected)
    assert all("forward" not in vars(layer) for layer in row_parallel(model).values())
    model.model.layers[0].mlp.down_proj.forward = own
    with simulated_tp(model, 2, exact):
        pass
    assert model.model.layers[0].mlp.down_proj.forward is own


@pytest.mark.parametrize("tp", [0, 3])
def test_a_size_that_does_not_divide(tp):
    with pytest.raises(ModelError, match=f"TP={tp} does not divide the 32 features that enter layers.0.attention"):
        with simulated_tp(tiny_llama(), tp, exact):
            pass


def test_another_architecture():
    with pytest.raises(ModelError, match="Linear is not built like a Llama"):
        row_parallel(torch.nn.Linear(2, 2))
