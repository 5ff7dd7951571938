"""The table agrees with Transformers: its families exist, and their layers are made of the classes that it names."""

import re

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from megatron_lowbit.patches.hf.policies import POLICIES
from megatron_lowbit.patches.hf.sites import named
from tests.models import EVERY_FAMILY, random_model

BACK = re.compile(r"(o|out|down|c)_proj|\.(o|wo|w2|fc2|fc_out|dense_4h_to_h|experts)$|(output|attention)\.dense$")


def test_has_every_family_that_the_project_promises():
    promised = "llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3_text phi3 opt gpt2 gpt_neox"
    assert {*promised.split(), "gptj", "bloom", "falcon", "starcoder2", "t5", "bert"} <= set(POLICIES)
    assert set(POLICIES) == {family.split("-")[0] for family in EVERY_FAMILY}  # a tiny model of each is tested


@pytest.mark.parametrize("family", POLICIES)
def test_names_what_transformers_has(family):
    assert family in CONFIG_MAPPING_NAMES
    modeling = getattr(transformers.models, family.removesuffix("_text"))
    source = getattr(modeling, f"modeling_{family.removesuffix('_text')}")
    assert all(hasattr(source, layer) for layer in POLICIES[family].layers)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_leaves_out_no_row(family):
    """Each transformer layer has the rows it should: what returns to the hidden size inside it, and nothing else."""
    model, policy = random_model(family), POLICIES[family.split("-")[0]]
    listed = {path for _, path, _ in named(model)}
    for layer in (path for path, module in model.named_modules() if type(module).__name__ in policy.layers):
        back = {
            path
            for path, module in model.get_submodule(layer).named_modules(prefix=layer)
            if BACK.search(path) and list(module.parameters(recurse=False))
        }
        assert back == {path for path in listed if path.startswith(f"{layer}.")}
