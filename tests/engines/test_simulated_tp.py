"""Partial sums in one process are those of ranks, and leave the model as it was."""

import contextlib
import io

import pytest
import torch

import megatron_lowbit as lowbit
from megatron_lowbit.engines.hf_model import read_config
from megatron_lowbit.engines.simulated_tp import row_parallel, simulated_tp, whole_experts
from megatron_lowbit.errors import ModelError
from tests.llama import tiny_llama
from tests.models import EVERY_FAMILY, FAMILIES, random_model, site_names
from tests.models import SIZES as MODEL_SIZES
from tests.ranks import run_ranks

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


def logits(model, family):
    return model(IDS, **({"decoder_input_ids": IDS[:, :9]} if family == "t5" else {})).logits


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("family", EVERY_FAMILY)
@torch.no_grad()
def test_every_family_of_transformers(family, tp):
    model, seen = random_model(family), []

    def reduce(site, partials):
        seen.append(site)
        assert len(partials) == tp and not torch.allclose(partials[0], partials[1], atol=1e-3)
        return exact(site, partials)

    expected = logits(model, family)
    with simulated_tp(model, tp, reduce):
        assert torch.allclose(logits(model, family), expected, atol=1e-4 * expected.abs().max())
    assert list(row_parallel(model)) == site_names(family)
    assert sorted(seen) == sorted(site_names(family))  # Qwen2-MoE computes its shared expert first
    assert torch.equal(logits(model, family), expected)


RANKED = ("llama", "gpt2", "opt", "falcon-7b", "t5")


def watched(model, found):
    """Note what comes out of each row-parallel layer."""
    for site, layer in row_parallel(model).items():
        layer.register_forward_hook(lambda layer, inputs, output, site=site: found.update({site: output.clone()}))


@torch.no_grad()
def sharded(rank, world):
    import deepspeed
    import deepspeed.ops

    from megatron_lowbit.patches.ds.injection import prepare

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    sums = {family: {} for family in RANKED}
    for family in RANKED:
        model = random_model(family)
        settings = {"tensor_parallel": {"tp_size": world}, "dtype": torch.float32}
        with contextlib.redirect_stdout(io.StringIO()):
            engine = deepspeed.init_inference(model, injection_policy=prepare(model, world), **settings)
        watched(model, sums[family])
        with lowbit.patches.deepspeed.enable(engine, lowbit.CommConfig("int8:g32", min_bytes=0)):
            logits(engine, family)
    return sums


@torch.no_grad()
def test_sums_are_those_of_ranks_of_deepspeed_bit_by_bit():
    """The logits are not: DeepSpeed reduces them too, and exactly, in another order of summation than one process."""
    ranks = run_ranks(2, sharded)
    for family in RANKED:
        model, sums = random_model(family), {}
        watched(model, sums)
        with simulated_tp(
            model, 2, lambda site, partials: lowbit.simulate.all_reduce(partials, "int8:g32", "one-shot")
        ):
            logits(model, family)
        assert list(sums) == site_names(family)
        for rank in ranks:
            assert all(rank[family][site].equal(total) for site, total in sums.items()), family


@torch.no_grad()
def test_experts_that_are_layers_of_their_own():
    """As Transformers 4 has them: they share a site, and each is a reduction."""

    class MixtralDecoderLayer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            experts = [torch.nn.ModuleDict({"w2": torch.nn.Linear(8, 4)}) for _ in range(2)]
            self.block_sparse_moe = torch.nn.ModuleDict({"experts": torch.nn.ModuleList(experts)})

    model, seen = torch.nn.Module(), []
    model.config = type("Config", (), {"model_type": "mixtral"})()
    model.layers = torch.nn.ModuleList([MixtralDecoderLayer()])
    one, other = (expert.w2 for expert in model.layers[0].block_sparse_moe.experts)
    x = torch.randn(3, 8)
    expected = one(x), other(x)
    with simulated_tp(model, 2, lambda site, partials: seen.append(site) or exact(site, partials)):
        torch.testing.assert_close((one(x), other(x)), expected)
    assert seen == ["layers.0.moe.experts"] * 2
    assert one(x).equal(expected[0]) and other(x).equal(expected[1])


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


ENCODERS = {
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "roberta": {},
    "xlm-roberta": {},
    "electra": {"embedding_size": 32},
    "deberta-v2": {},
}


@pytest.mark.parametrize("family", ENCODERS)
@torch.no_grad()
def test_encoders_whose_layers_have_usual_names(family):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(family, **(MODEL_SIZES | {"pad_token_id": 0} | ENCODERS[family]))
    model, seen = transformers.AutoModelForMaskedLM.from_config(config).float().eval(), []
    expected = model(IDS).logits
    with simulated_tp(model, 4, lambda site, partials: seen.append(site) or exact(site, partials)):
        assert torch.allclose(model(IDS).logits, expected, atol=1e-4)
    assert seen == SITES and expected.std() > 0.1


def test_a_family_that_is_half_known():
    """ALBERT's attention has a usual name, its MLP has none: half of the sums would be exact, and nobody the wiser."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.AlbertForMaskedLM(transformers.AlbertConfig(vocab_size=61, embedding_size=32, **sizes))
    with pytest.raises(ModelError, match="of layers.0 only attention has a usual name .* add its model type"):
        row_parallel(model)


def test_experts_that_stay_whole_are_named():
    """DeepSeek's shared expert has a usual name, and is split; its routed ones, all in one tensor, have none."""
    transformers = pytest.importorskip("transformers")
    assert whole_experts(random_model("qwen3_moe")) is None
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_attention_heads": 4}
    more = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 8, "n_group": 2, "topk_group": 1}
    with torch.device("meta"):
        model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(vocab_size=61, **sizes, **more))
    if isinstance(model.model.layers[1].mlp.experts, torch.nn.ModuleList):
        pytest.skip("this release has a module for each expert")
    assert "layers.1.moe.shared_experts" in row_parallel(model)
    assert whole_experts(model) == "model.layers.1.mlp.experts"


def test_another_architecture():
    with pytest.raises(
        ModelError, match="Linear has no row-parallel layer of a name that is known: .* such as llama, mistral"
    ):
        row_parallel(torch.nn.Linear(2, 2))
