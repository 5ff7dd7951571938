"""Text generation and perplexity with a Transformers model, sharded over the ranks by some framework.

Transformers' own `generate` runs the model; which token comes next is chosen here, so that a model's
generation_config.json changes nothing, samples are those of the Megatron engine, and all ranks choose the same.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ..config import CommConfig
from ..errors import ConfigError
from .base import Generation, OnText, Perplexity, Sampling
from .hf_folder import HfFolder, hushed, read_folder
from .model_facts import UNTRUSTED, Trust
from .text_model import Continuations, TextModel, end_tokens, load_tokenizer

KEPT = ("decoder_start_token_id", "bos_token_id", "forced_bos_token_id")  # how an encoder-decoder's text begins


class HfEngine(TextModel):
    """A Hugging Face folder run by Transformers over the ranks of an initialised `torch.distributed`.

    `tp`: 1 or all ranks (the default); `dtype`: by default the checkpoint's; the device is the current CUDA device or
    the CPU. Every rank must make the engine and call its methods alike. Attributes: `model` (of Transformers),
    `tokenizer`, `facts`, `tp`, `device`. Raises `ModelError` for a folder, `ConfigError` for an argument.

    `progress`: show a bar while loading; `debug`: and what the frameworks say of their own accord.
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
        self.tp = _ranks(tp)
        self.facts = self.read(folder, trust)
        self.facts.check_tensor_parallel(self.tp)
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        self.vocab, self.max_positions = self.facts.vocab, self.facts.max_positions
        self._debug, self._progress = debug, progress and torch.distributed.get_rank() == 0
        with self._hushed():
            self.tokenizer = load_tokenizer(folder, trust.remote_code)
            self.model = self._shard(self.facts, dtype).eval().requires_grad_(False)
        self.dtype = next(self.model.parameters()).dtype
        self.eos = end_tokens(Path(folder), self.tokenizer)
        self.model.generation_config = _neutral(self.model)

    @staticmethod
    def read(folder: str | Path, trust: Trust = UNTRUSTED) -> HfFolder:
        """What is known of a folder before it is loaded. Raises ModelError for what cannot be run."""
        return read_folder(folder, trust)

    @abstractmethod
    def _shard(self, facts: HfFolder, dtype: torch.dtype | None) -> torch.nn.Module:
        """The loaded model, over `self.tp` ranks, on `self.device`."""

    @abstractmethod
    def _enable(self, config: CommConfig) -> Any:
        """The framework's patch, for `self.model`."""

    def enable(self, config: CommConfig) -> Any:
        """Sends this model's partial sums as `config` says, until the handle's `disable()`."""
        if self.tp == 1 and config.algorithm == "exact":
            return nullcontext()  # no layer of one rank makes partial sums
        return self._enable(config)

    @contextmanager
    def _hushed(self) -> Iterator[None]:
        with nullcontext() if self._debug else hushed(bars=self._progress):
            yield

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], sampling: Sampling, on_text: OnText | None = None) -> list[Generation]:
        """Continues each prompt by `sampling.max_new_tokens` tokens, fewer only where an end-of-sequence token comes.

        An encoder-decoder reads the prompt and writes a text of its own. `on_text` is called on global rank 0 as text
        arrives. All ranks return the same; prompts together give what each alone gives, up to rounding. Raises
        `ConfigError` for an empty prompt, or one too long for the model's positions.
        """
        from transformers import GenerationConfig, LogitsProcessorList

        self.check(prompts, sampling)
        prompts = list(prompts)
        if not prompts:
            return []
        tokens = [self.tokenize(prompt) for prompt in prompts]
        apart = self.facts.encoder_decoder
        written = Continuations(self, [[] for _ in tokens] if apart else tokens, sampling, on_text)
        chooser = _Chooser(sampling, self.vocab, self.eos, self.tp > 1, written)
        ids, mask = _padded(tokens, left=not apart, device=self.device)
        with self._hushed():
            self.model.generate(
                ids,
                attention_mask=mask,
                logits_processor=LogitsProcessorList([chooser]),
                generation_config=GenerationConfig(
                    max_new_tokens=sampling.max_new_tokens,
                    do_sample=False,
                    eos_token_id=list(self.eos) or None,
                    pad_token_id=self.eos[0] if self.eos else 0,
                ),
            )
        return written.finish(prompts)

    def _check_length(self, index: int, prompt: int, new: int) -> None:
        if self.facts.encoder_decoder:  # two texts, each with positions of its own
            prompt, new = max(prompt, new), 0
        super()._check_length(index, prompt, new)

    def perplexity(self, text: str, window: int | None = None) -> Perplexity:
        if self.facts.encoder_decoder:
            raise ConfigError(
                f"a {self.facts.config.model_type} is an encoder-decoder: a text alone has no perplexity; leave it out"
            )
        return super().perplexity(text, window)

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [batch, length] (int64) to logits [batch, length, vocabulary] in the model's dtype."""
        return self.model(input_ids=ids, use_cache=False).logits[..., : self.vocab]


