"""Text generation and perplexity with Megatron-Core's own inference stack, on CUDA or on the CPU."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ..config import CommConfig
from ..errors import ConfigError
from ..patches import megatron_cpu
from .base import Generation, OnText, Perplexity, Sampling
from .hf_model import Checkpoint, ModelConfig, check_tensor_parallel, read_config
from .megatron_model import load_model
from .model_facts import UNTRUSTED, Trust
from .text_model import Continuations, TextModel, end_tokens, load_tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """Hides Megatron's deprecation and missing-extension warnings; errors still pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def init_tensor_parallel(tp: int | None = None) -> int:
    """Initialises Megatron's parallel state for `tp` ranks per model (default: all), unless it already is.

    Returns the TP size. Raises `ConfigError` when `torch.distributed` is not initialised, or its size does not fit.
    """
    if not torch.distributed.is_initialized():
        raise ConfigError("torch.distributed is not initialised; call init_process_group first, or start with torchrun")
    from megatron.core import parallel_state, tensor_parallel

    world = torch.distributed.get_world_size()
    if parallel_state.model_parallel_is_initialized():
        present = parallel_state.get_tensor_model_parallel_world_size()
        if tp not in (None, present):
            raise ConfigError(f"TP={tp} was asked for but Megatron already runs TP={present}; use {present}")
    else:
        tp = world if tp is None else tp
        if tp < 1 or world % tp:
            raise ConfigError(f"TP={tp} does not divide the {world} ranks; start a multiple of {tp} ranks")
        parallel_state.initialize_model_parallel(tp, create_gloo_process_groups=False)
    # Attention forks this tracker around its dropout, also in evaluation; the inference tracker's fork does nothing.
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)
    return parallel_state.get_tensor_model_parallel_world_size()


class _Tokenizer:
    """The few names Megatron's controller wants of a tokenizer."""

    bos = None  # the controller would strip it from every prompt
    eod = 0  # only pads buffers: the controller below ends sequences itself

    def __init__(self, engine: TextModel) -> None:
        self.tokenize, self.detokenize = engine.tokenize, engine.detokenize


@functools.cache
def _controller_class() -> type:
    """Megatron's controller with three changes; made late, because importing Megatron takes seconds."""
    from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController

    class Controller(TextGenerationController):
        """Knows all end-of-sequence tokens, never samples the padding of the vocabulary, reports every step."""

        vocab: int
        eos: torch.Tensor
        on_step: Callable[[list[tuple[int, int]]], None]  # [(prompt index, token)] of one step

        def _torch_sampling_func(self, last_token_logits, temperature, top_k, top_p, vocab_size=None):
            logits = last_token_logits[:, : self.vocab].float()
            return super()._torch_sampling_func(logits, temperature, top_k, top_p, self.vocab)

        def sample_from_logits(self, last_token_logits, sampling_params=None, vocab_size=None, *args, **kwargs):
            """What does so before 0.16."""
            logits = last_token_logits[:, : self.vocab].float()
            return super().sample_from_logits(logits, sampling_params, self.vocab, *args, **kwargs)

        def update_generation_status(
            self, updated_prompts_tokens, generation_started, current_context_end_position, is_generation_done_tensor,
            generated_sequence_lengths, *rest, **more,
        ):  # fmt: skip
            latest = updated_prompts_tokens[:, current_context_end_position]
            is_eos = torch.isin(latest, self.eos)
            fresh = (generation_started & ~is_generation_done_tensor & ~is_eos).tolist()
            self.on_step([(i, token) for i, token in enumerate(latest.tolist()) if fresh[i]])
            done, lengths = super().update_generation_status(
                updated_prompts_tokens, generation_started, current_context_end_position, is_generation_done_tensor,
                generated_sequence_lengths, *rest, **more,
            )  # fmt: skip
            return done | (is_eos & generation_started), lengths

    return Controller


