"""Every family on real ranks: with our policy it computes what the whole model does, and each sum is compressed."""

import contextlib
import io

import pytest
import torch
import transformers
from torch import nn

import megatron_lowbit as lowbit
from megatron_lowbit.errors import ModelError
from megatron_lowbit.patches.ds.injection import prepare
from megatron_lowbit.patches.hf.sites import named
from tests.models import EVERY_FAMILY, SIZES, fused_experts, random_model, site_names
from tests.ranks import run_ranks

# A dot product of n fp32 numbers, summed in another order, changes by about sqrt(n) = 11 roundings of its own size, for
# the 128 features at most that there are here; twice in each of 2 layers, and in the head: sqrt(5) * 11 < 32.
ROUNDINGS = 32 * 2**-23
# Those that DeepSpeed 0.19 does not compute, or computes wrongly, on its own
BROKEN = ("gpt2", "phi3", "bloom", "falcon-7b", "falcon-rw")


def stablelm() -> nn.Module:
    """Of a family without a policy."""
    torch.manual_seed(1)
    config = transformers.StableLmConfig(**SIZES, bos_token_id=None, eos_token_id=None)
    return transformers.StableLmForCausalLM(config).eval()


def model_of(name: str) -> nn.Module:
    return stablelm() if name == "stablelm" else random_model(name)


def ask(model: nn.Module, name: str) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12) * 7 % 60 + 1
    return model(ids, **({"decoder_input_ids": ids[:, :7]} if name == "t5" else {})).logits


def text(model: nn.Module, name: str) -> list:
    """Greedy, from the cache, for two prompts of which one is padded on the left."""
    if name == "bert":
        return []
    ids, mask = torch.arange(20).reshape(2, 10) * 11 % 60 + 1, torch.ones(2, 10, dtype=torch.long)
    mask[1, :3] = 0
    length = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids, attention_mask=mask, **length).tolist()


@torch.no_grad()
def shard(rank: int, world: int, names: list[str]) -> dict:
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    found = {}
    for name in names:
        model = model_of(name)
        whole, said = ask(model, name), text(model, name)
        policy = prepare(model, world)
        seen = found[name] = {"whole": whole, "said": said, "repaired": ask(model, name)}
        sites = [site for site, _, module in named(model)]
        with contextlib.redirect_stdout(io.StringIO()):
            engine = deepspeed.init_inference(
                model, tensor_parallel={"tp_size": world}, dtype=torch.float32, injection_policy=policy
            )
        assert [site for site, _, _ in named(model)] == sites
        seen["own"], seen["says"] = ask(engine, name), text(engine.module, name)
        with lowbit.patches.deepspeed.enable(engine, lowbit.CommConfig("fp32", min_bytes=0)):
            seen["exact"] = ask(engine, name)
        lowbit.telemetry.reset_stats()
        with lowbit.patches.deepspeed.enable(engine, lowbit.CommConfig("int8:g32", min_bytes=0)) as handle:
            seen["compressed"] = ask(engine, name)
        seen["sites"] = handle.sites
        seen["paths"] = {site: dict(counters["paths"]) for site, counters in lowbit.stats().items()}
        assert ask(engine, name).equal(seen["own"])
    return found


def check(names: list[str], world: int) -> None:
    ranks = run_ranks(world, shard, names, timeout=240)
    for name in names:
        seen = ranks[0][name]
        largest = seen["whole"].abs().max().item()
        near = {"rtol": 0, "atol": ROUNDINGS * largest}
        for what in ("repaired", "own"):
            torch.testing.assert_close(seen[what], seen["whole"], **near, msg=f"{name}, {what}: ".__add__)
        # Two numbers have one sum; of four, gloo adds in another order than ours, which is that of the ranks
        same = {"rtol": 0, "atol": 1e-6 * (1 if world == 2 else largest)}
        torch.testing.assert_close(seen["exact"], seen["own"], **same, msg=f"{name}: ".__add__)
        assert seen["says"] == seen["said"], name
        # Of experts that are one module, as in Transformers 5, DeepSpeed splits nothing
        sums = [site for site in site_names(name) if not site.endswith("combine")]
        assert seen["sites"] == list(seen["paths"]) == sums, name
        for site, paths in seen["paths"].items():
            [calls] = paths.values()
            assert list(paths) == ["one-shot" if world == 2 else "two-step"], (name, site)
            assert 1 <= calls <= 4 if site.endswith("moe.experts") else calls == 1, (name, site)  # of those with tokens
        assert 0 < (seen["compressed"] - seen["own"]).abs().mean() < 0.02 * largest, name  # a token may change experts
        for other in ranks[1:]:
            for what in ("own", "exact", "compressed"):
                assert other[name][what].equal(seen[what]), (name, what)
            assert other[name]["says"] == seen["says"], name


