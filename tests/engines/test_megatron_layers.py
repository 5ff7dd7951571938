"""The parts that Megatron's local layers lack, each against its plain formula; and the spec that scripts are given."""

import argparse
import sys
from importlib import import_module
from types import ModuleType

import pytest
import torch

from megatron_lowbit.engines.hf_model import read_config
from megatron_lowbit.engines.megatron import quiet
from megatron_lowbit.errors import ConfigError, ModelError
from tests.models import random_model


@pytest.fixture(scope="module")
def layers():
    with quiet():
        return import_module("megatron_lowbit.engines.megatron_layers")


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("queries", [1, 4, 9])
def test_masked_softmax_sees_what_it_should(layers, cap, window, queries):
    """9 keys, of which the queries are the last: one query is a step with a cache, 9 are a whole prompt."""
    torch.manual_seed(0)
    scores = torch.randn(2, 3, queries, 9) * 4
    found = layers.MaskedSoftmax(window, cap)(scores, None)
    for row in range(queries):
        last = 9 - queries + row
        first = 0 if window is None else max(0, last - window + 1)
        seen = scores[:, :, row, first : last + 1].double()
        seen = seen if cap is None else cap * torch.tanh(seen / cap)
        expected = torch.zeros(2, 3, 9).double()
        expected[..., first : last + 1] = seen.exp() / seen.exp().sum(-1, keepdim=True)
        assert torch.allclose(found[:, :, row].double(), expected, atol=1e-6)


def test_masked_softmax_hides_padding_and_keeps_the_dtype(layers):
    mask = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    mask[1, :, :, 0] = True  # the first token of the second prompt
    found = layers.MaskedSoftmax(None, None)(torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16), mask)
    assert found.dtype == torch.bfloat16
    assert found[0, 0, 3].tolist() == [0.25] * 4 and found[1, 0, 3, 0] == 0 and found[1, 0, 1].tolist() == [0, 1, 0, 0]


def test_zero_centered_norm_is_gemmas(layers):
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    for dtype in (torch.float32, torch.bfloat16):
        theirs = Gemma2RMSNorm(32, eps=1e-5).to(dtype)
        ours = layers.ZeroCenteredRMSNorm(argparse.Namespace(params_dtype=dtype), 32, 1e-5)
        with torch.no_grad():
            theirs.weight.normal_()
            ours.weight.copy_(theirs.weight)
            x = torch.randn(5, 32).to(dtype)
            assert torch.equal(ours(x), theirs(x)) and ours(x).dtype == dtype


@pytest.mark.parametrize("static", [True, False])
def test_engines_that_would_leave_windows_out_are_refused(layers, monkeypatch, static):
    """Dynamic batching calls a kernel in place of the core attention."""
    monkeypatch.setattr(layers.SelfAttention, "forward", lambda self, *args, **kwargs: kwargs)
    own = object.__new__(layers.StaticAttention)
    torch.nn.Module.__init__(own)
    own.config = argparse.Namespace(flash_decode=False)
    context = argparse.Namespace(is_static_batching=lambda: static)
    assert own.forward(None, inference_context=None, rotary_pos_emb=1) == {
        "inference_context": None,
        "rotary_pos_emb": 1,
    }
    if static:
        assert own.forward(None, inference_context=context) == {"inference_context": context}
        own.config.flash_decode = True
    with pytest.raises(ModelError, match="for static batching only, .*: use the static engine"):
        own.forward(None, inference_context=context)


@pytest.fixture
def script(tmp_path, monkeypatch):
    """What `--spec` sees inside a Megatron-LM script, whose `get_args` are these."""

    def start(family, **arguments):
        random_model(family).save_pretrained(tmp_path / "hf")
        training = ModuleType("megatron.training")
        training.get_args = lambda: argparse.Namespace(load=str(tmp_path), pipeline_model_parallel_size=1, **arguments)
        monkeypatch.setitem(sys.modules, "megatron.training", training)
        monkeypatch.delitem(sys.modules, "megatron_lowbit.engines.megatron_spec", raising=False)
        return tmp_path / "hf"

    return start


def test_scripts_import_the_spec_of_the_checkpoint_they_load(layers, script):
    from megatron.core.transformer.spec_utils import import_module as from_spec

    def attention(spec):
        return spec.submodules.self_attention.submodules.core_attention

    folder = script("gemma2")
    gemma = from_spec(("megatron_lowbit.engines.megatron_spec", "spec"))
    assert len(gemma.layer_specs) == read_config(folder).layers and gemma.layer_norm is layers.ZeroCenteredRMSNorm
    assert {spec.module for spec in gemma.layer_specs} == {layers.GemmaLayer}
    script("mistral")
    mistral = from_spec(("megatron_lowbit.engines.megatron_spec", "spec"))
    assert issubclass(attention(mistral), layers.DotProductAttention) and attention(mistral).__name__ == "Attention"
    script("llama")
    assert attention(from_spec(("megatron_lowbit.engines.megatron_spec", "spec"))) is layers.DotProductAttention


def test_the_spec_is_for_scripts_only(layers, monkeypatch):
    def get_args():
        raise AssertionError("args is not initialized.")

    training = ModuleType("megatron.training")
    training.get_args = get_args
    monkeypatch.setitem(sys.modules, "megatron.training", training)
    monkeypatch.delitem(sys.modules, "megatron_lowbit.engines.megatron_spec", raising=False)
    with pytest.raises(
        ConfigError, match=r"for --spec of a Megatron-LM script \(args is not initialized\.\): call layer_"
    ):
        import_module("megatron_lowbit.engines.megatron_spec")