class _Chooser:
    """A logits processor of Transformers' that decides: it leaves only the chosen token above minus infinity."""

    def __init__(
        self, sampling: Sampling, vocab: int, eos: tuple[int, ...], agree: bool, written: Continuations
    ) -> None:
        self._sampling, self._vocab, self._agree, self._written = sampling, vocab, agree, written
        self._eos, self._done, self._random = torch.tensor(eos, dtype=torch.long), None, None

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """ids [prompts, tokens so far], scores [prompts, vocabulary] -> scores."""
        if self._random is None:
            self._random = torch.Generator(scores.device).manual_seed(self._sampling.seed)
            self._done = torch.zeros(len(scores), dtype=torch.bool)
        token = choose(scores[:, : self._vocab].float(), self._sampling, self._random)
        if self._agree:  # the ranks' logits may differ by rounding, where a backend sums in another order on each
            torch.distributed.broadcast(token, src=0)
        latest = token.cpu()
        self._done |= torch.isin(latest, self._eos)
        self._written.push([(i, t) for i, t in enumerate(latest.tolist()) if not self._done[i]])
        return torch.full_like(scores, -math.inf).scatter_(1, token[:, None], 0.0)


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """The next token [prompts] of logits [prompts, vocabulary], fp32: what Megatron's sampling chooses of the same."""
    if sampling.top_k == 1:
        return logits.argmax(dim=-1)
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], -math.inf)
    elif sampling.top_p:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)  # probability of all likelier tokens
        before[:, 0] = 0  # at least one token stays
        hidden = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before > sampling.top_p)
        logits = logits.masked_fill(hidden, -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator)[:, 0]


def _padded(tokens: list[list[int]], left: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask), both int64 [prompts, longest]."""
    longest = max(map(len, tokens))
    ids = torch.zeros(len(tokens), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(tokens):
        span = slice(longest - len(prompt), longest) if left else slice(len(prompt))
        ids[row, span], mask[row, span] = torch.tensor(prompt), 1
    return ids.to(device), mask.to(device)


def _neutral(model: torch.nn.Module) -> Any:
    """A generation config without the model's own temperature, penalties and lengths, which would be mixed in."""
    from transformers import GenerationConfig

    own = {name: getattr(model.generation_config, name, None) for name in KEPT}
    own = {name: getattr(model.config, name, None) if value is None else value for name, value in own.items()}
    return GenerationConfig(**{name: value for name, value in own.items() if value is not None})


def _ranks(tp: int | None) -> int:
    """The TP size. Raises ConfigError when `torch.distributed` is not initialised, or its size does not fit."""
    if not torch.distributed.is_initialized():
        raise ConfigError("torch.distributed is not initialised; call init_process_group first, or start with torchrun")
    world = torch.distributed.get_world_size()
    tp = world if tp is None else tp
    if tp not in (1, world):
        raise ConfigError(f"TP={tp} is not the number of ranks, {world}; start {tp} ranks")
    return tp