def test_every_family():
    check([*EVERY_FAMILY, "stablelm"], 2)


def test_four_ranks():
    """Of Llama's two key-value heads, two ranks get none."""
    check(["llama", "gpt2"], 4)


def variant(name: str) -> tuple[nn.Module, dict]:
    """A model that is built otherwise than its family's usual one, and what it is asked besides ids."""
    beside = {"encoder_hidden_states": torch.linspace(-1, 1, 2 * 5 * 32).reshape(2, 5, 32)}
    if name == "gpt2":
        return random_model("gpt2", add_cross_attention=True), beside
    if name == "bert":
        return random_model("bert", add_cross_attention=True, is_decoder=True), beside
    torch.manual_seed(2)
    if name == "t5":
        return transformers.T5EncoderModel(random_model("t5").config).eval(), {}
    vision = {**SIZES, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    tokens = {"image_token_index": 60, "boi_token_index": 59, "eoi_token_index": 58}
    config = transformers.Gemma3Config(text_config={**SIZES, "head_dim": 8}, vision_config=vision, **tokens)
    return transformers.Gemma3ForConditionalGeneration(config).eval(), {}


@torch.no_grad()
def shard_variants(rank: int, world: int) -> dict:
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    ids, found = torch.arange(24).reshape(2, 12) * 7 % 57 + 1, {}
    for name in ("gpt2", "bert", "t5", "gemma3"):
        model, beside = variant(name)
        whole = model(ids, **beside)[0]
        settings = {"tensor_parallel": {"tp_size": world}, "dtype": torch.float32}
        with contextlib.redirect_stdout(io.StringIO()):
            engine = deepspeed.init_inference(model, injection_policy=prepare(model, world), **settings)
        with lowbit.patches.deepspeed.enable(engine, lowbit.CommConfig("fp32", min_bytes=0)) as handle:
            off = (engine(ids, **beside)[0] - whole).abs().max() / whole.abs().max()
        found[name] = {"off": off.item(), "sites": handle.sites}
    return found


def test_models_that_are_built_otherwise():
    """With cross-attention, an encoder alone, and with a vision tower, which stays whole."""
    plain = ["layers.0.attention", "layers.0.mlp", "layers.1.attention", "layers.1.mlp"]
    crossed = [f"layers.{i}.{part}" for i in range(2) for part in ("attention", "cross_attention", "mlp")]
    expected = {"gpt2": crossed, "bert": crossed, "t5": plain, "gemma3": plain}
    for found in run_ranks(2, shard_variants):
        assert {name: seen["sites"] for name, seen in found.items()} == expected
        assert all(seen["off"] < ROUNDINGS for seen in found.values()), found


@torch.no_grad()
def autotp(rank: int, world: int, names: list[str]) -> dict:
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    said = {}
    for name in names:
        model = random_model(name)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                engine = deepspeed.init_inference(model, tensor_parallel={"tp_size": world}, dtype=torch.float32)
            ask(engine, name)
        except (AssertionError, RuntimeError) as error:
            said[name] = str(error)
    return said


def test_what_is_repaired_needs_it():
    """When this fails, DeepSpeed has learnt a family: look whether its repair can go."""
    broken = set(run_ranks(2, autotp, list(BROKEN))[0])
    assert broken == set(BROKEN) if fused_experts() else broken | {"bloom"} == set(BROKEN)  # BLOOM changed with 5


@pytest.mark.parametrize(
    ("family", "tp", "words"),
    [
        ("llama", 8, "tp_size=8 does not divide the 4 attention heads of LlamaForCausalLM: use 1, 2, 4"),
        ("phi3", 4, "tp_size=4 does not divide the 2 key-value heads of Phi3ForCausalLM: use 1, 2"),
        ("falcon", 4, "tp_size=4 does not divide the 2 key-value heads of FalconForCausalLM: use 1, 2"),
        (
            "gpt2",
            3,
            "tp_size=3 does not divide the 4 attention heads and the 32 features that enter layers.0.attention",
        ),
        ("t5", 8, "tp_size=8 does not divide the 4 attention heads of T5ForConditionalGeneration: use 1, 2, 4"),
        ("llama", 0, "tp_size is 0: give the number of ranks"),
        ("llama", "2", "tp_size is '2': give the number of ranks"),
    ],
)
def test_a_size_that_does_not_divide(family, tp, words):
    model = random_model(family)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ModelError, match=words):
        prepare(model, tp)
    assert names == [name for name, _ in model.named_parameters()]  # an error leaves it alone


