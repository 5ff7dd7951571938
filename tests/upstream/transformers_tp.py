"""Transformers' own tensor-parallel tests, with the patch enabled in every model that they shard.

    pip download --no-deps --no-binary :all: transformers==5.23.0 && tar xzf transformers-5.23.0.tar.gz
    pip install parameterized
    LOWBIT_UPSTREAM=transformers-5.23.0/tests python -m pytest -c /dev/null tests/upstream/transformers_tp.py
    LOWBIT_UPSTREAM_SPEC=int8:g128 LOWBIT_UPSTREAM=… …       fp32 (exact) and bf16 are others; without: not enabled

What is tested is their TensorParallelTesterMixin: sharding, forward, gradients, generation. From their repository it
wants a harness that starts processes and a tester for each model, which are not in that archive: they are ours, and the
models are those of tests/planned_models.py. A compressed sum is further off than their tolerance, so that is 0.1 here
then, a test of gradients must end in an error, and one of generation may end in other tokens.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
import unittest

import pytest

import megatron_lowbit as lowbit
from tests import planned_models
from tests.ranks import run_ranks

FOLDER, SPEC = os.environ.get("LOWBIT_UPSTREAM"), os.environ.get("LOWBIT_UPSTREAM_SPEC") or None
LOSSY = SPEC not in (None, "fp32")
if FOLDER is None:
    pytest.skip("LOWBIT_UPSTREAM names no folder of Transformers' tests", allow_module_level=True)


def run_distributed(world_size: int):
    """Their harness, on our ranks: run_distributed(2)(function)(*args) calls function(rank, *args) on both."""

    def started(function):
        return lambda *args: run_ranks(world_size, _rank, function.__name__, args, timeout=120)

    return started


def _rank(rank: int, world: int, name: str, args: tuple) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    load = upstream._load_tp_and_reference_models

    def loaded(*args):
        model, *others = load(*args)
        if SPEC:
            lowbit.patches.transformers.enable(model, lowbit.CommConfig(SPEC, min_bytes=0))
        return model, *others

    upstream._load_tp_and_reference_models = loaded
    getattr(upstream, name)(rank, *args)
    if SPEC:
        assert all("exact" not in site["paths"] or site["fallbacks"] for site in lowbit.stats().values())
        assert lowbit.stats(), "nothing was summed by the patch"


package = types.ModuleType("upstream_tests")
package.__path__ = [FOLDER]
harness = types.ModuleType("upstream_tests.distributed_testing_utils")
harness.run_distributed = run_distributed
sys.modules |= {package.__name__: package, harness.__name__: harness}
upstream = importlib.import_module("upstream_tests.test_tensor_parallel_mixin")
upstream.TP_DISTRIBUTED_TEST_MODEL_TYPES = None  # all models, not only those that are downloaded most


class ModelTester:
    """What the mixin asks of a tester of theirs."""

    def __init__(self, family: str) -> None:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        self.family = family
        self.causal_lm_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.get_config())]

    def get_config(self):
        from transformers import AutoConfig

        kind, own = planned_models.FAMILIES[self.family]
        return AutoConfig.for_model(kind, **(planned_models.SIZES | {"vocab_size": 99} | own))

    def prepare_config_and_inputs_for_common(self) -> tuple:
        return self.get_config(), {}


def _tests(family: str) -> type:
    class Tests(upstream.TensorParallelTesterMixin, unittest.TestCase):
        model_tester = ModelTester(family)
        all_model_classes = (model_tester.causal_lm_class,)
        tensor_parallel_atol = tensor_parallel_rtol = 0.1 if LOSSY else 1e-5

    if LOSSY:
        backward, generation = Tests.test_tp_backward, Tests.test_tp_generation

        def test_tp_backward(self):
            with self.assertRaisesRegex(AssertionError, "needs gradients"):
                backward(self)

        def test_tp_generation(self):
            try:
                generation(self)
            except AssertionError as error:
                if "differ" not in str(error):
                    raise
                self.skipTest("a random model's greedy tokens went another way")

        Tests.test_tp_backward, Tests.test_tp_generation = test_tp_backward, test_tp_generation
    return Tests


for _family in planned_models.FAMILIES:
    globals()[f"Test_{_family.replace(' ', '_')}"] = _tests(_family)
del _family
