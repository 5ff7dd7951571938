"""What an evaluation holds at once, by counting the bytes of all tensors that are alive."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import megatron_lowbit as lowbit
from megatron_lowbit.engines.simulated_tp import simulated_tp
from megatron_lowbit.evaluation.cases import Case
from megatron_lowbit.evaluation.metrics import ROWS, compare
from megatron_lowbit.evaluation.run import evaluate
from megatron_lowbit.evaluation.windows import consecutive
from megatron_lowbit.simulate import reduced
from tests.llama import tiny_llama

TOKENS, TP = 256, 8


class Live(TorchDispatchMode):
    """Bytes of the tensors that were made within it and still are, now and at most."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self._known = 0, 0, set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((arguments, options)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage())._cdata not in self._known | given:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key, nbytes):
        self._known.remove(key)
        self.now -= nbytes


def most(function):
    """Bytes that were alive at most while it ran, beside what was there before; what it returns is dropped."""
    function()  # tables and compiled kernels are made once
    with Live() as live:
        function()
    return live.most


def test_counts_bytes():
    def twice():
        a = torch.zeros(1000)
        b = a.view(10, 100)[2:].t()
        del a
        c = b + 1
        del b
        return c.contiguous()

    assert most(twice) == 4000 + 3200


@pytest.mark.parametrize("algorithm", ["one-shot", "two-step"])
@torch.no_grad()
def test_a_sum_holds_its_partials_and_little_more(algorithm):
    config, partials = lowbit.CommConfig("int4:g32", algorithm, 0), [torch.randn(TOKENS, 64) for _ in range(TP)]
    message, bits = partials[0].nbytes, 5 / 32
    if algorithm == "one-shot":  # all wires, the sum
        allowed = TP * bits * message + message
    else:  # of a part of the rows all wires, no larger than a message, and their sum; the second wire; the sum
        allowed = message + message / 2 + bits * message + message
    assert message < most(lambda: reduced(partials, config)) <= 1.02 * allowed  # wires are padded to 16 bytes a section


@pytest.mark.parametrize("algorithm", ["one-shot", "two-step"])
@torch.no_grad()
def test_a_model_holds_the_partials_of_one_layer(algorithm):
    """Attention's and the MLP's own tensors are as large as the model makes them, so they are measured, not guessed."""
    model = tiny_llama(hidden_size=64, intermediate_size=128, max_position_embeddings=TOKENS, num_hidden_layers=4)
    ids, config = torch.arange(TOKENS)[None] % 61, lowbit.CommConfig("int4:g32", algorithm, 0)
    message = TOKENS * 64 * 4
    alone = most(lambda: model.model(ids, use_cache=False))

    def simulated():
        with simulated_tp(model, TP, lambda site, partials: reduced(partials, config, site)):
            model.model(ids, use_cache=False)

    wires = TP * message * 5 / 32
    assert alone < most(simulated) <= alone + TP * message + 1.02 * wires + message


@torch.no_grad()
def test_logits_are_compared_in_small_parts():
    vocabulary = 50_000
    exact, logits, targets = torch.randn(64, vocabulary), torch.randn(64, vocabulary), torch.arange(64)
    found = most(lambda: compare(exact, logits, targets))
    row = vocabulary * 4
    assert row < found <= 6 * ROWS * row + 64 * 100 < exact.nbytes * 2


def test_an_evaluation_holds_the_logits_of_two_windows():
    """The exact ones and those of the case at hand."""
    vocabulary, cases = 30_000, [Case(lowbit.CommConfig(spec, "auto", 0), 2) for spec in ("int4:g32", "int8:g32")]
    model = tiny_llama(vocab_size=vocabulary, num_hidden_layers=1)
    windows = consecutive(range(180), 60)
    logits = 60 * vocabulary * 4
    found = most(lambda: [tokens.kl for *_, tokens in evaluate(model, windows, cases)])
    assert 2 * logits < found < 2 * logits + 6 * ROWS * vocabulary * 4