def test_fewer_key_value_heads_than_ranks():
    with pytest.warns(UserWarning, match="tp_size=4 does not divide the 2 key-value heads of LlamaForCausalLM"):
        assert prepare(random_model("llama"), 4)


def test_heads_of_another_size_than_deepspeed_cuts():
    with pytest.raises(ModelError, match="Phi-3 with heads of 16 features: DeepSpeed cuts qkv_proj into .* = 8"):
        prepare(random_model("phi3", head_dim=16), 2)


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        ("t5", {"T5Block": ("SelfAttention.o", "DenseReluDense.wo", "EncDecAttention.o")}),
        ("opt", {"OPTDecoderLayer": ("self_attn.out_proj", ".fc2")}),
        ("bert", {"BertLayer": ("output.dense",)}),
        ("gpt2", {"GPT2Block": ("attn.c_proj", "mlp.c_proj")}),
    ],
)
def test_names_layers_as_deepspeed_does(family, policy):
    model = random_model(family)
    found = prepare(model, 2)
    assert {kind.__name__: names for kind, names in found.items()} == policy
    assert all(kind in map(type, model.modules()) for kind in found)


def test_nothing_to_shard():
    with pytest.raises(
        ModelError, match="no row-parallel layer in ModuleDict: it has no model type to know a policy by"
    ):
        prepare(nn.ModuleDict({"head": nn.Linear(4, 4)}), 2)
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1))
    mamba.backbone.layers = nn.ModuleList()
    with pytest.raises(ModelError, match="in MambaForCausalLM: its linear layers are lm_head; add model type 'mamba'"):
        prepare(mamba, 2)
    with pytest.raises(ModelError, match="no row-parallel layer in Embedding: it has no linear layers, or was sharded"):
        prepare(nn.Embedding(4, 4), 2)


def test_a_family_whose_layers_have_other_names():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.ModuleDict({"qkv": nn.Linear(4, 12), "out_proj": nn.Linear(4, 4)})
            self.ffn = nn.ModuleDict({"inner": nn.Linear(4, 8), "outer": nn.Linear(8, 4)})

    model = nn.Module()
    model.config = type("Config", (), {"model_type": "new"})()
    model.layers = nn.ModuleList([Layer()])
    with pytest.raises(ModelError) as caught:
        prepare(model, 2)
    assert str(caught.value) == (
        "of layers.0 only attention has a usual name for a row-parallel layer: its linear layers are "
        "layers.attn.out_proj, layers.attn.qkv, layers.ffn.inner, layers.ffn.outer; "
        "add model type 'new' to POLICIES of patches/hf/policies.py"
    )


def test_a_norm_over_all_heads_is_refused():
    sizes = SIZES | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**sizes))
    with pytest.raises(ModelError, match=r"q_norm \(Olmo2RMSNorm\) spans the features of all heads"):
        prepare(model, 2)


@pytest.mark.parametrize("family", BROKEN)
@torch.no_grad()
def test_a_repair_done_twice_changes_nothing(family):
    model = random_model(family)
    policy = prepare(model, 2)
    once, names = ask(model, family), [name for name, _ in model.named_modules()]
    assert prepare(model, 2) == policy and names == [name for name, _ in model.named_modules()]
    assert ask(model, family).equal(once)
