"""Every tensor can be cut for the ranks and joined again, whatever the family and however few the key-value heads."""

import pytest
import torch

from megatron_lowbit.engines.hf_model import Checkpoint, read_config
from megatron_lowbit.engines.weights import Ranks, expected_tensors, shards, weights
from megatron_lowbit.errors import ModelError
from tests.models import FAMILIES, random_model


@pytest.fixture
def model(tmp_path):
    def make(family, **changes):
        random_model(family, **changes).save_pretrained(tmp_path)
        config = read_config(tmp_path)
        return config, Checkpoint(tmp_path, config)

    return make


def cut(config, checkpoint, ranks):
    return [{n: part() for n, part in shards(config, checkpoint.read, ranks, r)} for r in range(ranks.tp)]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_cut_and_joined_is_what_it_was(model, family, tp):
    config, checkpoint = model(family, attention_bias=True) if family in ("llama", "qwen3") else model(family)
    ranks, found = Ranks(tp, 72), {}
    parts = cut(config, checkpoint, ranks)
    for weight in weights(config):
        found |= weight.join([part[weight.name] for part in parts], config, ranks)
    assert found.keys() == expected_tensors(config).keys()
    assert all(torch.equal(tensor, checkpoint.read(name)) for name, tensor in found.items())


def test_vocabulary_is_padded_with_zeros(model):
    config, checkpoint = model("llama")
    parts = [each["output_layer.weight"] for each in cut(config, checkpoint, Ranks(4, 72))]
    assert [tuple(part.shape) for part in parts] == [(18, 32)] * 4
    assert parts[3][7:].eq(0).all() and parts[3][:7].ne(0).any(dim=1).all()  # 3 * 18 + 7 = 61
    assert cut(config, checkpoint, Ranks(4, 1024))[3]["output_layer.weight"].eq(0).all()


@pytest.mark.parametrize(("heads", "kv", "tp"), [(4, 1, 4), (4, 2, 4), (12, 3, 4), (12, 3, 2), (12, 4, 6)])
def test_each_rank_holds_the_head_that_its_queries_ask(model, heads, kv, tp):
    """Head by head: rank r has queries from r * heads / tp, and behind each group the pair that it attends to."""
    config, checkpoint = model("llama", num_attention_heads=heads, num_key_value_heads=kv, hidden_size=96)
    queries, keys, values = (checkpoint.read(f"model.layers.0.self_attn.{x}_proj.weight") for x in "qkv")
    size, per_rank = config.head_dim, heads // tp
    for rank, part in enumerate(cut(config, checkpoint, Ranks(tp, 72))):
        packed = list(part["decoder.layers.0.self_attention.linear_qkv.weight"].split(size))
        query = rank * per_rank
        while packed:
            head = query * kv // heads
            while query < (rank + 1) * per_rank and query * kv // heads == head and len(packed) > 2:
                if not torch.equal(packed[0], queries[query * size : (query + 1) * size]):
                    break
                packed.pop(0)
                query += 1
            assert torch.equal(packed.pop(0), keys[head * size : (head + 1) * size])
            assert torch.equal(packed.pop(0), values[head * size : (head + 1) * size])
        assert query == (rank + 1) * per_rank


def test_biases_that_only_megatron_has_are_zero_and_must_stay_so(model):
    config, checkpoint = model("llama", attention_bias=True)
    ranks = Ranks(2, 62)
    parts = cut(config, checkpoint, ranks)
    absent = [weight for weight in weights(config) if weight.absent]
    assert [weight.name.rpartition("layers.0.")[2] for weight in absent[:2]] == [
        "mlp.linear_fc1.bias",
        "mlp.linear_fc2.bias",
    ]
    assert all(part[weight.name].eq(0).all() for weight in absent for part in parts)
    with pytest.raises(ModelError, match="is not zero, and Hugging Face's model has no .*gate_proj"):
        absent[0].join([part[absent[0].name] + 1 for part in parts], config, ranks)


def test_copies_that_differ_are_an_error(model):
    config, checkpoint = model("llama")
    ranks = Ranks(4, 64)
    parts = cut(config, checkpoint, ranks)
    by_name = {weight.name: weight for weight in weights(config)}
    for name, message in {
        "decoder.final_layernorm.weight": "not the same on all ranks",
        "decoder.layers.0.self_attention.linear_qkv.weight": "copies of a key-value head differ",
    }.items():
        tensors = [part[name] for part in parts]
        tensors[3] = tensors[3] + 1
        with pytest.raises(ModelError, match=message):
            by_name[name].join(tensors, config, ranks)
    with pytest.raises(ModelError, match=r"\[16\] on another"):
        by_name["decoder.final_layernorm.weight"].join([torch.ones(32), torch.ones(16)], config, ranks)