class MegatronEngine(TextModel):
    """A Hugging Face folder run by Megatron-Core over the ranks of an initialised `torch.distributed`.

    `tp` defaults to all ranks, `dtype` to the checkpoint's; the device is the current CUDA device or the CPU. Every
    rank must make the engine and call its methods alike. Attributes: `model` (a `GPTModel`), `tokenizer` (of Hugging
    Face), `config`, `tp`, `device`. Raises `ModelError` for a folder, `ConfigError` for an argument that does not fit.

    `progress`: show a bar while loading; `debug`: and what Megatron warns of.
    """

    def __init__(
        self,
        folder: str | Path,
        tp: int | None = None,
        dtype: torch.dtype | None = None,
        progress: bool = False,
        debug: bool = False,
        trust: Trust = UNTRUSTED,
    ) -> None:
        folder = Path(folder)
        self.config = self.read(folder, trust)
        if tp is not None:
            check_tensor_parallel(self.config, tp)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.vocab, self.max_positions = self.config.vocab, self.config.max_positions
        self.tokenizer = load_tokenizer(folder)
        megatron_cpu.enable()
        self._quiet = nullcontext if debug else quiet
        with self._quiet():
            from megatron.core.inference.engines import static_engine  # noqa: F401  slow: with the model, not with the text

            self.tp = init_tensor_parallel(tp)
            self.model = load_model(folder, dtype, self.device, progress)
        self.dtype = next(self.model.parameters()).dtype
        self.eos = end_tokens(folder, self.tokenizer)

    @staticmethod
    def read(folder: str | Path, trust: Trust = UNTRUSTED) -> ModelConfig:
        """What is known of a folder before it is loaded. Raises ModelError for what cannot be run."""
        if trust != UNTRUSTED:
            raise ConfigError(
                "Megatron builds the model itself and reads safetensors only: leave --trust-remote-code and "
                "--allow-pickled-weights out, or use another engine"
            )
        config = read_config(folder)
        Checkpoint(folder, config)
        return config

    def enable(self, config: CommConfig) -> Any:
        """Sends this model's partial sums as `config` says, until the handle's `disable()`."""
        from ..patches import megatron_core

        return megatron_core.enable(config, self.model)

    def generate(self, prompts: Sequence[str], sampling: Sampling, on_text: OnText | None = None) -> list[Generation]:
        """Continues each prompt by `sampling.max_new_tokens` tokens, fewer only where an end-of-sequence token comes.

        `on_text` is called on global rank 0 as text arrives. All ranks return the same; so do other TP sizes, up to
        rounding. Raises `ConfigError` for an empty prompt, or one too long for the model's positions.
        """
        with self._quiet():
            from megatron.core.inference.engines import static_engine
            from megatron.core.inference.sampling_params import SamplingParams

        self.check(prompts, sampling)
        prompts = list(prompts)
        if not prompts:
            return []
        adapter, tokens = _Tokenizer(self), [self.tokenize(prompt) for prompt in prompts]
        written = Continuations(self, tokens, sampling, on_text)
        params = SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=float(sampling.top_p),
            num_tokens_to_generate=sampling.max_new_tokens,
        )
        params.add_attributes({"no_early_termination": True})  # Megatron knows one end token, our controller all
        with self._quiet(), _without_bar(static_engine), torch.random.fork_rng(devices=[]):
            controller = self._controller(adapter, len(prompts), max(map(len, tokens)) + sampling.max_new_tokens)
            if hasattr(controller, "sampling_rng"):  # from 0.15 on; the engine seeds torch's own
                controller.sampling_rng.manual_seed(sampling.seed)
            controller.on_step = written.push  # also of short prompts, which run on beside long ones
            make = static_engine.StaticInferenceEngine
            legacy = {"legacy": True} if "legacy" in inspect.signature(make).parameters else {}  # all were, before 0.16
            engine = make(controller, random_seed=sampling.seed, **legacy)
            engine.generate(prompts=prompts, sampling_params=params)
        return written.finish(prompts)

    def _controller(self, adapter: _Tokenizer, requests: int, length: int) -> Any:
        """Megatron's stack up to the controller, with a key-value cache of exactly [length, requests]."""
        from megatron.core.inference.contexts import StaticInferenceContext
        from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper

        context = StaticInferenceContext(requests, length)
        try:
            from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
        except ImportError:  # from 0.17 on, where the model's own configuration says it all
            wrapper = GPTInferenceWrapper(self.model, context)
        else:
            config = InferenceWrapperConfig(
                hidden_size=self.config.hidden,
                params_dtype=self.dtype,
                inference_batch_times_seqlen_threshold=-1,
                padded_vocab_size=self.model.vocab_size,
                inference_max_requests=requests,
                inference_max_seq_length=length,
            )
            wrapper = GPTInferenceWrapper(self.model, config, context)
        controller = _controller_class()(wrapper, adapter)
        controller.vocab = self.config.vocab
        controller.eos = torch.tensor(self.eos, dtype=torch.long, device=self.device)
        return controller

    def perplexity(self, text: str, window: int | None = None) -> Perplexity:
        with self._quiet():
            return super().perplexity(text, window)

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [batch, length] (int64) to logits [batch, length, vocabulary] in the model's dtype."""
        length = ids.shape[1]
        positions = torch.arange(length, device=ids.device).expand_as(ids)
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=ids.device).triu(1)  # True: hidden
        return self.model(ids, positions, mask, runtime_gather_output=True)[..., : self.config.vocab]


@contextmanager
def _without_bar(static_engine: Any) -> Iterator[None]:
    """Switches off the progress bar that Megatron's static engine always shows."""
    original = static_engine.tqdm
    static_engine.tqdm = functools.partial(original, disable=True)
    try:
        yield
    finally:
        static_engine.tqdm = original
