"""What all engines have in common: the tokenizer of a folder, its end tokens, text as it comes, and perplexity."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import ConfigError, ModelError
from .base import Generation, OnText, Perplexity, Sampling, TextStream
from .hf_model import read_json

WINDOW = 512  # tokens that perplexity looks at together, unless told otherwise


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer. Raises ModelError if it has none that Transformers can load."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder} has no tokenizer that Transformers can load; add tokenizer.json and tokenizer_config.json"
        ) from error


def end_tokens(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """End-of-sequence tokens as Transformers finds them: generation_config.json, config.json, the tokenizer."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        found = read_json(path).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


class TextModel(ABC):
    """What an engine is made of, but for `generate` and `logits`, which its framework decides.

    `max_positions` is None for a model that takes texts of any length.
    """

    tokenizer: Any
    model: torch.nn.Module
    device: torch.device
    vocab: int
    max_positions: int | None
    eos: tuple[int, ...]

    def tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, verbose=False)["input_ids"]  # verbose: warns of lengths that we check ourselves

    def detokenize(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(
            tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def check(self, prompts: Sequence[str], sampling: Sampling) -> None:
        """Raise `ConfigError` for what `generate` would refuse."""
        if isinstance(prompts, str):
            raise ConfigError(f"prompts is the string {prompts[:40]!r}; give a list of strings")
        if sampling.top_k >= self.vocab:
            raise ConfigError(f"top_k is {sampling.top_k}; it must stay below the vocabulary size {self.vocab}")
        for index, prompt in enumerate(prompts):
            ids = self.tokenize(prompt)
            if not prompt or not ids:
                raise ConfigError(f"prompt {index} is empty; give at least one character")
            self._check_length(index, len(ids), sampling.max_new_tokens)

    def _check_length(self, index: int, prompt: int, new: int) -> None:
        if self.max_positions is not None and prompt + new > self.max_positions:
            raise ConfigError(
                f"prompt {index}: {prompt} prompt tokens + {new} new tokens = {prompt + new}, above "
                f"the model's {self.max_positions} positions; shorten the prompt or lower max_new_tokens"
            )

    @torch.inference_mode()
    def perplexity(self, text: str, window: int | None = None) -> Perplexity:
        """Perplexity of `text` over consecutive, non-overlapping windows; identical on all ranks.

        `window` is in tokens, by default 512 or the model's positions if fewer. Each window is predicted from its own
        tokens only, so its first token is not scored. Raises `ConfigError` when the window or the text does not fit.
        """
        longest = self.max_positions
        if window is None:
            window = min(longest or WINDOW, WINDOW)
        if window < 2 or (longest is not None and window > longest):
            room = "be at least 2 tokens" if longest is None else f"lie between 2 and {longest} tokens"
            raise ConfigError(f"window is {window}; it must {room}")
        ids = torch.tensor(self.tokenize(text), dtype=torch.long, device=self.device)
        if len(ids) < 2:
            raise ConfigError(f"the text has {len(ids)} tokens; perplexity needs at least 2")
        total, count = 0.0, 0
        for part in ids.split(window):
            if len(part) > 1:
                nll = F.cross_entropy(self.logits(part[None])[0, :-1].float(), part[1:], reduction="none")
                total, count = total + nll.double().sum().item(), count + len(nll)
        return Perplexity(value=math.exp(total / count), nll=total / count, tokens=count)

    @abstractmethod
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [batch, length] (int64) to logits [batch, length, vocabulary] in the model's dtype."""


class Continuations:
    """The tokens and texts of one call of `generate`, while they come. Tokens above the asked number are dropped.

    `shown`: the tokens in front of each continuation, which decide how its first ones read.
    """

    def __init__(self, model: TextModel, shown: list[list[int]], sampling: Sampling, on_text: OnText | None) -> None:
        self._most = sampling.max_new_tokens
        self._on_text = on_text if torch.distributed.get_rank() == 0 else None
        self._streams = [TextStream(model.detokenize, tokens) for tokens in shown]
        self._tokens: list[list[int]] = [[] for _ in shown]
        self._texts = [""] * len(shown)

    def push(self, step: list[tuple[int, int]]) -> None:
        """[(prompt index, token)] of one step; no end-of-sequence tokens."""
        for index, token in step:
            if len(self._tokens[index]) < self._most:
                self._tokens[index].append(token)
                self._show(index, self._streams[index].push(token))

    def finish(self, prompts: Sequence[str]) -> list[Generation]:
        for index, stream in enumerate(self._streams):
            self._show(index, stream.finish())
        return [Generation(*each) for each in zip(prompts, self._texts, map(tuple, self._tokens), strict=True)]

    def _show(self, index: int, piece: str) -> None:
        self._texts[index] += piece
        if piece and self._on_text:
            self._on_text(index, piece)
