"""A pytest plugin that runs DeepSpeed's own tests with this patch switched on.

    PYTHONPATH=REPO:REPO/tests/upstream LOWBIT_UPSTREAM=int8:g128 python -m pytest -p deepspeed_plugin FILE…

in the folder `tests` of a checkout of DeepSpeed. Without LOWBIT_UPSTREAM nothing is enabled: the run to compare with.
Every InferenceEngine on more than one rank, and every row-parallel layer that a test makes by itself in inference mode,
is enabled when it is made. What they were is printed at the end of each rank's process, "lowbit: " and the paths taken.

DeepSpeed's tests start their ranks by forkserver, which would not have this plugin, so they are forked instead. Their
models come from a hub; a tiny random one of the same family takes its place (HUB), with a tokenizer of a few words.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing.util
import os
import sys

import torch
import torch.multiprocessing as mp

SPEC = os.environ.get("LOWBIT_UPSTREAM")
WORDS = "hell hello i'm a model"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
HUB = {"FacebookAI/roberta-large": ("roberta", SIZES | {"max_position_embeddings": 64})}


def pytest_configure(config) -> None:
    import deepspeed.ops
    import transformers.pipelines

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    original = mp.set_start_method
    mp.set_start_method = lambda method, force=False: original("fork", force)
    offline = _offline(transformers.pipelines.pipeline)
    sys.modules["transformers"].pipeline = transformers.pipelines.pipeline = offline
    if SPEC:
        _enable_all()


def _enable_all() -> None:
    from deepspeed.inference.engine import InferenceEngine
    from deepspeed.module_inject import layers

    import megatron_lowbit as lowbit

    config = lowbit.CommConfig(SPEC, min_bytes=0)
    enable = lowbit.patches.deepspeed.enable

    def of_engine(self, *_) -> None:
        if self.mp_group is not None and self.mp_group.size() > 1:
            for module in self.modules():
                module.__dict__.get("lowbit_handle", _Nothing).disable()
            self.lowbit_handle = enable(self, config)

    def of_layer(self, *_) -> None:
        if self.mp_group is not None and self.mp_group.size() > 1 and not self.is_training_mode():
            self.lowbit_handle = enable(self, config)

    made = [(InferenceEngine, of_engine), (layers.LinearAllreduce, of_layer)]
    made += [(layers.SubParamLinearAllreduce, of_layer)] if hasattr(layers, "SubParamLinearAllreduce") else []
    for kind, then in made:
        kind.__init__ = _before(kind.__init__, then)
    multiprocessing.util.register_after_fork(
        _Nothing, lambda _: multiprocessing.util.Finalize(None, _report, exitpriority=1)
    )
    atexit.register(_report)


class _Nothing:
    @staticmethod
    def disable() -> None: ...


def _before(init, then):
    @functools.wraps(init)
    def wrapper(self, *args, **kwargs) -> None:
        init(self, *args, **kwargs)
        then(self)

    return wrapper


def _report() -> None:
    import megatron_lowbit as lowbit

    paths = {site: counters["paths"] for site, counters in lowbit.stats().items()}
    if paths:
        print("lowbit:", paths, flush=True)


def _offline(pipeline):
    @functools.wraps(pipeline)
    def offline(task: str, model: str, framework: str | None = None, **kwargs):
        import transformers

        if model not in HUB:
            return pipeline(task, model=model, **kwargs)
        family, sizes = HUB[model]
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **sizes)
        made = transformers.AutoModelForMaskedLM.from_config(config).eval()
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return pipeline(task, model=made, tokenizer=_tokenizer(), **kwargs)

    return offline


def _tokenizer():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    words = [*special.values(), *dict.fromkeys(WORDS.split())]
    words += [f"w{n}" for n in range(64 - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
